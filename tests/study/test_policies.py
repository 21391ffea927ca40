"""Policies with other settings, from the study to its report."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_study import STEPS, simulate
from tiny_study import Here

from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.study import StudyPolicy, StudyTask, report
from fibopolicy.study.directory import StudyDirectory, open_directory, write_json
from fibopolicy.study.grid import runs
from fibopolicy.study.records import read_study
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_study
from fibopolicy.study.status import status

LIFT, PUSH = "fibopolicy/Lift-v0", "fibopolicy/Push-v0"
GMM = {
    "policy": "bc_gmm",
    "policy_config": {"horizon": 8, "policy_options": {"min_std": 0.05}},
    "optimizer": {"batch_size": 16},
    "steps": 2000,
    "name": "gmm: 8",
}


def test_two_policies_with_other_settings_run_to_their_report(
    finished: StudyDirectory, tmp_path: Path
) -> None:
    (task,) = finished.config.tasks
    own = StudyPolicy("bc_gmm", {"policy_options": {"min_std": 0.05}}, {"batch_size": 4}, steps=7)
    config = replace(
        finished.config,
        tasks=(StudyTask("reach", dataset=finished.dataset(task), max_steps=task.max_steps),),
        encoders=finished.config.encoders[1:],
        policies=("bc", own),
    )
    out = tmp_path / "out"
    assert run_study(config, out, Here(), tmp_path).done == 2
    study = open_directory(out)
    assert study.config == config
    for run, steps, batch in zip(runs(config), (6, 7), (8, 4), strict=True):
        assert {row.checkpoint_step for row in read_rows(study.run(run) / "episodes.jsonl")} == {
            steps
        }
        done = json.loads(study.done(run).read_text())
        assert done["steps"] == steps
        assert done["train_s"] == pytest.approx(steps * batch / done["samples_per_s"])
    assert "/2 successes" in status(read_study(study.path))
    page = write_report(out)
    assert (
        "2 runs of 6 gradient steps with bc, 7 with bc_gmm, of which all are finished"
        in page.read_text()
    )
    assert run_study(config, out, Here(), tmp_path).done == 2
    for run in runs(config):
        study.done(run).unlink()
        (study.run(run) / "episodes.jsonl").unlink()
    assert re.findall(r"unfinished, step (\d/\d)", status(read_study(study.path))) == ["6/6", "7/7"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policies") / "study"
    logits = {task: {"dense": 1.0, "fib": 1.2} for task in (LIFT, PUSH)}
    simulate(
        directory,
        logits,
        rng=np.random.default_rng(0),
        policies=("bc", GMM),
        seeds=(0, 1),
        episodes=30,
    )
    document = json.loads((directory / "study.json").read_text())
    write_json(
        directory / "study.json",
        document
        | {"policy_config": {"views": "joint", "horizon": 4}, "optimizer": {"batch_size": 32}},
    )
    write_report(directory)
    return directory


def test_policies_are_an_axis_by_name_and_keep_their_steps(study: Path) -> None:
    found = read_study(study)
    assert found.policies == ("bc", "gmm: 8")
    assert {one.policy: one.steps for one in found.conditions} == {"bc": STEPS, "gmm: 8": 2000}
    assert all(len(one.done) == 2 for one in found.conditions)
    markdown = (study / "report/report.md").read_text()
    assert (
        "16 runs of 1000 gradient steps with bc, 2000 with gmm: 8, of which all are finished"
        in markdown
    )
    assert {path.name for path in (study / "report").glob("*.svg")} >= {
        "curves_bc_scratch.svg",
        "curves_gmm--8_scratch.svg",
    }


def test_one_table_per_task_has_every_policy_and_encoder(study: Path) -> None:
    markdown = (study / "report/report.md").read_text()
    page = (study / "report/report.html").read_text().replace("&nbsp;", " ")
    with (study / "report/conditions.csv").open(newline="") as file:
        rates = {
            (line["task"], line["policy"], line["encoder"]): line for line in csv.DictReader(file)
        }
    for task, title in ((LIFT, "Lift"), (PUSH, "Push")):
        expected = [
            f"### {title}",
            "",
            "| success, % | dense (baseline) | fib |",
            "| --- | ---: | ---: |",
        ]
        for policy in ("bc", "gmm: 8"):
            lines = [rates[task, policy, encoder] for encoder in ("dense", "fib")]
            shown = [
                "{:.1f} [{:.1f}, {:.1f}]".format(
                    *(100 * float(line[name]) for name in ("success_rate", "low_95", "high_95"))
                )
                for line in lines
            ]
            expected.append(f"| {policy} | {shown[0]} | {shown[1]} |")
            assert all(f">{one}<" in page for one in shown)
        assert "\n".join(expected) in markdown
    mean = np.mean([float(rates[task, "bc", "fib"]["success_rate"]) for task in (LIFT, PUSH)])
    assert re.search(
        rf"### Mean over tasks\n\n.*\n.*\n\| bc \| [\d.]+ \| {100 * mean:.1f} \|", markdown
    )


def test_the_report_says_how_each_policy_was_trained(study: Path) -> None:
    markdown = (study / "report/report.md").read_text()
    assert "| bc | 1000 | views joint, horizon 4 | batch_size 32 |" in markdown
    assert (
        "| gmm: 8 = bc_gmm | 2000 | views joint, horizon 8, min_std 0.05 | batch_size 16 |"
        in markdown
    )


def test_learning_curves_end_where_the_training_of_each_policy_ends(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[float] = []
    monkeypatch.setattr(
        report,
        "plot_learning_curves",
        lambda curves, *_: ends.append(curves["Lift"]["training loss"]["fib"].step.max()),
    )
    report._learning_curves(read_study(study), tmp_path)
    assert ends == [pytest.approx(STEPS, rel=0.02), pytest.approx(2000, rel=0.02)]
