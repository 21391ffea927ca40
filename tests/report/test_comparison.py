from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_rows import make_run

from fibopolicy.cli.evaluate import Compare, Results, read_methods
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Selector, read_rows, write_rows
from fibopolicy.evaluation.side_by_side import alternate
from fibopolicy.report.comparison import power_rows, text
from fibopolicy.statistics.compare import Comparison, compare
from fibopolicy.statistics.differences import Difference


def of(
    *runs: Path, groups: tuple[str, ...] = (), margin: float | None = None, **choice: object
) -> Comparison:
    return compare(read_methods(runs, groups, Selector(**choice)), margin)  # type: ignore[arg-type]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """60 initial states: both solve 40, the baseline alone 2, the candidate alone 12."""
    baseline = make_run(tmp_path / "baseline", [True] * 42 + [False] * 18)
    candidate = make_run(
        tmp_path / "candidate", [True] * 40 + [False] * 2 + [True] * 12 + [False] * 6
    )
    return baseline, candidate


def test_rows_are_paired_by_initial_state_and_not_by_order_or_index(
    pair: tuple[Path, Path],
) -> None:
    rows = read_rows(pair[1] / "episodes.jsonl")
    write_rows(pair[1] / "episodes.jsonl", [replace(row, index=99 - row.index) for row in rows])
    found = of(*pair).candidates[0]
    assert found.difference.discordant == (2, 12)
    assert found.difference.value == pytest.approx(10 / 60)
    assert found.p == pytest.approx(0.0129, abs=1e-4)
    assert found.verdict == "better"


def test_only_shared_initial_states_count_and_the_rest_is_reported(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    longer = make_run(tmp_path / "longer", [True] * 80)
    found = of(pair[0], longer)
    assert len(found.init_states) == 60
    assert found.left_out == 20
    assert found.rates[1].episodes == 60
    assert "left out: 20 that some run lacks" in text(found, ())


def test_errors_count_in_no_rate_and_are_reported(pair: tuple[Path, Path]) -> None:
    rows = read_rows(pair[1] / "episodes.jsonl")
    write_rows(
        pair[1] / "episodes.jsonl",
        [
            replace(row, success=False, error="hung") if row.index in (0, 59) else row
            for row in rows
        ],
    )
    found = of(*pair)
    assert found.faulty == 2
    assert [(rate.successes, rate.episodes) for rate in found.rates] == [(41, 58), (51, 58)]
    assert found.methods[1].errors == 2
    assert "left out: 2 with a simulator error in some run" in text(found, ())
    faulty = make_run(pair[0].parent / "faulty", [False] * 60, error="hung")
    with pytest.raises(UserError, match="0 initial states are shared without a simulator error"):
        of(pair[0], faulty)
    with pytest.raises(UserError, match=r"faulty: step .*: none of 60 episodes"):
        Results(runs=(pair[0], faulty)).run()
    out = pair[0].parent / "results.json"
    Results(runs=pair, out=out).run()
    stored = json.loads(out.read_text())["runs"][1]
    assert stored["success"][0] is None
    assert stored["success"].count(1) == stored["successes"] == 51
    assert len(stored["success"]) - stored["success"].count(None) == stored["episodes"] == 58


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "fibopolicy/Push-v0"},
            r"has task fibopolicy/Lift-v0, .*has task fibopolicy/Push-v0; compare",
        ),
        ({"max_steps": 50}, "has max_steps 50; compare evaluations of one task and max_steps"),
    ],
)
def test_other_tests_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        of(pair[0], make_run(tmp_path / "other", [True] * 60, **changes))


def test_unpaired_rows_are_refused_in_one_line(pair: tuple[Path, Path]) -> None:
    write_rows(
        pair[1] / "episodes.jsonl",
        [
            replace(row, init_state="x" + row.init_state, init_seed=5)
            for row in read_rows(pair[1] / "episodes.jsonl")
        ],
    )
    with pytest.raises(
        UserError,
        match=(
            r"0 initial states are shared.*baseline: 60 of seed 0; .*candidate: 60 of seed"
            r" 5.*--init-states"
        ),
    ) as e:
        of(*pair)
    assert "\n" not in str(e.value)


def test_the_last_checkpoint_counts_and_never_the_best(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        make_run(run, [True] * 50, checkpoint_step=500)
        make_run(run, [True] * 20 + [False] * 30, checkpoint_step=1000)
    found = of(*runs)
    assert [rate.successes for rate in found.rates] == [20, 20]
    assert "100.0 %" not in text(found, ()).splitlines()[4]
    assert [rate.successes for rate in of(*runs, step=500).rates] == [50, 50]
    with pytest.raises(UserError, match="holds no evaluation with step 7"):
        of(*runs, step=7)


def test_several_evaluations_of_one_checkpoint_are_ambiguous(pair: tuple[Path, Path]) -> None:
    make_run(pair[0], [True] * 60, checkpoint="model")
    with pytest.raises(
        UserError, match=r"with checkpoint ema, model; choose one, e.g. --checkpoint ema"
    ):
        of(*pair)
    assert of(*pair, checkpoint="ema").rates[0].successes == 42


def test_a_comparison_names_the_perturbation(pair: tuple[Path, Path]) -> None:
    for run in pair:
        make_run(run, [True, False] * 30, perturbation="blur:2")
    assert "blur" not in text(of(*pair), ())
    assert "Lift-v0, perturbed by blur:2, 60 shared" in text(of(*pair, perturb="blur:2"), ())


def test_groups_pool_training_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    outcomes = {name: rng.random((3, 80)) < rate for name, rate in (("dense", 0.6), ("fib", 0.9))}
    for name, found in outcomes.items():
        for seed, one in enumerate(found):
            make_run(tmp_path / f"{name}_seed{seed}", one, policy=f"{name}{seed}")
    groups = (f"dense={tmp_path}/dense_seed*", f"fib={tmp_path}/fib_seed0,{tmp_path}/fib_seed[12]")
    comparison = of(groups=groups)
    assert [len(side.runs) for side in comparison.methods] == [3, 3]
    assert comparison.rates[1].episodes == 240
    assert (
        comparison.candidates[0].difference.value
        == Difference(outcomes["dense"], outcomes["fib"]).value
    )
    mixed = of(tmp_path / "dense_seed0", groups=groups[1:])
    assert "dense_seed0 is a single checkpoint" in text(mixed, ())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("dense",), "expected NAME=RUNS"),
        (("dense=nowhere*",), "no run directory matches"),
        ((), "needs a baseline and a candidate, got 1"),
        (("x={0}", "x={0}"), "x: named twice"),
        (("x={0},{1}",), "hold the same weights"),
        (("x={1}", "y={1}/../b*"), "b: belongs to x and to y; name it once"),
    ],
)
def test_mistaken_groups_are_refused(tmp_path: Path, groups: tuple[str, ...], message: str) -> None:
    a, b = (make_run(tmp_path / name, [True, False, True], policy="p") for name in "ab")
    with pytest.raises(UserError, match=message):
        of(a, groups=tuple(group.format(a, b) for group in groups))


def test_a_group_may_name_a_run_with_a_bracket(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [True, False]) for name in ("a", "[b]")]
    assert of(runs[0], groups=(f"b={runs[1]}",)).methods[1].runs == (runs[1],)


def test_holm_over_several_candidates(pair: tuple[Path, Path], tmp_path: Path) -> None:
    same = make_run(tmp_path / "same", [True] * 42 + [False] * 18)
    found = of(*pair, same, margin=0.1)
    better, equal = found.candidates
    assert better.p == pytest.approx(2 * better.difference.p)
    assert better.verdict == "better; not inferior"
    assert equal.verdict == "no difference shown; not inferior"
    assert "p (Holm)" in text(found, ())


def test_a_margin_decides_non_inferiority(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [True] * 45 + [False] * 5)
    b = make_run(tmp_path / "b", [True] * 40 + [False] * 10)
    assert "non-inferiority not shown" in of(a, b, margin=0.05).candidates[0].verdict
    assert "; not inferior" in of(a, b, margin=0.4).candidates[0].verdict
    c = make_run(tmp_path / "c", [False] * 50)
    assert of(a, c, margin=0.05).candidates[0].verdict == "worse; inferior"
    with pytest.raises(UserError, match="margin must lie between 0 and 1"):
        of(a, b, margin=5)


def test_needed_episodes_stay_within_possible_rates(tmp_path: Path) -> None:
    a, b = (
        make_run(tmp_path / name, [True] * k + [False] * (100 - k))
        for name, k in (("a", 98), ("b", 100))
    )
    table = power_rows(of(a, b), (0.05, 0.01))
    assert [line[0] for line in table[1:]] == ["98.0 and 93.0 %", "98.0 and 99.0 %"]


def test_the_command_prints_the_whole_comparison(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Compare(pair, margin=0.05).run()
    printed = capsys.readouterr().out
    for part in (
        "60 shared initial states",
        "+16.7",
        "better; not inferior",
        "McNemar's exact test",
        "compares two checkpoints",
        "80 % power",
    ):
        assert part in printed


def test_a_film_alternates_initial_states_that_only_one_method_solved() -> None:
    baseline, candidate = (
        np.array([int(x) for x in digits], dtype=bool) for digits in ("1110100", "0100111")
    )
    assert alternate(baseline, candidate) == [0, 5, 2, 6, 1, 3, 4]
