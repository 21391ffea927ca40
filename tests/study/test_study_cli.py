"""The study commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_study import SOURCE, call

from fibopolicy.study.directory import LOCK, StudyDirectory
from fibopolicy.study.runner import ACTIVITY
from fibopolicy.utils.files import directory_lock


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "2"], "index must be from 0 to 1, got 2"),
        (
            ["--only", "reach__vit_tny__bc__scratch"],
            "did you mean 'reach__vit_tiny__bc__scratch/seed0'",
        ),
        (
            ["--only", "reach__vit_tiny__bc__scratch", "--prepare-only"],
            "--prepare-only is for the whole study",
        ),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--ray", "127.0.0.1:1"], "ray 127.0.0.1:1: does not answer"),
        (["--ray", "127.0.0.1:1", "--jobs", "2"], "--jobs is for this machine only"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    if "--ray" in arguments:
        pytest.importorskip("ray")
    (tmp_path / "my_study.py").write_text(SOURCE)
    out = tmp_path / "out"
    code, _, err = call(
        monkeypatch,
        capsys,
        "study",
        "run",
        str(tmp_path / "my_study.py"),
        "--out",
        str(out),
        *arguments,
    )
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert not out.exists()


def test_one_run_of_an_array_does_not_wait_for_the_whole_study(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    (tmp_path / "my_study.py").write_text(SOURCE)
    command = ["study", "run", str(tmp_path / "my_study.py"), "--out", str(finished.path)]
    with directory_lock(finished.path, LOCK, activity=ACTIVITY):
        code, out, _ = call(monkeypatch, capsys, *command, "--index", "1")
        assert code == 0
        assert "1 of 1 runs done" in out
        code, _, err = call(monkeypatch, capsys, *command)
        assert code == 2
        assert f"process {os.getpid()} on " in err
        assert "is running this study; wait for it, or end it first" in err


def test_a_corrupt_study_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    document = json.loads((finished.path / "study.json").read_text())
    for text in ("{", "[]", json.dumps({**document, "steps": 0}), json.dumps({"name": "x"})):
        (tmp_path / "study.json").write_text(text)
        code, _, err = call(monkeypatch, capsys, "study", "status", str(tmp_path))
        assert code == 2
        assert err.count("\n") == 1, err
