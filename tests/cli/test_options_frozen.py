"""Commands and options are frozen in `options.txt`, so that adding one is a decision.

`python tests/cli/test_options_frozen.py` writes the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fibopolicy import cli

FROZEN = Path(__file__).with_name("options.txt")


def help_of(command: list[str]) -> str:
    """The text that tyro prints for `--help`."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.parse([*command, "--help"])
    printed.seek(0)
    return printed.read()


def describe(command: list[str]) -> Iterator[str]:
    """One line per command, followed by one per argument."""
    usage, *lines = help_of(command).splitlines()
    yield " ".join(command)
    for line in lines:
        if found := re.match(r"  ((?:--|[A-Z]|\[\[)\S*(?: \S+)*)", line):
            yield f"    {found[1]}"
    subcommands = re.search(r"\{([a-z,]+)\}$", usage)
    for name in subcommands[1].split(",") if subcommands else ():
        yield from describe([*command, name])


def current() -> str:
    os.environ["COLUMNS"] = "100"
    return "\n".join(line for name in cli.COMMANDS for line in describe([name])) + "\n"


def test_commands_and_options_are_those_of_the_frozen_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert current() == FROZEN.read_text(encoding="utf-8"), (
        "the options of the command line changed; if this is intended, run"
        " `python tests/cli/test_options_frozen.py` and commit options.txt"
    )


if __name__ == "__main__":
    FROZEN.write_text(current(), encoding="utf-8")
