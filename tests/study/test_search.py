"""A study that chooses the settings of every encoder by an equal search."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SOURCE, Here, Pretending, call

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.evaluation.init_states import load_init_states
from fibopolicy.study import StudyConfig, StudyEncoder, StudyPolicy, StudySearch, runner
from fibopolicy.study.archive import publish
from fibopolicy.study.config import from_json, to_json
from fibopolicy.study.directory import StudyDirectory, open_directory, read_json
from fibopolicy.study.grid import Run, Trial, conditions, runs
from fibopolicy.study.records import DIVERGED, RunRecord, State, ranking, read_study
from fibopolicy.study.report import write_report
from fibopolicy.study.runner import run_selected, run_study
from fibopolicy.study.status import seconds_left, status

DENSE, SPARSE = (f"reach__{name}__bc__scratch" for name in ("vit_tiny", "fibottention_vit_tiny"))
SETTINGS: Any = [{"lr": 1e-3}, {"lr": 2e-3, "steps": 4}, {"lr": 2e-3}]


def search(settings: Any = SETTINGS, **changes: Any) -> StudySearch:
    """Three settings, halved once: five trials."""
    return StudySearch(settings, **{"rungs": ((0.5, 1), (1, 2)), **changes})


@pytest.fixture(scope="module")
def searching(with_data: StudyConfig) -> StudyConfig:
    return replace(with_data, search=search())


@pytest.fixture(scope="module")
def tuned(searching: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """A study whose searches and runs are done; for reading only."""
    out = tmp_path_factory.mktemp("tuned") / "study"
    here = Here()
    outcome = run_study(searching, out, here, out.parent)
    assert (outcome.total, outcome.done, outcome.failed) == (12, 12, ())
    assert len(here.executed) == len(set(here.executed)) == 12
    return StudyDirectory(out, searching)


@pytest.fixture
def copy(tuned: StudyDirectory, tmp_path: Path) -> StudyDirectory:
    shutil.copytree(tuned.path, tmp_path / "study")
    return StudyDirectory(tmp_path / "study", tuned.config)


def test_every_encoder_has_the_same_trials_apart_from_the_results(tuned: StudyDirectory) -> None:
    trials: dict[str, list[Any]] = {}
    for encoder in (DENSE, SPARSE):
        for rung, number in ((0, 0), (0, 1), (0, 2)):
            folder = tuned.path / "conditions" / encoder / f"tuning/rung{rung}_trial{number}"
            trained = json.loads((folder / "config.json").read_text())["train"]
            options = {name: trained["optimizer"][name] for name in ("lr", "steps")}
            rows = [row.init_state for row in read_rows(folder / "episodes.jsonl")]
            trials.setdefault(encoder, []).append((trained["seed"], options, rows))
    assert trials[DENSE] == trials[SPARSE]
    assert [one[1] for one in trials[DENSE]] == [
        {"lr": 1e-3, "steps": 3},
        {"lr": 2e-3, "steps": 2},
        {"lr": 2e-3, "steps": 3},
    ]
    assert {one[0] for one in trials[DENSE]} == {1000}
    (task,) = tuned.config.tasks
    tuning, result = map(load_init_states, (tuned.tuning_states(task), tuned.init_states(task)))
    identities = [{one.identity(i) for i in range(len(one))} for one in (tuning, result)]
    assert trials[DENSE][0][2] == [tuning.identity(0)]
    assert not identities[0] & identities[1]
    for encoder in (DENSE, SPARSE):
        second = [p.name for p in (tuned.path / "conditions" / encoder).glob("tuning/rung1_trial?")]
        assert len(second) == 2


def test_runs_have_the_chosen_settings(tuned: StudyDirectory) -> None:
    for one in read_study(tuned.path).conditions:
        best = ranking(one.rungs[-1])[0]
        assert read_json(tuned.choice(one.condition))["trial"] == best
        assert one.chosen == tuned.config.search.settings[best]  # type: ignore[union-attr]
        trained = json.loads((one.runs[0].folder / "config.json").read_text())["train"]["optimizer"]
        assert {name: trained[name] for name in one.chosen} == one.chosen
        assert one.steps == trained["steps"] == one.runs[0].rows[0].checkpoint_step


def test_the_better_half_has_more_successes_then_the_lower_loss(
    tuned: StudyDirectory, tmp_path: Path
) -> None:
    row = read_rows(tuned.run(runs(tuned.config)[0]) / "episodes.jsonl")[0]

    def trial(number: int, successes: int, loss: float, **costs: str) -> RunRecord:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": loss}))
        rows = tuple(replace(row, index=i, success=i < successes) for i in range(4))
        return RunRecord(0, folder, State.DONE, rows, costs=costs, trial=Trial(0, number))

    rung = [
        trial(0, 3, 0.1, **{DIVERGED: "the loss is nan"}),
        trial(1, 2, 0.3),
        trial(2, 2, 0.2),
        trial(3, 3, 0.9),
        trial(4, 2, 0.2),
    ]
    assert ranking(rung) == [3, 2, 4, 1, 0]
    grid = search({"lr": (1, 2, 3), "ema": (0.9, 0.99, 0.999)}, rungs=((0.1, 1), (0.2, 1), (1, 1)))
    assert grid.settings[1] == {"lr": 1, "ema": 0.99}
    assert grid.sizes == (9, 5, 3)


def test_a_search_resumes_where_it_stopped(copy: StudyDirectory, tuned: StudyDirectory) -> None:
    here = Here()
    assert run_study(copy.config, copy.path, here, copy.path).done == 12
    assert here.executed == []
    dense = conditions(copy.config)[1]
    assert dense.name == DENSE
    choice = copy.choice(dense).read_text()
    copy.choice(dense).unlink()
    shutil.rmtree(copy.run(Run(dense, 0)))
    (second, *_) = copy.path.glob(f"conditions/{DENSE}/tuning/rung1_trial*/done.json")
    second.unlink()
    text = status(read_study(copy.path))
    assert "  4/5 trials  not started" in text
    assert "10 trials: 9 done" in text
    assert seconds_left(read_study(copy.path), 1) > 0
    assert run_study(copy.config, copy.path, here, copy.path).done == 12
    assert here.executed == [f"{DENSE}/tuning/{second.parent.name}", f"{DENSE}/seed0"]
    assert copy.choice(dense).read_text() == choice
    rows = [read_rows(one.run(Run(dense, 0)) / "episodes.jsonl") for one in (copy, tuned)]
    assert [row.repeatable() for row in rows[0]] == [row.repeatable() for row in rows[1]]


def test_jobs_of_an_array_search_first(copy: StudyDirectory) -> None:
    (copy.path / "conditions" / DENSE / "tuning/choice.json").unlink()
    for folder in ("seed0", "tuning/rung0_trial0"):
        shutil.rmtree(copy.path / "conditions" / DENSE / folder)
    here = Here()
    with pytest.raises(UserError, match=rf"seed0: waits for the search .* --only {DENSE}/tuning$"):
        run_selected(copy.config, copy.path, [f"{DENSE}/seed0"], here, copy.path)
    assert here.executed == []
    assert run_selected(copy.config, copy.path, [f"{DENSE}/tuning"], here, copy.path).done == 5
    assert run_selected(copy.config, copy.path, [DENSE], here, copy.path).done == 6
    assert here.executed == [f"{DENSE}/tuning/rung0_trial0", f"{DENSE}/seed0"]


def test_a_trial_that_fails_holds_up_its_condition_and_no_other(
    searching: StudyConfig, tmp_path: Path
) -> None:
    broken = f"{SPARSE}/tuning/rung0_trial1"

    outcome = run_study(searching, tmp_path / "out", Pretending(broken=broken), tmp_path)
    assert [run.name for run in outcome.failed] == [broken]
    assert (outcome.done, outcome.total) == (2 + 5 + 1, 12)
    study = open_directory(tmp_path / "out")
    assert {path.parent.parent.name for path in study.path.rglob("choice.json")} == {DENSE}
    assert not (study.path / "conditions" / SPARSE / "seed0").exists()
    assert f"failed {broken} (attempt 1): OSError: disk" in status(read_study(study.path))


def test_a_trial_that_diverges_has_lost(searching: StudyConfig, tmp_path: Path) -> None:
    wild: Any = [{"lr": 1e9, "grad_clip_norm": 1e9, "steps": 60}, {"lr": 1e-3, "steps": 2}]
    dense = replace(searching.encoders[1])
    one = replace(searching, encoders=(dense,), search=search(wild, rungs=((1, 1),)))
    assert run_study(one, tmp_path / "out", Here(), tmp_path).failed == ()
    (record,) = read_study(tmp_path / "out").conditions
    assert "the loss" in record.rungs[0][0].costs[DIVERGED]
    assert record.chosen == wild[1]
    write_report(tmp_path / "out")
    assert "| diverged |" in (tmp_path / "out/report/report.md").read_text()
    publish(tmp_path / "out", tmp_path / "one.study.zip")


def test_the_report_has_trials_choices_and_costs_and_so_has_the_archive(
    copy: StudyDirectory, tmp_path: Path
) -> None:
    write_report(copy.path)
    archive = tmp_path / "tiny.study.zip"
    publish(copy.path, archive)
    page = write_report(archive)
    for name in ("trials.csv", "seeds.csv"):
        assert (page.parent / name).read_bytes() == (copy.path / "report" / name).read_bytes()
    markdown = (page.parent / "report.md").read_text()
    first = markdown.split("\n\n")[2]
    assert first.startswith("Equal search for every encoder, from 3 settings of lr and steps:")
    assert "3 trials of 50 % of the steps on 1 initial state, 2 of 100 % on 2" in first
    with (page.parent / "trials.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10
    for encoder in ("vit_tiny", "fibottention_vit_tiny"):
        mine = [line for line in lines if line["encoder"] == encoder]
        assert sum(int(line["episodes"]) for line in mine) == 7
        assert f"| Reach, {encoder}, bc, scratch | lr " in markdown
        chosen = {
            (line["setting_lr"], line["setting_steps"]) for line in mine if line["chosen"] == "1"
        }
        assert len(chosen) == 1


def test_an_untuned_encoder_is_marked_and_needs_no_search(copy: StudyDirectory) -> None:
    third = StudyEncoder(
        "vit_tiny", copy.config.encoders[1].options, name="third", untuned="takes long"
    )
    larger = replace(copy.config, encoders=(*copy.config.encoders, third), tuned_for="vit_tiny")
    here = Here()
    run_study(larger, copy.path, here, copy.path)
    assert here.executed == ["reach__third__bc__scratch/seed0"]
    assert "untuned" in status(read_study(copy.path))
    write_report(copy.path)
    markdown = (copy.path / "report/report.md").read_text()
    assert "- third (untuned) against vit_tiny:" in markdown
    assert "third is untuned (takes long) and has the study's settings; these were" in markdown
    assert markdown.count("| third (untuned) |") == 2
    tuned_later = replace(larger, encoders=(*copy.config.encoders, replace(third, untuned="")))
    with pytest.raises(UserError, match="third__bc__scratch/seed0 has begun with tuned = False"):
        run_study(tuned_later, copy.path, here, copy.path)


def test_a_search_that_has_begun_cannot_change_and_new_encoders_get_it(
    copy: StudyDirectory,
) -> None:
    changed = replace(copy.config, search=search(rungs=((0.5, 1), (1, 3))))
    with pytest.raises(UserError, match=r"search\.rungs\[1\]\[1\] = 2 there, 3 now"):
        run_study(changed, copy.path, Here(), copy.path)
    first, second = copy.config.encoders
    shutil.rmtree(copy.run(runs(copy.config)[1]))
    with pytest.raises(UserError, match=r"tuning/rung0_trial0 has begun, and would be left out"):
        run_study(
            replace(copy.config, encoders=(first, replace(second, untuned="no"))),
            copy.path,
            Here(),
            copy.path,
        )
    more = replace(copy.config, encoders=(first, second, replace(second, name="third")))
    run_selected(copy.config, copy.path, [DENSE], Pretending(), copy.path)
    assert run_study(more, copy.path, Pretending(), copy.path).done == 12 + 6


def test_states_of_trials_that_are_states_of_the_result_are_refused(
    searching: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = runner.default_init_states
    monkeypatch.setattr(runner, "default_init_states", lambda env, n, seed: drawn(env, n, 0))
    message = "initial state 0 of the search is initial state 0 of the result"
    with pytest.raises(UserError, match=message):
        run_study(searching, tmp_path / "out", Here(), tmp_path)
    assert not list((tmp_path / "out").rglob("tuning/*"))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {}, "expected at least two settings to try, got 1"),
        ([], {}, "search: settings expected at least one, got none"),
        ([{"lr": 1}], {}, "expected at least two settings to try, got 1"),
        ({"lr": ()}, {}, "search: lr expected at least one, got none"),
        ({"lr": 0.1}, {}, r"search: lr expected a sequence, got 0\.1"),
        ({"lrr": (1, 2)}, {}, "unknown optimizer option of the search: 'lrr': did you mean 'lr'"),
        ([{"lr": 1}, {"hidden": 2}], {}, "unknown optimizer option of the search: 'hidden'"),
        ([{"lr": 1}, {"lr": 1}], {}, "appears twice"),
        ({"vit_tiny": {"lr": (1, 2)}}, {}, "vit_tiny alone would give encoders unequal budgets"),
        ({"vit_tiny": [{"lr": 1}]}, {}, "vit_tiny alone would give encoders unequal budgets"),
        (["lr"], {}, "expected a grid"),
        (SETTINGS, {"rungs": ()}, "expected at least one rung"),
        (SETTINGS, {"rungs": (1, 2)}, r"rungs expected pairs"),
        (SETTINGS, {"rungs": ((0.5, 2), (0.5, 2))}, "share of the steps above 0.5"),
        (SETTINGS, {"rungs": ((0.5, 2), (1, 1))}, "at least 2 initial states"),
        (SETTINGS, {"rungs": ((2, 2),)}, "at most 1"),
        (SETTINGS, {"rungs": ((0.1, 2), (0.5, 2), (1, 2))}, "3 rungs halve 3 settings to one"),
        (SETTINGS, {"seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_what_makes_no_search_is_one_line(
    settings: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        search(settings, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": search(seed=0)}, r"training seed of its search, 0, is among .* \(0,\)"),
        ({"search": search(init_seed=0)}, "initial states of its search overlap"),
        ({"search": search({"lr": (1, 2, -1)})}, "lr must be positive, got -1"),
        ({"tuned_for": "vit_tny"}, "did you mean 'vit_tiny'"),
        ({"encoders": (StudyEncoder("vit_tiny", untuned="x"),)}, "leaves every encoder out"),
        (
            {"encoders": (StudyEncoder("vit_tiny", untuned="x"),), "search": None},
            "vit_tiny is left out of a search that the study does not have",
        ),
    ],
)
def test_a_study_and_its_search_must_fit(
    searching: StudyConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        replace(searching, **{"baseline": "", **changes})


def test_a_search_survives_its_file(searching: StudyConfig) -> None:
    again = from_json(json.loads(json.dumps(to_json(searching))))
    assert again == searching
    policy = StudyPolicy("bc", steps=8)
    assert searching.optimizer_config(policy, {"lr": 1.0}).steps == 8
    assert searching.optimizer_config(policy, {"steps": 3}).steps == 3


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ("", "for which encoder these were chosen is not stated."),
        ("vit_tiny", "these were chosen for vit_tiny."),
    ],
)
def test_a_study_without_a_search_says_for_which_encoder_its_settings_are(
    finished: StudyDirectory, tmp_path: Path, stated: str, sentence: str
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished.path, out)
    run_study(replace(finished.config, tuned_for=stated), out, Here(), out)
    write_report(out)
    first = (out / "report/report.md").read_text().split("\n\n")[2]
    assert first == f"Without a search: all encoders have the same settings; {sentence}"


def test_the_command_counts_searches_and_names_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    copy: StudyDirectory,
    tmp_path: Path,
) -> None:
    document = read_json(copy.path / "study.json")
    source = SOURCE.replace("import StudyConfig", "import StudySearch, StudyConfig").replace(
        " steps=6", f" steps=6, search=StudySearch({SETTINGS}, rungs=((0.5, 1), (1, 2)))"
    )
    source = source.replace("demos=11", f"demos=11, dataset={document['tasks'][0]['dataset']!r}")
    (tmp_path / "my_study.py").write_text(source)
    command = ("study", "run", str(tmp_path / "my_study.py"), "--out", str(copy.path))
    code, out, err = call(monkeypatch, capsys, *command, "--index", "1")
    assert not code, err
    assert (code, out.splitlines()[0]) == (0, f"{copy.path}: 5 of 5 runs done")
    code, out, _ = call(monkeypatch, capsys, *command, "--prepare-only")
    assert (code, out) == (0, f"{copy.path}: prepared, 2 searches and 2 runs\n")
    code, _, err = call(monkeypatch, capsys, *command, "--index", "4")
    assert (code, err.splitlines()[-1]) == (
        2,
        "fibopolicy: error: index must be from 0 to 3, got 4",
    )
