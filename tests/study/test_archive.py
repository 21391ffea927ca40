"""The archive of a study: small, and still a study."""

from __future__ import annotations

import csv
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import SOURCE, Here, call

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.evaluation.init_states import load_init_states
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.archive import open_study, publish
from fibopolicy.study.directory import StudyDirectory, create_or_extend
from fibopolicy.study.grid import runs
from fibopolicy.study.records import State, record_failure
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_selected

PUBLISHED = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture
def archive(finished: StudyDirectory, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.study.zip"
    publish(finished.path, path)
    return path


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as file:
        return set(file.namelist())


def test_the_archive_gives_the_same_numbers(
    finished: StudyDirectory, archive: Path, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    shutil.copytree(finished.path, original)
    write_report(original)
    page = write_report(archive)
    assert page == tmp_path / "tiny_report" / "report.html"
    assert "../" not in page.read_text()  # the archive lacks the files beside the rows
    for name in ("conditions.csv", "comparisons.csv", "cost.svg", "curves.svg", "differences.svg"):
        there = (original / "report" / name).read_bytes()
        assert (page.parent / name).read_bytes() == there, name
    seeds = [(folder / "seeds.csv").read_text() for folder in (original / "report", page.parent)]
    assert seeds[0] == seeds[1]


def test_the_archive_holds_neither_demonstrations_nor_weights_nor_its_own_path(
    finished: StudyDirectory, archive: Path
) -> None:
    assert {Path(name).suffix for name in names(archive)} == {".json", ".jsonl", ".txt", ".npz"}
    with zipfile.ZipFile(archive) as file:
        contents = [file.read(name) for name in file.namelist()]
    assert not [one for one in contents if str(finished.path).encode() in one]


def test_the_same_study_gives_the_same_bytes(
    finished: StudyDirectory, archive: Path, tmp_path: Path
) -> None:
    before = archive.read_bytes()
    publish(finished.path, archive)
    assert archive.read_bytes() == before
    shutil.copytree(finished.path, tmp_path / "moved")
    publish(tmp_path / "moved", tmp_path / "again.study.zip")
    assert (tmp_path / "again.study.zip").read_bytes() == before


def test_an_unpacked_archive_is_a_study_that_can_be_continued(
    finished: StudyDirectory, archive: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.unpack_archive(archive, copy)
    run, here = runs(finished.config)[1], Here()
    shutil.rmtree(copy / "conditions" / run.name)
    # as a job of an array does
    outcome = run_selected(finished.config, copy, [run.name], here, tmp_path)
    assert (outcome.done, here.executed) == (1, [run.name])
    again, before = (
        read_rows(folder / "episodes.jsonl")
        for folder in (copy / "conditions" / run.name, finished.run(run))
    )
    assert [(row.init_state, row.success, row.steps) for row in again] == [
        (row.init_state, row.success, row.steps) for row in before
    ]


def test_a_failure_is_published_with_its_log(finished: StudyDirectory, tmp_path: Path) -> None:
    study, run = StudyDirectory(tmp_path / "study", finished.config), runs(finished.config)[1]
    archive = tmp_path / "tiny.study.zip"
    shutil.copytree(finished.path, study.path)
    shutil.rmtree(study.run(run))
    study.run_log(run).write_text("Traceback")
    record_failure(study, run, "UserError: the loss diverged", 1)
    publish(study.path, archive)
    with (write_report(archive).parent / "seeds.csv").open() as file:
        found = [(line["state"], line["error"]) for line in csv.DictReader(file)]
    assert found == [("done", ""), ("failed", "UserError: the loss diverged")]
    with zipfile.ZipFile(archive) as file:
        assert file.read(f"conditions/{run.name}.log") == b"Traceback"
    shutil.rmtree(study.path)
    shutil.copytree(finished.path, study.path)
    publish(study.path, archive)  # the run was repeated since
    assert not [name for name in names(archive) if name.endswith("failed.json")]


def test_a_finished_run_without_rows_is_refused_before_anything_is_written(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "study")
    run = runs(finished.config)[1]
    (tmp_path / "study/conditions" / run.name / "episodes.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"seed0: is finished but has no episodes\.jsonl; remove the folder"
    ):
        publish(tmp_path / "study", tmp_path / "tiny.study.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_an_archive_is_brought_up_to_date_and_loses_no_finished_run(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    half, archive = tmp_path / "half", tmp_path / "tiny.study.zip"
    shutil.copytree(finished.path, half)
    run = runs(finished.config)[1]
    (half / "conditions" / run.name / "done.json").unlink()
    publish(half, archive)
    with open_study(archive) as study:
        assert [one.runs[0].state for one in study.conditions] == [State.DONE, State.MISSING]
    publish(finished.path, archive)
    with open_study(archive) as study:
        assert [one.runs[0].state for one in study.conditions] == [State.DONE, State.DONE]
    message = rf"tiny\.study\.zip: holds the finished run {run.name}, which .*half lacks; unpack it"
    with pytest.raises(UserError, match=message):
        publish(half, archive)


def test_it_replaces_no_other_file(finished: StudyDirectory, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file name that ends in \.study\.zip"):
        publish(finished.path, tmp_path / "copy")
    notes = tmp_path / "notes.study.zip"
    notes.write_text("notes")
    with pytest.raises(UserError, match=r"notes\.study\.zip: is not the archive of a study"):
        publish(finished.path, notes)
    with zipfile.ZipFile(notes, "w") as file:
        file.writestr("notes.txt", "notes")
    with pytest.raises(UserError, match=r"is not the archive of a study, it holds no study\.json"):
        publish(finished.path, notes)
    other = create_or_extend(tmp_path / "other", replace(finished.config, steps=7))
    message = r"tiny\.study\.zip: holds a study of another configuration: steps"
    with pytest.raises(UserError, match=message):
        publish(other.path, archive)


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.zip")), ids=lambda path: path.name)
def test_the_published_studies_are_whole(path: Path) -> None:
    with open_study(path) as study:
        assert path.name == f"{study.config.name}.study.zip"
        runs = [run for one in study.conditions for run in one.runs]
        assert {run.state for run in runs} == {State.DONE}
        assert {len(run.rows) for run in runs} == {study.config.episodes}
        for task in study.config.tasks:
            assert len(load_init_states(study.directory.init_states(task))) == study.config.episodes
        for run in runs:
            assert RunDirectory(run.folder).read_metrics()


def test_as_a_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    (tmp_path / "my_study.py").write_text(SOURCE)
    archive = str(tmp_path / "tiny.study.zip")
    command = ("study", "publish", str(finished.path), "--out", archive)
    code, out, _ = call(monkeypatch, capsys, *command)
    assert (code, out) == (0, f"next: fibopolicy study report {archive}\n")
    code, out, _ = call(monkeypatch, capsys, "study", "report", archive)
    assert (code, out) == (0, f"page    {tmp_path / 'tiny_report/report.html'}\n")
    code, out, _ = call(monkeypatch, capsys, "study", "status", archive)
    assert code == 0
    assert "2 runs: 2 done" in out
    code, _, err = call(monkeypatch, capsys, "study", "publish", str(tmp_path), "--out", archive)
    assert code == 2
    assert "is not a study, it has no study.json" in err
