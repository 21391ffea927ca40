"""Runs the command line in the process of the test."""

from __future__ import annotations

import sys

import pytest

from fibopolicy import cli

#: Words of a command line that make an encoder as small as a test needs.
TINY_ENCODER_OPTIONS = [
    "--encoder-options",
    "patch_size",
    "12",
    "width",
    "24",
    "depth",
    "1",
    "num_heads",
    "2",
]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run `fibopolicy ARGUMENTS`; return exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["fibopolicy", *arguments])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
