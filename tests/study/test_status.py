"""The state of every run, and the time that is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fibopolicy.study.directory import StudyDirectory, write_json
from fibopolicy.study.grid import runs
from fibopolicy.study.records import read_study
from fibopolicy.study.status import seconds_left, status


def test_the_estimate_comes_from_the_finished_runs_and_counts_what_a_run_has_done(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    study = StudyDirectory(tmp_path / "out", finished.config)
    first, second = runs(study.config)
    costs = json.loads(study.done(first).read_text())
    write_json(study.done(first), {**costs, "train_s": 60.0, "evaluate_s": 20.0})

    def left(slots: int = 1) -> float:
        return seconds_left(read_study(study.path), slots)

    assert left() == 0
    study.done(second).unlink()
    assert left() == 0  # its training and its evaluation are complete
    rows = study.run(second) / "episodes.jsonl"
    rows.write_text(rows.read_text().splitlines(True)[0])
    assert left() == 10
    assert "unfinished, 1/2 episodes" in status(read_study(study.path))
    rows.unlink()
    assert left() == 20
    (study.run(second) / "metrics.jsonl").write_text('{"step": 2}\n{"st')
    assert left() == 30 + 20
    assert left(slots=2) == 50
    text = status(read_study(study.path))
    assert "unfinished, step 3/6" in text
    assert "about 50 s left, one run at a time" in text
    study.done(first).unlink()
    assert left() == 0  # nothing is known before the first run is done
    assert "left" not in status(read_study(study.path))
