"""Rollouts beside a training: a process of their own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import TrainConfig
from fibopolicy.training.checkpoint import save_weights
from fibopolicy.training.loop import train
from fibopolicy.training.rollouts import Rollouts
from fibopolicy.training.watch_config import RolloutConfig

#: Stands in for the evaluation: writes its result once a file is there, or fails.
FAKE = """
import json, os, sys, time
result = sys.argv[sys.argv.index("--result") + 1]
until = time.monotonic() + 60
while not os.path.exists({once!r}) and time.monotonic() < until:
    time.sleep(0.01)
{fail}
document = dict(success=.5, low=.1, high=.9, episodes=2, errors=0, seconds=1, text="1/2", arguments=sys.argv[1:])
json.dump(document, open(result, "w"))
"""  # noqa: E501


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def stand_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, once: Path | None = None, fail: str = ""
) -> None:
    (folder / "stand_in.py").write_text(FAKE.format(once=str(once or folder), fail=fail))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr("fibopolicy.training.rollouts._MODULE", "stand_in")


class Kept(list[tuple[int, dict[str, float]]]):
    def write(self, step: int, figures: dict[str, float]) -> None:
        self.append((step, figures))


def rollouts(run: Path, written: Kept, every: int | None = 2, **options: object) -> Rollouts:
    settings = {"start": 0, "done": set(), **options}
    return Rollouts(
        run, RolloutConfig(rollout_every=every), nn.Linear(1, 1), written.write, "cpu", **settings
    )  # type: ignore[arg-type]


def test_training_does_not_wait_but_at_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, run, once=run / "trained")
    written = Kept()
    with rollouts(run, written) as beside:
        for steps in range(1, 7):
            beside.after(steps)  # had it waited, there would be a result
        assert not written
        (run / "trained").touch()
        beside.finish(6)
    # Those of steps 4 and 6 fell due while those of step 2 ran; the last is caught up
    # on.
    assert [step for step, _ in written] == [1, 5]
    assert written[0][1] == {
        "monitoring_success": 0.5,
        "monitoring_low": 0.1,
        "monitoring_high": 0.9,
        "monitoring_episodes": 2,
        "monitoring_errors": 0,
        "monitoring_seconds": 1,
    }


def test_a_failure_is_told_and_stops_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, run, fail="sys.exit('no such simulator')")
    written = Kept()
    with caplog.at_level(logging.WARNING), rollouts(run, written) as beside:
        beside.after(2)
        beside.finish(2)
    assert not written
    assert "monitoring at step 2 failed (no such simulator)" in caplog.text


def test_what_was_cut_short_goes_on_after_a_resume_and_is_not_repeated(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, run)
    (run / "monitoring").mkdir()
    save_weights(run / "monitoring/ema.safetensors", nn.Linear(1, 1), {"step": "4"})
    for options, expected in (
        ({"start": 5}, [3]),
        ({"start": 5, "done": {3}}, []),
        ({"start": 3}, []),
        ({}, []),
    ):
        written = Kept()
        with rollouts(run, written, **options) as beside:
            beside.finish(5)
        assert [step for step, _ in written] == expected, options
    arguments = json.loads((run / "monitoring/result.json").read_text())["arguments"]
    assert "--resume" in arguments


def test_none_are_run_unless_asked_for(run: Path) -> None:
    with rollouts(run, Kept(), every=None) as beside:
        for steps in range(1, 9):
            beside.after(steps)
        beside.finish(8)
    assert not (run / "monitoring").exists()


@pytest.mark.parametrize("name", ["rollout_every", "rollout_episodes", "rollout_workers"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        RolloutConfig(**{name: 0})


@pytest.mark.slow
def test_a_run_is_rolled_out_beside_its_training(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        tiny_config,
        out=tmp_path / "run",
        rollouts=RolloutConfig(rollout_every=6, rollout_episodes=2),
    )
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in lines if "monitoring_success" in row]
    assert told[-1]["step"] == 11
    assert all(
        row["monitoring_low"] <= row["monitoring_success"] <= row["monitoring_high"] for row in told
    )
    assert not (config.out / "episodes.jsonl").exists()  # a result is what evaluate gives
    assert {
        json.loads(row)["starts_seed"]
        for row in (config.out / "monitoring/episodes.jsonl").read_text().splitlines()
    } == {730_001}
    assert load_policy(config.out / "monitoring").step == 12
    train(config, overwrite=True)
    names = {path.name for path in (config.out / "monitoring").iterdir()}
    assert "episodes.jsonl" in names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rollouts_end_with_a_training_that_is_killed(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "fibopolicy",
        "train",
        "--dataset",
        str(tiny_config.dataset),
        "--out",
        str(tmp_path / "run"),
    ]
    command += [
        "--encoder-options",
        "patch_size",
        "12",
        "width",
        "24",
        "depth",
        "1",
        "heads",
        "2",
        "--batch-size",
        "2",
    ]
    command += ["--steps", "100000", "--rollout-every", "1", "--rollout-episodes", "500"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = tmp_path / "run/monitoring/episodes.jsonl"
    try:
        while not rows.exists():
            assert training.poll() is None
            time.sleep(0.05)
        mine = str(tmp_path / "run/monitoring")
        assert beside(mine)
    finally:
        os.kill(training.pid, signal.SIGKILL)
        training.wait()
    until = time.monotonic() + 60
    while beside(mine) and time.monotonic() < until:
        time.sleep(0.05)
    assert not beside(mine)


def beside(folder: str) -> list[str]:
    """The processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_text()
        except OSError:
            continue
        if folder in line:
            found.append(line)
    return found
