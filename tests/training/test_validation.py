from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, build_policy
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import TrainConfig
from fibopolicy.training.callbacks import validation_metrics
from fibopolicy.training.checkpoint import TopKCheckpoints
from fibopolicy.training.config import ValidationConfig
from fibopolicy.training.data import open_dataset, shapes_of, to_device
from fibopolicy.training.trainer import train

CPU = torch.device("cpu")


def rows(run: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in lines if name in row}


@pytest.fixture
def watched(tiny_config: TrainConfig, tmp_path: Path) -> TrainConfig:
    validation = ValidationConfig(validate_on="valid", validate_every=3, keep_best=2)
    return replace(tiny_config, out=tmp_path / "run", validation=validation)


def test_the_loss_does_not_depend_on_the_size_of_the_batches(tiny_config: TrainConfig) -> None:
    dataset = open_dataset(replace(tiny_config, filter_key="valid"))
    policy = build_policy(tiny_config.policy, shapes_of(dataset)).eval()
    chosen = np.linspace(0, len(dataset) - 1, 8).round().astype(int)
    # counts no padding
    expected = float(policy.loss(to_device(dataset.batch(chosen), CPU))[0].detach())
    for size in (8, 3, 1):
        metrics = validation_metrics(policy, dataset, samples=8, batch_size=size, device=CPU)
        assert metrics["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_leaves_random_state_unchanged_and_repeats_its_own_draws(
    tiny_config: TrainConfig,
) -> None:
    """For losses that draw, such as diffusion's."""
    dataset = open_dataset(tiny_config)
    policy = build_policy(tiny_config.policy, shapes_of(dataset)).eval()
    loss = policy.loss
    policy.loss = lambda batch: (loss(batch)[0] + torch.rand(()), {})  # type: ignore[method-assign]
    torch.manual_seed(5)
    first = validation_metrics(policy, dataset, samples=20, batch_size=8, device=CPU)
    drawn = torch.rand(())
    torch.manual_seed(6)
    assert validation_metrics(policy, dataset, samples=20, batch_size=8, device=CPU) == first
    torch.manual_seed(5)
    assert torch.rand(()) == drawn


def test_validation_uses_averaged_weights_and_does_not_change_the_run(
    watched: TrainConfig, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    done = train(watched)
    train(replace(tiny_config, out=tmp_path / "unwatched"))
    for name in ("model.safetensors", "ema.safetensors"):
        assert (watched.out / name).read_bytes() == (tmp_path / "unwatched" / name).read_bytes()
    losses = rows(watched.out, "validation_loss")
    assert list(losses) == [2, 5, 8, 11]
    dataset = open_dataset(replace(tiny_config, filter_key="valid"))
    ours = validation_metrics(done.policy, dataset, samples=2048, batch_size=8, device=CPU)
    assert losses[11] == pytest.approx(ours["validation_loss"])
    assert done.summary.validation_loss == losses[11]
    assert "validation loss" in done.summary.table()


def test_the_best_checkpoints_are_kept_and_can_be_loaded(watched: TrainConfig) -> None:
    train(watched)
    losses = rows(watched.out, "validation_loss")
    best = sorted(sorted(losses, key=losses.__getitem__)[:2])
    kept = sorted((watched.out / "best").iterdir())
    assert [path.name for path in kept] == [f"step_{step + 1:06d}.safetensors" for step in best]
    with safe_open(kept[0], framework="pt") as file:
        assert float(file.metadata()["validation_loss"]) == losses[best[0]]
    assert load_policy(watched.out, checkpoint=f"best/{kept[0].stem}").step == best[0] + 1
    assert load_policy(watched.out).step == 12
    with pytest.raises(
        UserError, match="unknown checkpoint 'best/step_000099': did you mean 'best/step_0000"
    ):
        load_policy(watched.out, checkpoint="best/step_000099")
    train(watched, overwrite=True)
    assert len(list((watched.out / "best").iterdir())) == 2


def test_the_ranking_of_checkpoints_resumes_from_the_files_alone(tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    for step, value in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (2, 1.0), (5, 2.0)):
        TopKCheckpoints(tmp_path, 2, "validation_loss").update(
            step, {"validation_loss": value}, module
        )
    assert sorted(path.stem for path in (tmp_path / "best").iterdir()) == [
        "step_000002",
        "step_000004",
    ]


def test_a_criterion_that_is_not_a_metric_is_rejected_before_anything_is_written(
    watched: TrainConfig,
) -> None:
    mistyped = replace(watched.validation, criterion="validation_los")
    with pytest.raises(
        UserError, match="unknown criterion 'validation_los': did you mean 'validation_loss'"
    ):
        train(replace(watched, validation=mistyped))
    assert not watched.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": 3}, "criterion validation_loss needs a validation"),
        ({"criterion": "validation_l1"}, "criterion validation_l1 needs a validation"),
        ({"validate_on": "valid", "criterion": "loss"}, "must be a metric of the validation"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
    ],
)
def test_contradictory_settings_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValidationConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["bc_gaussian", "bc_gmm", "bc_rnn_gmm", "bc_transformer_gmm"])
def test_validation_likelihoods_use_the_learned_noise(
    policy: str, tiny_config: TrainConfig
) -> None:
    pytest.importorskip("robomimic", exc_type=ImportError)
    options = (
        {"emb_dropout": 0.0, "attn_dropout": 0.0, "block_output_dropout": 0.0}
        if "transformer" in policy
        else {}
    )
    small = PolicyConfig(
        policy=policy,
        policy_options=options,
        encoder_options=tiny_config.policy.encoder_options,
        hidden=16,
    )
    config = replace(tiny_config, policy=small)
    dataset = open_dataset(config)
    policy = build_policy(small, shapes_of(dataset))
    batch = to_device(dataset.batch(np.arange(4)), CPU)
    trained, evaluated = (
        float(policy.train(mode).loss(batch)[0].detach()) for mode in (True, False)
    )
    assert evaluated == pytest.approx(trained, rel=1e-4)
    assert policy.network.low_noise_eval
