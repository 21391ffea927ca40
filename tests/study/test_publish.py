"""A study's copy for others: small, and still a study."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import SOURCE, Here, call

from fibopolicy.errors import UserError
from fibopolicy.evaluation.rows import read_rows
from fibopolicy.study.cells import runs
from fibopolicy.study.directory import StudyDirectory, create_directory
from fibopolicy.study.publish import publish
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_study


@pytest.fixture
def copy(finished: StudyDirectory, tmp_path: Path) -> Path:
    publish(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_copy_gives_the_same_numbers(finished: StudyDirectory, copy: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(finished.path, original)
    write_report(original)
    for name in ("cells.csv", "seeds.csv", "comparisons.csv"):
        assert (copy / "report" / name).read_bytes() == (original / "report" / name).read_bytes()
    assert (copy / "report/report.html").is_file()


def test_the_copy_holds_neither_demonstrations_nor_weights_nor_paths(finished: StudyDirectory, copy: Path) -> None:
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".txt", ".npz", ".csv", ".svg", ".md", ".html"}
    assert not [path for path in files if str(finished.path).encode() in path.read_bytes()]


def test_the_copy_goes_on_where_the_study_was(finished: StudyDirectory, copy: Path) -> None:
    run, here = runs(finished.config)[1], Here()
    shutil.rmtree(copy / "cells" / run.name)
    outcome = run_study(finished.config, copy, here, copy.parent)
    assert (outcome.done, here.carried_out) == (2, [run.name])
    again, before = (read_rows(folder / "episodes.jsonl") for folder in (copy / "cells" / run.name, finished.run(run)))
    assert [(row.start, row.success, row.steps) for row in again] == [(row.start, row.success, row.steps) for row in before]


def test_a_copy_is_brought_up_to_date(finished: StudyDirectory, tmp_path: Path) -> None:
    half, copy = tmp_path / "half", tmp_path / "copy"
    shutil.copytree(finished.path, half)
    (half / "cells/reach__vit_tiny__bc__scratch/seed0/done.json").unlink()
    publish(half, copy)
    assert not (copy / "cells/reach__vit_tiny__bc__scratch/seed0").exists()
    publish(finished.path, copy)
    assert (copy / "cells/reach__vit_tiny__bc__scratch/seed0/done.json").is_file()
    with pytest.raises(
        UserError, match=r"holds reach__vit_tiny__bc__scratch/seed0 finished, which .* lacks; go on from a copy of"
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: StudyDirectory, tmp_path: Path
) -> None:
    (tmp_path / "my_study.py").write_text(SOURCE)
    code, out, _ = call(monkeypatch, capsys, "study", "publish", str(finished.path), "--out", str(tmp_path / "copy"))
    assert (code, out) == (0, f"page    {tmp_path / 'copy/report/report.html'}\n")
    code, _, err = call(monkeypatch, capsys, "study", "publish", str(tmp_path), "--out", str(tmp_path / "copy"))
    assert code == 2
    assert "is no study, it has no study.json" in err
