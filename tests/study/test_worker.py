"""A run that fails: the others continue, and its error and log are recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import SMALL, SOURCE, Here, call

from fibopolicy.study import StudyConfig, StudyEncoder
from fibopolicy.study.directory import StudyDirectory, open_directory
from fibopolicy.study.grid import runs
from fibopolicy.study.records import State, failed_attempts, read_run, read_study
from fibopolicy.study.runner import run_study
from fibopolicy.study.status import status

#: Works on the random frames of the checks, and fails in training.
FRAGILE = """
from fibopolicy.encoders.vit import ViT

class Fragile(ViT):
    def forward(self, images):
        if self.training:
            raise OverflowError("out of words")
        return super().forward(images)
"""
#: Killed in training, as by a system that runs out of memory.
KILLED = FRAGILE.replace('raise OverflowError("out of words")', "os.kill(os.getpid(), 9)")


@pytest.fixture
def fragile(with_data: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    encoders = (
        StudyEncoder("fragile:Fragile", SMALL, name="fragile"),
        StudyEncoder("vit_tiny", SMALL),
    )
    return replace(with_data, encoders=encoders)


def test_the_other_runs_continue(fragile: StudyConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for attempt in (1, 2):
        here = Here()
        outcome = run_study(fragile, out, here, tmp_path)
        assert [run.condition.encoder.name for run in outcome.failed] == ["fragile"]
        assert (outcome.total, outcome.done) == (2, 1)
        # what is done is not repeated, what failed is tried again
        assert len(here.executed) == 3 - attempt
        study = open_directory(out)
        broken, sound = runs(fragile)
        failure = json.loads(study.failed(broken).read_text())
        assert failure == {"error": "OverflowError: out of words", "attempts": attempt}
        states = [read_run(study, run).state for run in (broken, sound)]
        assert states == [State.FAILED, State.DONE]
    text = status(read_study(out))
    assert (
        "failed reach__fragile__bc__scratch/seed0 (attempt 2): OverflowError: out of words" in text
    )
    assert "2 runs: 1 done, 1 failed" in text
    assert "failed  reach__fragile__bc__scratch/seed0: OverflowError" in study.log.read_text()


@pytest.mark.slow
def test_the_processes_of_runs_leave_logs_and_the_command_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_data: StudyConfig,
    tmp_path: Path,
) -> None:
    (tmp_path / "fragile.py").write_text(f"import os\n{KILLED}")
    source = SOURCE.replace('"fibottention_vit_tiny"', '"fragile:Fragile"')
    source = source.replace("demos=11", f"dataset={str(with_data.tasks[0].dataset)!r}")
    (tmp_path / "my_study.py").write_text(source)
    out = tmp_path / "out"
    command = ("study", "run", str(tmp_path / "my_study.py"), "--out", str(out), "--jobs", "2")
    code, printed, err = call(monkeypatch, capsys, *command)
    assert code == 2
    assert "1 of 2 runs done" in printed
    assert "1 of 2 runs failed (reach__fragile-Fragile__bc__scratch/seed0)" in err.splitlines()[-1]
    study = open_directory(out)
    broken = runs(study.config)[0]
    assert (
        json.loads(study.failed(broken).read_text())["error"]
        == "its process was killed by signal 9 without an error message"
    )
    assert failed_attempts(study, broken) == 1
    assert "training on 10 demos" in study.run_log(broken).read_text()
    assert f"; log {study.run_log(broken)}" in status(read_study(out))


def test_a_directory_without_a_study_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    code, _, err = call(monkeypatch, capsys, "study", "status", str(tmp_path))
    assert code == 2
    assert "is not a study, it has no study.json" in err
    code, out, _ = call(monkeypatch, capsys, "study", "status", str(finished.path))
    assert code == 0
    assert "2 runs: 2 done" in out
