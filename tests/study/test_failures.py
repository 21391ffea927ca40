"""A cell that fails: the others go on, and it is told with its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import SMALL, SOURCE, Here, call

from fibopolicy.study import StudyConfig, StudyEncoder
from fibopolicy.study.cells import runs
from fibopolicy.study.directory import StudyDirectory, open_directory, state_of
from fibopolicy.study.one_run import attempts_before
from fibopolicy.study.runner import run_study
from fibopolicy.study.status import status

#: Works on the frames that a study tries it on, and fails as soon as it is to learn.
FRAGILE = """
from fibopolicy.encoders.vit import ViT

class Fragile(ViT):
    def forward(self, images):
        if self.training:
            raise OverflowError("out of words")
        return super().forward(images)
"""
#: In the process of a run, and not while it is calibrated, it is killed instead, as by
#: a system without memory.
KILLED = """os.kill(os.getpid(), 9 if "one_run" in sys.argv[0] else 0)
            raise Overflow"""


@pytest.fixture
def fragile(config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    encoders = (
        StudyEncoder("fragile:Fragile", SMALL, name="fragile"),
        StudyEncoder("vit_tiny", SMALL),
    )
    return replace(config, encoders=encoders)


def test_the_other_cells_go_on(fragile: StudyConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for attempt in (1, 2):
        here = Here()
        outcome = run_study(fragile, out, here, tmp_path)
        assert [run.cell.encoder.name for run in outcome.failed] == ["fragile"]
        assert (outcome.total, outcome.done) == (2, 1)
        # what is done is not repeated, what failed is tried again
        assert len(here.carried_out) == 3 - attempt
        study = open_directory(out)
        broken, sound = runs(fragile)
        told = json.loads(study.failed(broken).read_text())
        assert told == {
            "error": "OverflowError: out of words",
            "log": "cells/reach__fragile__bc__scratch/seed0.log",
            "attempts": attempt,
        }
        assert (state_of(study, broken), state_of(study, sound)) == ("failed", "done")
    text = status(study)
    assert (
        "failed reach__fragile__bc__scratch/seed0 (attempt 2): OverflowError: out of words; log "
        in text
    )
    assert "2 runs: 1 done, 1 failed" in text
    assert (
        "reach__fragile__bc__scratch: fails already while it is calibrated: OverflowError"
        in study.log.read_text()
    )


@pytest.mark.slow
def test_processes_of_their_own_leave_logs_and_the_command_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "fragile.py").write_text(
        f"import os\nimport sys\n{FRAGILE.replace('raise Overflow', KILLED)}"
    )
    (tmp_path / "my_study.py").write_text(
        SOURCE.replace('"fibottention_vit_tiny"', '"fragile:Fragile"')
    )
    out = tmp_path / "out"
    code, printed, err = call(
        monkeypatch,
        capsys,
        "study",
        "run",
        str(tmp_path / "my_study.py"),
        "--out",
        str(out),
        "--jobs",
        "2",
    )
    assert code == 2
    assert "1 of 2 runs done" in printed
    assert "1 of 2 runs failed (reach__fragile-Fragile__bc__scratch/seed0)" in err.splitlines()[-1]
    study = open_directory(out)
    broken = runs(study.config)[0]
    assert (
        json.loads(study.failed(broken).read_text())["error"]
        == "its process was killed by signal 9 and left no word"
    )
    assert attempts_before(study, broken) == 1
    assert "training on 10 demos" in study.run_log(broken).read_text()


def test_a_directory_that_is_no_study_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    code, _, err = call(monkeypatch, capsys, "study", "status", str(tmp_path))
    assert code == 2
    assert "is no study, it has no study.json" in err
    code, out, _ = call(monkeypatch, capsys, "study", "status", str(finished.path))
    assert code == 0
    assert "2 runs: 2 done" in out
