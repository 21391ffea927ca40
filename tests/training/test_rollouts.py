"""Rollouts during training, in a separate process."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fake_rollout
import pytest
import torch
from command import TINY_ENCODER_OPTIONS
from torch import nn

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import TrainConfig
from fibopolicy.training.callbacks import Rollouts
from fibopolicy.training.checkpoint import save_weights
from fibopolicy.training.config import RolloutConfig
from fibopolicy.training.trainer import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, once: Path, *, fail: bool = False) -> None:
    replacement = functools.partial(fake_rollout.evaluate, once=once, fail=fail)
    monkeypatch.setattr("fibopolicy.training.callbacks._evaluate_snapshot", replacement)


class Kept(list[tuple[int, dict[str, float]]]):
    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.append((step, metrics))


def rollouts(
    run: Path, written: Kept, start: int = 0, done: frozenset[int] = frozenset()
) -> closing[Rollouts]:
    config = TrainConfig(Path("data.hdf5"), run, rollouts=RolloutConfig(rollout_every=2))
    device = torch.device("cpu")
    return closing(
        Rollouts(config, nn.Linear(1, 1), written.write, device, start=start, done=set(done))
    )


def test_training_waits_for_rollouts_only_at_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, run / "trained")
    written = Kept()
    with rollouts(run, written) as callback:
        for steps in range(1, 7):
            callback.after_step(steps)  # had it waited, there would be a result
        assert not written
        (run / "trained").touch()
        callback.finish(6)
    # Those of steps 4 and 6 were due while those of step 2 ran; the last are run
    # afterwards.
    assert [step for step, _ in written] == [1, 5]
    assert written[0][1] == {"rollout_success": 0.5}


def test_a_failed_rollout_is_logged_and_does_not_stop_the_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, run, fail=True)
    written = Kept()
    with caplog.at_level(logging.WARNING), rollouts(run, written) as callback:
        callback.after_step(2)
        callback.finish(2)
    assert not written
    assert "rollouts at step 2 failed (no such simulator)" in caplog.text


def test_interrupted_rollouts_continue_after_a_resume_and_are_not_repeated(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, run)
    (run / "rollouts").mkdir()
    save_weights(run / "rollouts/ema.safetensors", nn.Linear(1, 1), {"step": "4"})
    for options, expected in (
        ({"start": 5}, [3]),
        ({"start": 5, "done": frozenset({3})}, []),
        ({"start": 3}, []),
        ({}, []),
    ):
        written = Kept()
        with rollouts(run, written, **options) as callback:
            callback.finish(5)
        assert [step for step, _ in written] == expected, options
    assert (run / "rollouts/log.txt").read_text() == "resume True"


@pytest.mark.parametrize("name", ["rollout_every", "rollout_episodes", "rollout_workers"])
def test_numbers_below_one_are_rejected(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        RolloutConfig(**{name: 0})


@pytest.mark.slow
def test_a_run_is_evaluated_during_its_training(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        tiny_config,
        out=tmp_path / "run",
        rollouts=RolloutConfig(rollout_every=12, rollout_episodes=2),
    )
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in lines if "rollout_success" in row]
    assert found[-1]["step"] == 11
    names = ("success", "low", "high", "episodes", "errors", "seconds")
    assert found[-1].keys() == {"step", *(f"rollout_{name}" for name in names)}
    assert all(row["rollout_low"] <= row["rollout_success"] <= row["rollout_high"] for row in found)
    assert not (config.out / "episodes.jsonl").exists()  # a result is what evaluate gives
    assert {
        json.loads(row)["init_seed"]
        for row in (config.out / "rollouts/episodes.jsonl").read_text().splitlines()
    } == {730_001}
    assert load_policy(config.out / "rollouts").step == 12
    train(config, overwrite=True)
    names = {path.name for path in (config.out / "rollouts").iterdir()}
    assert "episodes.jsonl" in names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rollouts_end_when_their_training_is_killed(
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
        *TINY_ENCODER_OPTIONS,
        "--batch-size",
        "2",
    ]
    command += ["--steps", "100000", "--rollout-every", "1", "--rollout-episodes", "500"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = tmp_path / "run/rollouts/episodes.jsonl"
    try:
        while not rows.exists():
            assert training.poll() is None
            time.sleep(0.05)
        folder = str(tmp_path / "run/rollouts")
        assert processes_of(folder)
    finally:
        os.kill(training.pid, signal.SIGKILL)
        training.wait()
    until = time.monotonic() + 300
    while processes_of(folder) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(folder)


def processes_of(folder: str) -> list[str]:
    """The processes with an open file in a folder: rollouts print to their log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(entry) for entry in (process / "fd").iterdir()]
            found += [process.name for file in files if file.startswith(folder)]
    return found
