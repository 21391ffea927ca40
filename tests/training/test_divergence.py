from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fibopolicy.datasets import batch_indices
from fibopolicy.errors import UserError
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.data import open_dataset
from fibopolicy.training.optim import FACTOR, LEAST, PATIENCE, Divergence
from fibopolicy.training.trainer import PolicyLoss, Trainer, train


def watched(losses: list[float]) -> Divergence:
    watch = Divergence()
    assert all(watch.check(loss, 1.0) is None for loss in losses)
    return watch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_at_once(bad: float) -> None:
    assert Divergence().check(bad, 1.0) == f"the loss is {bad}"
    assert Divergence().check(1.0, bad) == f"the gradient norm is {bad}"


def test_a_loss_that_stays_high_ends_the_training_and_an_outlier_does_not() -> None:
    usual = np.random.default_rng(0).uniform(0.8, 1.2, 100).tolist()
    watch = watched(usual)
    assert watch.check(100.0, 1.0) is None
    assert not watch.is_stable
    assert watch.check(1.0, 1.0) is None
    assert watch.is_stable
    reasons = [watch.check(100.0 + i, 1.0) for i in range(PATIENCE)]
    assert reasons[:-1] == [None] * (PATIENCE - 1)
    assert f"for {PATIENCE} steps" in str(reasons[-1])


@pytest.mark.parametrize("level", [5.0, 0.0, -30.0])
def test_divergence_is_detected_for_losses_of_any_sign(level: float) -> None:
    losses = (level + np.random.default_rng(0).normal(0, 1, 300)).tolist()
    watch = watched(losses)
    assert watch.is_stable
    watch.check(level + 2 * FACTOR * (abs(level) + 2), 1.0)
    assert not watch.is_stable


def test_a_falling_loss_and_the_first_steps_never_count_as_high() -> None:
    assert watched([1000.0 * 0.9**i for i in range(300)]).is_stable
    assert watched([1.0, 1e9] * (LEAST // 2)).is_stable


def breaking_at(step: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a step on, the loss is multiplied."""
    real, now = PolicyLoss.forward, {"step": -1}
    whole = Trainer.train_step

    def counted(self: Trainer, number: int) -> dict[str, float]:
        now["step"] = number
        return whole(self, number)

    def broken(self: PolicyLoss, *arguments: Any) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = real(self, *arguments)
        return (loss * factor if now["step"] >= step else loss), metrics

    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(PolicyLoss, "forward", broken)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_samples(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking_at(6, math.nan, monkeypatch)
    config = replace(tiny_config, out=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(config)
    samples = batch_indices(len(open_dataset(config)), 8, config.seed, 6)
    assert f"the loss is nan at step 6 (samples {', '.join(map(str, samples))})" in str(
        caught.value
    )
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] == 4


def test_no_checkpoint_is_written_after_the_loss_explodes(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking_at(30, 1e4, monkeypatch)
    optimizer = OptimizerConfig(steps=200, batch_size=4, warmup_steps=2, lr=1e-4)
    config = replace(tiny_config, out=tmp_path / "run", optimizer=optimizer, checkpoint_every=1)
    with pytest.raises(
        UserError, match=f"has been above .* for {PATIENCE} steps.* at step {30 + PATIENCE - 1} "
    ):
        train(config)
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] == 30


def test_the_divergence_check_continues_after_a_resume(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    state = torch.load(config.out / "state.pt", weights_only=True)
    assert len(state["losses"]) == 12
    assert state["high_losses"] == 0
