from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from made_rows import make_run

from fibopolicy.cli.evaluate import Compare, Results, read_methods
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Selector
from fibopolicy.statistics.compare import compare

COLUMNS = ("method", "seed", "init_state", "success")


def table(path: Path, rows: list[tuple[object, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def outcomes(
    method: str, successes: list[bool], seed: int = 0, first: int = 0
) -> list[tuple[object, ...]]:
    return [(method, seed, f"s{first + i}", int(each)) for i, each in enumerate(successes)]


def test_a_table_gives_the_same_comparison_as_run_directories(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = {(m, s): list(rng.random(40) < 0.6 + 0.2 * m) for m in (0, 1) for s in (0, 1)}
    for (m, s), cell in cells.items():
        make_run(tmp_path / f"m{m}_seed{s}", cell)
    groups = [f"m{m}={tmp_path}/m{m}_seed?" for m in (0, 1)]
    ours = compare(read_methods((), groups, Selector()), 0.1)
    rows = [row for (m, s), cell in cells.items() for row in outcomes(f"m{m}", cell, s)]
    rng.shuffle(rows)
    rows.sort(key=lambda row: str(row[0]))  # the baseline comes first, seeds in any order
    theirs = compare(read_methods([table(tmp_path / "t.csv", rows)], (), Selector()), 0.1)
    assert [str(rate) for rate in theirs.rates] == [str(rate) for rate in ours.rates]
    assert theirs.candidates[0].p == pytest.approx(ours.candidates[0].p)
    assert theirs.candidates[0].p_inferior == pytest.approx(ours.candidates[0].p_inferior)


def test_pairs_what_overlaps_and_says_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = outcomes("a", [True, False] * 10) + outcomes("b", [True] * 20, first=5)
    Compare((table(tmp_path / "t.csv", rows),)).run()
    printed = capsys.readouterr().out
    assert "15 shared initial states; left out: 10 that some run lacks" in printed


def test_tables_in_the_names_of_robostats_are_read(tmp_path: Path) -> None:
    records = [
        {
            "policy_id": p,
            "task_id": "lift",
            "scenario_id": f"s{i}",
            "success": i % n == 0,
            "seed": i,
        }
        for p, n in (("a", 2), ("b", 3))
        for i in range(12)
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = compare(read_methods([path], (), Selector()))
    assert [(rate.successes, rate.episodes) for rate in found.rates] == [(6, 12), (4, 12)]
    assert found.task == "lift"


def test_lerobots_results_are_read_in_both_layouts(tmp_path: Path) -> None:
    one, suite = tmp_path / "one", tmp_path / "suite"
    for folder in (one, suite):
        folder.mkdir()
    episodes = [{"episode_ix": i, "success": i < 3, "seed": 100 + i} for i in range(5)]
    (one / "eval_info.json").write_text(json.dumps({"per_episode": episodes, "aggregated": {}}))
    tasks = [
        {"task_group": "libero_goal", "task_id": t, "metrics": {"successes": [True, t > 0]}}
        for t in range(3)
    ]
    (suite / "eval_info.json").write_text(json.dumps({"per_task": tasks, "overall": {}}))
    found = read_methods([one, suite], (), Selector())
    assert [method.name for method in found] == ["one", "suite"]
    assert [row.init_state for row in found[0].rows[0]][:2] == ["seed 100", "seed 101"]
    assert [row.success for row in found[1].rows[0]] == [True, False, True, True, True, True]
    assert found[1].rows[0][3].init_state == "task 1 episode 1"
    other = table(tmp_path / "t.csv", [("a", 0, "s0", 1)], COLUMNS)
    (_, grouped) = read_methods([other], [f"both={one}/eval_info.json,{suite}"], Selector())
    assert len(grouped.runs) == 2


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", "s0", 1)], ("method", "init_state", "success"), "row 1 has no seed.*write 0"),
        ([("a", 0, "s0", 1), ("a", 0, "s0", 0)], COLUMNS, "row 2: .*s0 appears twice for a"),
        ([("a", 0, "s0", "maybe")], COLUMNS, "row 1: success is 'maybe', expected 0, 1"),
        ([("a", 0, "", 1)], COLUMNS, "row 1 has no init_state"),
        ([], COLUMNS, "holds no row"),
        (
            [("a", 0, "s0", 1, "x"), ("a", 0, "s0", 1, "y")],
            (*COLUMNS, "task"),
            "with task x, y; choose one, e.g. --task x",
        ),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_in_one_line(
    tmp_path: Path, rows: list[tuple[object, ...]], columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_methods([table(tmp_path / "t.csv", rows, columns)], (), Selector())
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text, message in (("{}", "is not LeRobot's eval_info.json"), ("{", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_methods([path], (), Selector())
    with pytest.raises(UserError, match="cannot be read"):
        read_methods([tmp_path / "none.csv"], (), Selector())


@pytest.mark.parametrize(
    ("candidate", "code"),
    [([True] * 200, 0), ([True] * 100 + [False] * 100, 3), ([True] * 185 + [False] * 15, 4)],
)
def test_the_gate_tells_the_verdict_by_the_exit_code(
    tmp_path: Path, candidate: list[bool], code: int
) -> None:
    baseline = [True] * 190 + [False] * 10
    path = table(tmp_path / "t.csv", outcomes("a", baseline) + outcomes("b", candidate))
    command = Compare((path,), margin=0.05, gate=True)
    if code:
        with pytest.raises(SystemExit) as exit_code:
            command.run()
        assert exit_code.value.code == code
    else:
        command.run()
    with pytest.raises(UserError, match="--gate needs --margin"):
        Compare((path,), gate=True).run()


def test_the_gate_stays_shut_where_the_baseline_solves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = outcomes("a", [False] * 300) + outcomes("b", [False] * 300)
    with pytest.raises(SystemExit) as exit_code:
        Compare((table(tmp_path / "t.csv", rows),), margin=0.05, gate=True).run()
    assert exit_code.value.code == 4
    assert "no difference shown; untestable" in capsys.readouterr().out


def test_results_of_a_table_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.csv", outcomes("a", [True, False]) + outcomes("b", [True, True]))
    Results(runs=(path,), out=tmp_path / "rates.json").run()
    printed = capsys.readouterr().out
    assert "a seed 0" in printed
    assert "50.0" in printed
    assert len(json.loads((tmp_path / "rates.json").read_text())["runs"]) == 2


def test_results_of_several_tasks_are_not_added_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(*row, task) for task in "AB" for row in outcomes("a", [task == "A"] * 20)]
    path = table(tmp_path / "t.csv", rows, (*COLUMNS, "task"))
    Results(runs=(path,), out=tmp_path / "rates.json").run()
    runs = json.loads((tmp_path / "rates.json").read_text())["runs"]
    assert [(run["task"], run["successes"], run["episodes"]) for run in runs] == [
        ("A", 20, 20),
        ("B", 0, 20),
    ]


def test_the_page_of_external_rows_leaves_out_what_they_do_not_hold(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", outcomes("a", [True, False]) + outcomes("b", [True, True]))
    Compare((path,), out=tmp_path / "page.html").run()
    assert "Success against time" not in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError):
        Compare((path,), out=tmp_path / "other.html", video=2).run()
