from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from demo_files import write

from fibopolicy.datasets import DemoFile, split
from fibopolicy.datasets.quality import (
    FAULTS,
    DemoMotion,
    read_motions,
    score_demos,
    worst_first,
)
from fibopolicy.errors import UserError


def motion(seed: int, steps: int = 100) -> DemoMotion:
    """A smooth reach with noise, and a gripper that closes at its end."""
    random = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)[:, None]
    goal = random.uniform(0.5, 1, (1, 3))
    positions = goal * (3 * t**2 - 2 * t**3) + random.normal(0, 1e-4, (steps, 3))
    moves = np.diff(positions, axis=0, append=positions[-1:]) / 0.03
    return DemoMotion(f"demo_{seed}", np.hstack([moves, np.sign(t - 0.7)]), positions, True)


GOOD = [motion(seed) for seed in range(9)]
BAD = motion(9)


def pause(actions: np.ndarray, positions: np.ndarray) -> None:
    positions[30:80], actions[30:80] = positions[30], 0.1


def shake(actions: np.ndarray, positions: np.ndarray) -> None:
    positions += np.random.default_rng(0).normal(0, 3e-3, positions.shape)


def jump(actions: np.ndarray, positions: np.ndarray) -> None:
    positions[50:] += 0.5


def saturate(actions: np.ndarray, positions: np.ndarray) -> None:
    actions[:60, 1] = 1.0


@pytest.mark.parametrize(
    ("fault", "edit"),
    [("still", pause), ("jerky", shake), ("teleports", jump), ("saturated", saturate)],
)
def test_a_faulty_demonstration_is_the_worst_and_its_reason_says_why(
    fault: str, edit: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    actions, positions = BAD.actions.copy(), BAD.positions.copy()
    edit(actions, positions)
    worst, second, *_ = worst_first(score_demos([*GOOD, DemoMotion("bad", actions, positions)]))
    assert worst.demo == "bad"
    assert fault in worst.faults
    assert len(worst.reasons) == len(worst.faults)
    assert worst.score <= 0.8
    assert second.score > 0.95


def test_still_and_saturated_steps_are_found_where_they_are() -> None:
    actions, positions = BAD.actions.copy(), BAD.positions.copy()
    pause(actions, positions)
    actions[85:, 0] = 2.0
    bad = score_demos([*GOOD, DemoMotion("bad", actions, positions)])[-1]
    assert bad.still[32:78].all()
    assert not bad.still[:28].any()
    assert np.flatnonzero(bad.saturated).tolist() == list(range(85, 100))  # no gripper


@pytest.mark.parametrize(("steps", "fault"), [(400, "long"), (30, "short")])
def test_a_length_far_from_the_others_is_a_fault(steps: int, fault: str) -> None:
    qualities = score_demos([*GOOD, motion(9, steps)])
    assert fault in qualities[-1].faults
    assert not any(fault in quality.faults for quality in qualities[:-1])


def test_a_failure_counts_where_success_is_known() -> None:
    failed = DemoMotion("failed", BAD.actions, BAD.positions, False)
    assert score_demos([*GOOD, failed])[-1].score == pytest.approx(1 - FAULTS["failed"].weight)
    assert score_demos([failed])[0].score == 1  # no other succeeds: another kind of reward


def test_what_all_demonstrations_do_is_no_fault() -> None:
    paused = []
    for one in GOOD:
        actions, positions = one.actions.copy(), one.positions.copy()
        pause(actions, positions)
        paused.append(DemoMotion(one.demo, actions, positions, True))
    assert min(quality.score for quality in score_demos(paused)) > 0.9


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_demonstrations_have_a_score(steps: int) -> None:
    constant = DemoMotion("still", np.zeros((steps, 2)), np.zeros((steps, 2)))
    assert [len(quality.still) for quality in score_demos([constant])] == [steps]
    assert all(0 <= quality.score <= 1 for quality in score_demos([*GOOD[:1], motion(1, steps)]))


def test_positions_of_a_file_without_proprioception_are_summed_actions(path: Path) -> None:
    with DemoFile(path) as file:  # its only vector has an unknown name
        first = read_motions(file, file.demos)[0]
        assert np.allclose(first.positions, np.cumsum(file.read("demo_0", "actions"), axis=0))
        assert first.success is True


def test_a_demo_that_cannot_be_scored_is_refused_or_listed(
    edited: Callable[[Callable[[h5py.File], object]], Path],
) -> None:
    def break_one(file: h5py.File) -> None:
        file["data/demo_1/actions"][0, 0] = np.nan

    with DemoFile(edited(break_one)) as file:
        with pytest.raises(UserError, match="demo_1: actions hold values that are not finite"):
            read_motions(file, file.demos)
        skipped: dict[str, str] = {}
        assert [m.demo for m in read_motions(file, file.demos, skipped)] == ["demo_0", "demo_2"]
        assert skipped == {"demo_1": "actions hold values that are not finite"}


def test_split_leaves_the_worst_out_by_number_or_by_share(tmp_path: Path) -> None:
    src = write(tmp_path / "ten.hdf5", lengths=[20] * 8 + [200, 90])
    for worst, number in ((2, 0), (0.2, 1)):
        out = tmp_path / f"{number}.hdf5"
        made = split(src, out, 0.25, drop_worst=worst)
        assert made["worst"] == ("demo_8", "demo_9")
        assert sorted(made["train"] + made["valid"]) == [f"demo_{i}" for i in range(8)]
        with DemoFile(out) as file:
            assert file.select("worst") == made["worst"]
    for wrong in (-1, 1.5, float("nan")):
        with pytest.raises(UserError, match="drop_worst"):
            split(src, tmp_path / "no.hdf5", drop_worst=wrong)
    with pytest.raises(UserError, match="leaves none"):
        split(src, tmp_path / "no.hdf5", drop_worst=10)
