"""A study from its file to its rows, interrupted, resumed and extended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SOURCE, Here, Pretending, call

from fibopolicy.datasets.shards import shards_folder
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.study import StudyConfig, StudyPolicy
from fibopolicy.study.directory import StudyDirectory, create_or_extend, open_directory
from fibopolicy.study.grid import runs
from fibopolicy.study.records import read_study
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_selected, run_study
from fibopolicy.study.status import status
from fibopolicy.utils.files import directory_lock


def test_a_study_leaves_the_documented_directory(finished: StudyDirectory) -> None:
    path = finished.path
    for name in (
        "study.json",
        "environment.json",
        "study.log",
        "study.lock",
        "data/reach.hdf5",
        "init_states/reach.npz",
    ):
        assert (path / name).is_file(), name
    assert open_directory(path).config == finished.config
    assert {p.name for p in (path / "conditions").iterdir()} == {
        "reach__fibottention_vit_tiny__bc__scratch",
        "reach__vit_tiny__bc__scratch",
    }
    done = json.loads(
        (path / "conditions/reach__vit_tiny__bc__scratch/seed0/done.json").read_text()
    )
    assert (done["steps"], done["episodes"]) == (6, 2)
    assert all(
        done[key] > 0
        for key in ("train_s", "evaluate_s", "samples_per_s", "peak_mb", "rollout_steps_per_s")
    )


def test_every_condition_is_evaluated_on_the_same_initial_states(finished: StudyDirectory) -> None:
    init_states = [
        [row.init_state for row in read_rows(finished.run(run) / "episodes.jsonl")]
        for run in runs(finished.config)
    ]
    assert len(init_states[0]) == 2
    assert init_states[0] == init_states[1]
    assert {
        row.checkpoint_step
        for run in runs(finished.config)
        for row in read_rows(finished.run(run) / "episodes.jsonl")
    } == {6}


def test_a_second_start_repeats_nothing(finished: StudyDirectory) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.path.rglob("*")
        if path.suffix not in (".log", ".lock")
    }
    here = Here()
    outcome = run_study(finished.config, finished.path, here, finished.path)
    assert outcome.done == 2
    assert here.executed == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_is_refused_with_its_difference(finished: StudyDirectory) -> None:
    for changes, message in (
        ({"steps": 7}, "steps = 6 there, 7 now"),
        ({"policy_config": {"hidden": 33}}, r"policy_config\.hidden = 32 there, 33 now"),
        ({"seeds": (0, 1), "steps": 7}, "configuration: steps = 6 there, 7 now"),
        (
            {"seeds": (1,)},
            r"seeds\[0\] = 0 there, 1 now; reach__fib.*/seed0 has begun, and would be left out",
        ),
        (
            {"policies": (StudyPolicy("bc", steps=7),)},
            r"steps = None there, 7 now; .*/seed0 has begun with optimizer\.steps = 6 there, 7 now",
        ),
        (
            {"tasks": (replace(finished.config.tasks[0], demos=12),)},
            "demos = 11 there, 12 now; the data of reach exist already",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run_study(replace(finished.config, **changes), finished.path, Here(), finished.path)


def test_an_extended_study_repeats_nothing(finished: StudyDirectory, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished.path, out)
    dense, sparse = (
        f"reach__{encoder}__bc__scratch" for encoder in ("vit_tiny", "fibottention_vit_tiny")
    )
    before = {
        path: path.read_bytes() for path in out.glob("conditions/*/seed0/*") if path.is_file()
    }
    first, second = finished.config.encoders
    wider = replace(second, options={**second.options, "width": 32}, name="wider")
    larger = replace(finished.config, seeds=(0, 1), encoders=(first, second, wider))
    with pytest.raises(UserError, match="another configuration"):
        run_selected(
            larger, out, [f"{dense}/seed1"], Here(), out
        )  # beside a job that may be running
    here = Pretending()
    assert run_study(larger, out, here, out).done == 6
    wide = "reach__wider__bc__scratch"
    assert here.executed == [
        f"{wide}/seed0",
        f"{sparse}/seed1",
        f"{dense}/seed1",
        f"{wide}/seed1",
    ]
    assert {path: path.read_bytes() for path in before} == before
    assert open_directory(out).config == larger
    assert "wider is vit_tiny with width 32" in (out / "checks.txt").read_text()
    assert (out / "conditions" / wide / "cost.json").is_file()
    assert (
        "the study changes: encoders = [fibottention_vit_tiny, vit_tiny] there"
        in (out / "study.log").read_text()
    )


def test_a_study_tells_that_seeds_were_added_to_results(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished.path, out)
    before = write_report(out).read_text()
    for seeds in ((0, 1), (0, 1, 2)):  # the second time, there are no further results
        create_or_extend(out, replace(finished.config, seeds=seeds))
    assert read_study(out).seeds_before_extension == (1,)
    assert "Seeds were added when the results of 1 could be read" in write_report(out).read_text()
    assert "Seeds were added" not in before


def test_an_extension_keeps_what_has_begun(config: StudyConfig, tmp_path: Path) -> None:
    reach = replace(config.tasks[0], demos=2)
    first = replace(
        config,
        tasks=(reach, replace(reach, task="Push-v0")),
        optimizer={**config.optimizer, "betas": (0.9, 0.9)},
    )
    study = create_or_extend(tmp_path, first)
    for done in (study.init_states(reach), study.run(runs(first)[0]) / "config.json"):
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
    pushing = shards_folder(study.dataset(first.tasks[1]))
    pushing.mkdir(parents=True)
    (pushing / "plan.json").touch()
    with pytest.raises(UserError, match=r"reach__.* has begun, and would be left out"):
        create_or_extend(tmp_path, replace(first, tasks=first.tasks[1:]))
    shutil.rmtree(study.run(runs(first)[0]))
    # they would be taken for those of a later task
    with pytest.raises(UserError, match="the data of reach exist already"):
        create_or_extend(tmp_path, replace(first, tasks=first.tasks[1:]))
    lock = study.run_lock(runs(first)[1])
    with (
        directory_lock(lock.parent, lock.name),
        pytest.raises(UserError, match=r"has begun with optimizer\.steps = 6 there, 7 now"),
    ):
        create_or_extend(tmp_path, replace(first, policies=(StudyPolicy("bc", steps=7),)))
    other = replace(first, tasks=(reach, replace(first.tasks[1], image_size=36)), seeds=(0, 1))
    create_or_extend(tmp_path, other)
    assert open_directory(tmp_path).config.seeds == (0, 1)
    assert not pushing.exists()


def test_what_has_not_begun_may_be_replaced(finished: StudyDirectory, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished.path, out)
    first, second = finished.config.encoders
    gone, kept = (
        StudyDirectory(out, finished.config).condition(run.condition)
        for run in runs(finished.config)
    )
    shutil.rmtree(gone / "seed0")
    changed = replace(finished.config, encoders=(second, replace(first, name="again")))
    here = Pretending()
    run_study(changed, out, here, out)
    assert here.executed == ["reach__again__bc__scratch/seed0"]
    assert kept.exists()
    assert not gone.exists()


def test_a_folder_with_something_else_is_left_alone(config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        run_study(config, tmp_path, Here(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_status_names_what_is_done(finished: StudyDirectory) -> None:
    text = status(read_study(finished.path))
    assert "2 runs: 2 done; no runner is active" in text
    assert "/2 successes" in text


def test_only_the_selected_runs_are_executed(config: StudyConfig, finished: StudyDirectory) -> None:
    here = Here()
    run_selected(config, finished.path, ["reach__vit_tiny__bc__scratch"], here, finished.path)
    assert here.executed == []
    with pytest.raises(UserError, match="did you mean 'reach__vit_tiny__bc__scratch/seed0'"):
        run_selected(
            config, finished.path, ["reach__vit_tiny__bc__scratch/seed1"], here, finished.path
        )


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for processes in /proc")
def test_a_killed_study_resumes_and_ends_with_the_same_rows(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: StudyDirectory,
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "my_study.py", tmp_path / "out"
    data = finished.dataset(finished.config.tasks[0])
    source.write_text(SOURCE.replace("demos=11", f"dataset={str(data)!r}"))
    command = ["study", "run", str(source), "--out", str(out), "--jobs", "1"]
    first = subprocess.Popen(
        [sys.executable, "-m", "fibopolicy", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "conditions/reach__fibottention_vit_tiny__bc__scratch/seed0/metrics.jsonl"
    while not metrics.exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot be done before the second start looks
    code, _, err = call(monkeypatch, capsys, *command)
    assert code == 2
    assert f"process {first.pid} on" in err
    assert err.count("\n") == 1, err
    # the process of its run ends without it, and the next start waits for that
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    names: dict[str, Any] = {}
    exec(source.read_text(), names)
    assert run_study(names["study"](), out, Here(), tmp_path).done == 2
    study = open_directory(out)
    for run in runs(finished.config):
        mine, theirs = (read_rows(one.run(run) / "episodes.jsonl") for one in (study, finished))
        assert [row.repeatable() for row in mine] == [row.repeatable() for row in theirs]
