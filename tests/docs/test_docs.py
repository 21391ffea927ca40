"""What the documentation tells a reader to type has to work.

Tutorials are run from top to bottom with smaller numbers; every other command line is
parsed by the real parser.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import call
from runs_here import Here

from fibopolicy import cli
from fibopolicy.statistics.rates import wilson

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([DOCS.parent / "README.md", *DOCS.rglob("*.md")])
#: Tutorials that need nothing but the package; others need robosuite or a network.
TUTORIALS = (
    *("first_policy", "your_hdf5", "your_encoder", "your_task", "compare_policies"),
    *("encoder_study", "real_robot"),
)
#: Options that are appended to a command; the last of equal options counts.
SMALLER = {
    "collect": "--episodes 11 --image-size 24 --workers 1",
    "train": "--steps 2 --batch-size 4 --warmup-steps 1 --validate-every 1",
    "profile": "--turns 2",
    "evaluate": "--episodes 2 --workers 1 --video 0",
}
#: Numbers in files and loops of tutorials, and smaller ones.
SMALLER_TEXT = {
    "for seed in 0 1 2": "for seed in 0",
    "range(20)": "range(10)",
    "84, 84": "24, 24",
    "2, 100, 16": "2, 9, 16",
    "seeds=(0, 1, 2)": "seeds=(0,)",
    "demos=200": "demos=3",
    "image_size=48": "image_size=24",
    "image_size=84": "image_size=24",
    "range(50)": "range(6)",
    "steps=600": "steps=2",
    "episodes=100": "episodes=2",
    '"batch_size": 32': '"batch_size": 4',
}


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Language, title and content of each fenced block."""
    pattern = r"^( *)```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^\1```"
    for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        yield found[2], found[3] or "", found[4]


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of each line of a shell script, with its `for` loops carried out."""

    def repeat(loop: re.Match[str]) -> str:
        values = loop[2].split()
        return "".join(re.sub(rf"\${loop[1]}\b", value, loop[3]) for value in values)

    script = re.sub(r"^for (\w+) in (.*); do\n(.*?)^done$", repeat, script, flags=re.S | re.M)
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_every_command_line_is_accepted_by_the_parser(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for language, _, content in blocks(text):
        if language == "console":  # commands after a prompt, and their output
            content = "\n".join(re.findall(r"^\$ (.*)", content, re.MULTILINE))
        for words in command_lines(content) if language in ("sh", "console") else ():
            if "fibopolicy" in words and words[-1] != "--version":
                cli.parse(words[words.index("fibopolicy") + 1 :])
    for name in re.findall(r"`fibopolicy ([a-z][a-z-]*)", text):
        assert name in cli.COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_top_to_bottom(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fibopolicy.study.executors.Local", lambda *_: Here())
    text = (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    for number, smaller in SMALLER_TEXT.items():
        text = text.replace(number, smaller)
    ran, files = 0, []
    for language, title, content in blocks(text):
        if title:
            (tmp_path / title).write_text(content, encoding="utf-8")
            files.append(Path(title).stem)
        elif language == "python":
            exec(compile(content, name, "exec"), {})
        for words in command_lines(content) if language == "sh" else ():
            ran += 1
            if words[0] == "python":
                runpy.run_path(words[1])
                continue
            assert words[0] == "fibopolicy"
            code, _, errors = call(
                monkeypatch, capsys, *words[1:], *SMALLER.get(words[1], "").split()
            )
            assert code == 0, errors
    assert ran > 1
    for module in files:  # another test may have a file of this name
        sys.modules.pop(module, None)


def test_the_table_of_libero_s_tasks_is_that_of_the_result_file() -> None:
    text = (DOCS / "results/libero.md").read_text(encoding="utf-8")
    name = re.search(r"benchmarks/libero_tasks_\S+\.json", text)
    assert name is not None
    result = json.loads((DOCS / name[0]).read_text(encoding="utf-8"))
    for suite, row in result["suites"].items():
        assert (
            sum(task["task"].startswith(f"libero/{suite}/") for task in result["tasks"])
            == (row["tasks"])
        )
        numbers = [row["load_s"], row["restore_s"], row["physics_steps_per_s"], row["steps_per_s"]]
        cells = [
            f"{value:.{digits}f}"
            for value, digits in zip(
                [*numbers, row["peak_memory_gb"]], (1, 2, 0, 1, 2), strict=True
            )
        ]
        assert f"| {suite} | {row['passed']} of {row['tasks']} | {' | '.join(cells)} |" in text


COUNT = re.compile(r"\b(\d+)/(\d+) \[([\d.]+), ([\d.]+)\]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_rates_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    results = [DOCS / path for path in re.findall(r"\(\.\./(benchmarks/\S+\.json)\)", text)]
    runs = [run for path in results for run in json.loads(path.read_text()).get("runs", ())]
    counts = {(run["successes"], run["episodes"]) for run in runs}
    for successes, episodes, low, high in COUNT.findall(text):
        rate = wilson(int(successes), int(episodes))
        assert (low, high) == (
            f"{100 * rate.low:.1f}",
            f"{100 * rate.high:.1f}".replace("100.0", "100"),
        )
        assert not results or (int(successes), int(episodes)) in counts
