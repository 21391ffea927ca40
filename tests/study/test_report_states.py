"""Reports of studies that are not whole: missing, failed, partial and corrupt runs."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_study import add_cost, begin, describe, fail, finish

from fibopolicy.errors import UserError
from fibopolicy.study.records import read_study
from fibopolicy.study.report import answers, write_report
from fibopolicy.study.results import results

LIFT, PUSH = "fibopolicy/Lift-v0", "fibopolicy/Push-v0"


def solved(rate: float, seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < rate


def lines(study: Path, name: str) -> list[dict[str, str]]:
    with (study / "report" / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Lift: dense with three seeds, fib with two and a failed one, local not begun.
    Push: dense alone, one seed unfinished.
    """
    directory = describe(tmp_path / "partial", [LIFT, PUSH], ["dense", "fib", "local"], episodes=40)
    for seed in range(3):
        finish(begin(directory, LIFT, "dense"), seed, solved(0.7, seed))
    for seed in range(2):
        finish(begin(directory, LIFT, "fib"), seed, solved(0.7, 10 + seed))
        finish(begin(directory, PUSH, "dense"), seed, solved(0.5, 20 + seed))
    fail(begin(directory, LIFT, "fib"), 2, "UserError: the loss is nan at step 7")
    (begin(directory, PUSH, "dense") / "seed2").mkdir()
    return directory


def test_missing_and_failed_runs_are_shown_and_count_nowhere(study: Path) -> None:
    page = write_report(study).read_text()
    markdown = (study / "report" / "report.md").read_text()
    for text in (page, markdown):
        assert "18 runs of 1000 gradient steps, of which 7 are finished" in text
        assert "the loss is nan at step 7" in text
        assert "Push, local, bc, scratch, all seeds" in text
        assert "2 of 3 seeds" in text
        assert "on Push no answer yet" in text
    assert 'href="../conditions/lift__fib__bc__scratch/seed2.log"' in page
    assert (study / "report" / "../conditions/lift__fib__bc__scratch/seed2.log").is_file()
    states = {
        (line["task"], line["encoder"], line["seed"]): line["state"]
        for line in lines(study, "seeds.csv")
    }
    assert states[LIFT, "fib", "2"] == "failed"
    assert states[PUSH, "dense", "2"] == "unfinished"
    assert states[PUSH, "local", "0"] == "not started"
    (compared,) = lines(study, "comparisons.csv")
    assert (compared["baseline_seeds"], compared["candidate_seeds"], compared["init_states"]) == (
        "3",
        "2",
        "40",
    )


def test_a_study_that_has_only_been_described_has_a_report(tmp_path: Path) -> None:
    directory = describe(tmp_path / "empty", [LIFT], ["dense", "fib"])
    page = write_report(directory).read_text()
    assert "no answer yet" in page
    assert "6 runs of 1000 gradient steps, of which 0 are finished" in page
    assert lines(directory, "comparisons.csv") == []
    assert [line["seeds_not_started"] for line in lines(directory, "conditions.csv")] == ["3", "3"]


def test_one_encoder_alone_is_reported_without_comparison(tmp_path: Path) -> None:
    directory = describe(tmp_path / "alone", [LIFT], ["dense"], seeds=[0])
    finish(begin(directory, LIFT, "dense"), 0, solved(0.5, 0))
    assert "no encoder besides dense" in write_report(directory).read_text()


def test_where_the_baseline_solves_nothing_not_inferior_says_nothing(tmp_path: Path) -> None:
    directory = describe(tmp_path / "floor", [LIFT], ["dense", "same", "better"], episodes=100)
    for encoder, rate in (("dense", 0.0), ("same", 0.0), ("better", 0.9)):
        for seed in range(3):
            finish(begin(directory, LIFT, encoder), seed, solved(rate, seed, 100))
    write_report(directory)
    markdown = (directory / "report" / "report.md").read_text()
    assert (
        "same against dense: **untestable** (dense itself solves no more than the margin of"
        " 5 points) on Lift" in markdown
    )
    assert "better against dense: **not inferior** (margin 5 points) on Lift" in markdown
    verdicts = {
        line["candidate"]: (line["verdict"], line["needed_init_states"])
        for line in lines(directory, "comparisons.csv")
    }
    assert verdicts == {"same": ("untestable", ""), "better": ("not inferior", "")}


def test_the_report_says_that_all_runs_of_an_encoder_failed(tmp_path: Path) -> None:
    directory = describe(tmp_path / "failed", [LIFT], ["dense", "nan"], seeds=(0, 1))
    for seed in range(2):
        finish(begin(directory, LIFT, "dense"), seed, solved(0.5, seed))
        fail(begin(directory, LIFT, "nan"), seed, "UserError: the loss is nan")
    text = write_report(directory).read_text()
    assert "nan against dense: no answer: 2 of 2 runs of nan failed, none is finished." in text


def test_a_single_seed_against_several_decides_nothing(tmp_path: Path) -> None:
    directory = describe(tmp_path / "single", [LIFT], ["dense", "fib"])
    finish(begin(directory, LIFT, "dense"), 0, solved(0.2, 0, 100))
    for seed in range(3):
        finish(begin(directory, LIFT, "fib"), seed, solved(0.9, seed, 100))
    text = write_report(directory).read_text()
    assert "fib against dense: <b>undecided</b> on Lift (difference" in text
    assert "one side has a single training seed" in text
    assert "more training seeds: one side has a single one</td>" in text


def test_failed_runs_are_named_in_the_answer_and_it_is_not_marked_good(tmp_path: Path) -> None:
    directory = describe(tmp_path / "survivors", [LIFT], ["dense", "fib"], seeds=range(5))
    for seed in range(5):
        finish(begin(directory, LIFT, "dense"), seed, solved(0.5, seed, 100))
        if seed < 3:
            finish(begin(directory, LIFT, "fib"), seed, solved(0.95, seed, 100))
        else:
            fail(begin(directory, LIFT, "fib"), seed, "Diverged: the loss is nan")
    ((mark, text),) = answers(results(read_study(directory)))
    assert "**not inferior**" in text
    assert text.endswith("Caveat: 2 of 5 runs of fib failed and are not counted.")
    assert mark == "open"


def test_a_ratio_is_of_the_same_task(tmp_path: Path) -> None:
    directory = describe(tmp_path / "ratio", [LIFT, PUSH], ["dense", "fib"], seeds=(0,))
    for task, speed in ((LIFT, 4.0), (PUSH, 1.0)):
        for encoder, times in (("dense", 1.0), ("fib", 1.5)):
            condition = begin(directory, task, encoder)
            # it is missing, so that medians over all runs would say the opposite
            if (task, encoder) != (LIFT, "fib"):
                finish(condition, 0, solved(0.5, 0), speed=speed * times)
    write_report(directory)
    assert "| 630 (1.50x) |" in (directory / "report" / "report.md").read_text()


def test_a_task_at_the_floor_leaves_the_mean_untested(tmp_path: Path) -> None:
    directory = describe(
        tmp_path / "mean", [LIFT, PUSH], ["dense", "worse"], episodes=100, margin=0.05
    )
    for task, rates in ((LIFT, (0.9, 0.82)), (PUSH, (0.0, 0.0))):
        for encoder, rate in zip(("dense", "worse"), rates, strict=True):
            for seed in range(3):
                finish(begin(directory, task, encoder), seed, solved(rate, seed, 100))
    write_report(directory)
    verdicts = {line["task"]: line["verdict"] for line in lines(directory, "comparisons.csv")}
    assert verdicts[PUSH] == verdicts["mean over tasks"] == "untestable"
    assert verdicts[LIFT] in ("undecided", "inferior")


def test_the_report_says_why_a_task_has_no_comparison(study: Path) -> None:
    fail(begin(study, PUSH, "fib"), 0)
    assert (
        "on Push no answer yet: 1 of 3 runs of fib failed, none is finished"
        in write_report(study).read_text()
    )


def test_costs_that_differ_by_task_are_all_shown_and_runs_with_their_range(tmp_path: Path) -> None:
    directory = describe(tmp_path / "costs", [LIFT, PUSH], ["dense"], seeds=(0, 1))
    for task, parameters in ((LIFT, 1000), (PUSH, 2000)):
        condition = begin(directory, task, "dense")
        add_cost(condition, encoder_parameters=parameters)
        for seed in range(2):
            finish(condition, seed, solved(0.5, seed), speed=1.0 + seed)
    write_report(directory)
    markdown = (directory / "report" / "report.md").read_text()
    assert "| dense | 1000 / 2000 |" in markdown
    assert "| 630 [420, 840] |" in markdown


def test_a_corrupt_row_file_is_named_and_its_run_does_not_count(study: Path) -> None:
    rows = begin(study, LIFT, "fib") / "seed1" / "episodes.jsonl"
    rows.write_text(rows.read_text().replace('"success": ', '"success"', 1))
    with pytest.warns(UserWarning, match=r"seed1/episodes\.jsonl: line 1 is not an episode row"):
        page = write_report(study).read_text()
    assert (
        "conditions/lift__fib__bc__scratch/seed1/episodes.jsonl: line 1 is not an episode row"
        in page
    )
    assert "unreadable" in page


def test_rows_of_another_task_or_step_do_not_count(study: Path) -> None:
    finish(begin(study, LIFT, "fib"), 0, solved(0.9, 0), task=PUSH)
    finish(begin(study, LIFT, "fib"), 1, solved(0.9, 0), checkpoint_step=500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_report(study)
    assert any(f"holds episodes of {PUSH}, expected {LIFT}" in str(one.message) for one in caught)
    assert any("holds no evaluation with step 1000" in str(one.message) for one in caught)
    assert lines(study, "comparisons.csv") == []


def test_further_evaluations_of_a_run_change_nothing(study: Path) -> None:
    write_report(study)
    before = lines(study, "seeds.csv")
    path = begin(study, LIFT, "fib") / "seed0" / "episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    others = [{"max_steps": 7}, {"quality": "full"}, {"checkpoint": "model"}, {"index": len(rows)}]
    more = [rows[0] | {"success": not rows[0]["success"]} | other for other in others]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    write_report(study)
    assert lines(study, "seeds.csv") == before


def test_initial_states_where_a_simulator_failed_or_that_one_side_lacks_are_left_out(
    study: Path,
) -> None:
    rows = begin(study, LIFT, "dense") / "seed0" / "episodes.jsonl"
    first, *others = map(json.loads, rows.read_text().splitlines())
    rows.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [first | {"error": "unstable", "success": False}, *others[:-1]]
        )
    )
    page = write_report(study).read_text()
    (compared,) = lines(study, "comparisons.csv")
    assert compared["init_states"] == "38"
    assert "38 of 40 initial states" in page
    assert "1 episode with a simulator error" in page


def test_two_seeds_of_the_same_weights_are_refused(study: Path) -> None:
    finish(begin(study, LIFT, "dense"), 1, solved(0.7, 1), policy="same")
    finish(begin(study, LIFT, "dense"), 2, solved(0.7, 2), policy="same")
    with pytest.raises(UserError, match=r"seed1.*seed2 hold the same weights"):
        write_report(study)


def test_initial_states_that_are_not_shared_are_reported(study: Path) -> None:
    for seed in range(2):
        rows = begin(study, LIFT, "fib") / f"seed{seed}" / "episodes.jsonl"
        rows.write_text(rows.read_text().replace(f'"init_state": "{LIFT}', '"init_state": "other'))
    page = write_report(study).read_text()
    assert "fib against dense on Lift, bc, scratch: 0 initial states are shared" in page


def test_a_directory_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study\.json"):
        write_report(tmp_path)
    directory = describe(tmp_path / "corrupt", [LIFT], ["dense", "fib"], margin=5)
    with pytest.raises(UserError, match="margin must lie between 0 and 1"):
        write_report(directory)
    describe(directory, [LIFT], ["dense", "fib"], baseline="dance")
    with pytest.raises(
        UserError, match=r"unknown encoder as the baseline 'dance'.* known: dense, fib"
    ):
        write_report(directory)
    (directory / "study.json").write_text('{"tasks": [')
    with pytest.raises(UserError, match=r"study\.json: is not valid JSON"):
        write_report(directory)
    (directory / "study.json").write_text('{"tasks": []}')
    with pytest.raises(UserError, match=r"is not the configuration of a study.*encoders"):
        write_report(directory)
    assert not (directory / "report").exists()


def test_a_report_can_be_written_again_and_says_the_same(study: Path) -> None:
    add_cost(begin(study, LIFT, "dense"))
    first = write_report(study).read_bytes()
    shutil.rmtree(study / "report")
    assert write_report(study).read_bytes() == first
    fail(begin(study, PUSH, "dense"), 2)
    assert write_report(study).read_bytes() != first


def test_without_a_margin_only_differences_are_reported(study: Path) -> None:
    document = json.loads((study / "study.json").read_text()) | {"margin": None}
    (study / "study.json").write_text(json.dumps(document))
    page = write_report(study).read_text()
    assert "fib against dense: <b>no difference shown</b>" in page
    assert "inferior" not in page
