"""Recipes run to their end, and the command line accepts each of their commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fibopolicy import cli

ROOT = Path(__file__).parents[2]
#: Stands in for the command: notes its arguments, and leaves a file as its result.
COMMAND = """#!/usr/bin/env bash
printf '%s\\t' "$@" >>commands
echo >>commands
while [ $# -gt 1 ]; do
    [ "$1" != --out ] || touch "$2"
    shift
done
"""


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("lift_seeds", {}),
        ("multitask", {}),
        ("multitask", {"TASKS": "mt10", "IMAGES": "1"}),
        ("robosuite lift_human", {"JOBS": "1"}),
        ("robosuite square", {"JOBS": "1"}),
        ("libero_suite object", {}),
    ],
)
def test_a_recipe_calls_commands_that_are_accepted(
    recipe: str, options: dict[str, str], tmp_path: Path
) -> None:
    name, *arguments = recipe.split()
    for path in (Path("scripts/recipes", name), Path("envs/libero/tasks.txt")):
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, tmp_path / path)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for tool, text in (("fibopolicy", COMMAND), ("python", "#!/usr/bin/env bash\n")):
        (tools / tool).write_text(text)
        (tools / tool).chmod(0o755)
    line = [tmp_path / "scripts" / "recipes" / name, *arguments]
    done = subprocess.run(line, env={**os.environ, **options}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [one.split("\t")[:-1] for one in (tmp_path / "commands").read_text().splitlines()]
    # runs and tasks differ in values alone
    kinds = {tuple(word for word in one if word.startswith("--")): one for one in commands}
    assert {command for command, *_ in commands} >= {"train", "evaluate", "results"}
    for one in kinds.values():
        cli.parse(one)
