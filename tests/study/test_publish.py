"""A study's copy for others: small, and still a study."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import SOURCE, Here, call

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.study.cells import runs
from fibopolicy.study.directory import StudyDirectory, create_directory
from fibopolicy.study.one_run import fail
from fibopolicy.study.publish import publish
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_some
from fibopolicy.utils.files import directory_lock


@pytest.fixture
def copy(finished: StudyDirectory, tmp_path: Path) -> Path:
    publish(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_copy_gives_the_same_numbers(
    finished: StudyDirectory, copy: Path, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    shutil.copytree(finished.path, original)
    write_report(original)
    for name in ("cells.csv", "seeds.csv", "comparisons.csv"):
        assert (copy / "report" / name).read_bytes() == (original / "report" / name).read_bytes()
    assert (copy / "report/report.html").is_file()


def test_the_copy_holds_neither_demonstrations_nor_weights_nor_its_own_path(
    finished: StudyDirectory, copy: Path
) -> None:
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        ".json",
        ".jsonl",
        ".txt",
        ".npz",
        ".csv",
        ".svg",
        ".md",
        ".html",
    }
    assert not [path for path in files if str(finished.path).encode() in path.read_bytes()]


def test_the_copy_goes_on_where_the_study_was(finished: StudyDirectory, copy: Path) -> None:
    run, here = runs(finished.config)[1], Here()
    shutil.rmtree(copy / "cells" / run.name)
    # as a job of an array does
    outcome = run_some(finished.config, copy, [run.name], here, copy.parent)
    assert (outcome.done, here.carried_out) == (1, [run.name])
    again, before = (
        read_rows(folder / "episodes.jsonl")
        for folder in (copy / "cells" / run.name, finished.run(run))
    )
    assert [(row.start, row.success, row.steps) for row in again] == [
        (row.start, row.success, row.steps) for row in before
    ]
    with pytest.raises(UserError, match=f"is no mere copy, {run.name} was begun there"):
        publish(finished.path, copy)


def test_a_copy_that_is_at_work_stays(finished: StudyDirectory, copy: Path) -> None:
    with (
        directory_lock(copy, "study.lock", activity="running this study"),
        pytest.raises(UserError, match="a study is at work there"),
    ):
        publish(finished.path, copy)


def test_a_failure_is_published_with_its_log(finished: StudyDirectory, tmp_path: Path) -> None:
    study, run = StudyDirectory(tmp_path / "study", finished.config), runs(finished.config)[1]
    shutil.copytree(finished.path, study.path)
    shutil.rmtree(study.run(run))
    study.run(run).mkdir()
    study.run_log(run).write_text("Traceback")
    fail(study, run, "UserError: the loss diverged", 1)
    publish(study.path, tmp_path / "copy")
    with (tmp_path / "copy/report/seeds.csv").open() as file:
        told = [(line["state"], line["error"]) for line in csv.DictReader(file)]
    assert told == [("done", ""), ("failed", "UserError: the loss diverged")]
    assert (tmp_path / "copy/cells" / f"{run.name}.log").read_text() == "Traceback"
    shutil.rmtree(study.path)
    shutil.copytree(finished.path, study.path)
    publish(study.path, tmp_path / "copy")  # it was done over since
    assert not list((tmp_path / "copy").rglob("failed.json"))


def test_a_finished_run_without_rows_is_told_before_anything_is_written(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "study")
    (tmp_path / "study/cells/reach__vit_tiny__bc__scratch/seed0/episodes.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"seed0: is finished but has no episodes\.jsonl; remove the folder"
    ):
        publish(tmp_path / "study", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_is_brought_up_to_date(finished: StudyDirectory, tmp_path: Path) -> None:
    half, copy = tmp_path / "half", tmp_path / "copy"
    shutil.copytree(finished.path, half)
    (half / "cells/reach__vit_tiny__bc__scratch/seed0/done.json").unlink()
    publish(half, copy)
    assert not (copy / "cells/reach__vit_tiny__bc__scratch/seed0").exists()
    (copy / "README.md").write_text("mine")
    (copy / "cells/push__vit_tiny__bc__scratch").mkdir()
    publish(finished.path, copy)
    assert (copy / "cells/reach__vit_tiny__bc__scratch/seed0/done.json").is_file()
    assert (copy / "README.md").read_text() == "mine"
    # the study has no such cell any more
    assert not (copy / "cells/push__vit_tiny__bc__scratch").exists()
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(
        UserError,
        match=(
            r"holds reach__vit_tiny__bc__scratch/seed0 finished, which .* lacks; go on from a"
            r" copy of"
        ),
    ):
        publish(half, copy)


def test_it_takes_no_other_folder(finished: StudyDirectory, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies in the study itself"):
        publish(finished.path, finished.path / "copy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("notes")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        publish(finished.path, tmp_path / "mine")
    other = create_directory(tmp_path / "other", replace(finished.config, steps=7))
    with pytest.raises(UserError, match=r"holds a study of another configuration: steps"):
        publish(other.path, copy)


def test_as_a_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    (tmp_path / "my_study.py").write_text(SOURCE)
    code, out, _ = call(
        monkeypatch, capsys, "study", "publish", str(finished.path), "--out", str(tmp_path / "copy")
    )
    assert (code, out) == (0, f"page    {tmp_path / 'copy/report/report.html'}\n")
    code, _, err = call(
        monkeypatch, capsys, "study", "publish", str(tmp_path), "--out", str(tmp_path / "copy")
    )
    assert code == 2
    assert "is no study, it has no study.json" in err
