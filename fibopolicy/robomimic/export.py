"""Writes the policy of a run as a robomimic checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fibopolicy.errors import UserError
from fibopolicy.policies.base import POLICIES
from fibopolicy.policies.run_directory import RunDirectory, load_policy
from fibopolicy.robomimic.checkpoint import SECTION
from fibopolicy.robomimic.encoder_core import encoder_kwargs, network_shapes
from fibopolicy.robomimic.policies import RobomimicPolicy
from fibopolicy.utils.files import StrPath, atomic_write, check_output, expanded


def export(run: StrPath, out: StrPath, *, checkpoint: str = "ema", overwrite: bool = False) -> Path:
    """Write a checkpoint that robomimic (0.3 or 0.5) loads and that acts like the run's
    policy.

    Args:
        run: run directory.
        out: file to write.
        checkpoint: "ema", the moving average, or "model".
        overwrite: replace an existing `out`.

    Raises:
        UserError: the policy is not one of robomimic's; it does what robomimic 0.3
            does not (several actions at once, scaled actions, 6-D rotations); or `out`
            exists.
    """
    directory, out = RunDirectory(run), expanded(out)
    check_output(out, overwrite, [*directory.path.glob("*.safetensors"), directory.config])
    document = directory.read_config()
    if SECTION in document:
        raise UserError(
            f"{directory.path}: is the evaluation of a robomimic checkpoint,"
            f" {document[SECTION]['checkpoint']}; use that file"
        )
    loaded = load_policy(run, checkpoint=checkpoint)
    policy = loaded.policy
    if not isinstance(policy, RobomimicPolicy):
        known = [name for name in POLICIES.names() if issubclass(POLICIES[name], RobomimicPolicy)]
        raise UserError(
            f"{directory.path}: robomimic has no counterpart of policy {policy.name}; it has one"
            f" of {', '.join(known)}"
        )
    if reason := _unsupported(policy):
        raise UserError(f"{directory.path}: {reason}")
    shapes = network_shapes(policy.shapes, policy.shapes.images)
    tensors = policy.network.state_dict()
    contents = {
        "model": {f"policy.{name}": tensor.clone() for name, tensor in tensors.items()},
        "config": _config(policy, document["train"]).dump(),
        "algo_name": "bc",
        "env_metadata": loaded.env_args,
        "shape_metadata": {
            "ac_dim": policy.shapes.action_dim,
            "all_shapes": shapes,
            "all_obs_keys": list(shapes),
            "use_images": bool(policy.shapes.images),
        },
        "obs_normalization_stats": _statistics(policy),
    }
    with atomic_write(out) as file:
        torch.save(contents, file)
    return out


def _unsupported(policy: RobomimicPolicy) -> str | None:
    """What the policy does that robomimic 0.3 cannot, with advice."""
    config = policy.config
    if policy.shapes.tasks:
        return "is conditioned on the task, which robomimic's networks do not embed"
    if config.horizon != 1 and not policy.sequence:
        return (
            f"predicts {config.horizon} actions at once, robomimic one; train with horizon 1 to"
            " export"
        )
    if config.action_normalization != "none":
        return (
            f"scales actions ({config.action_normalization}), which robomimic 0.3 does not; train"
            " with action_normalization none to export"
        )
    if policy.actions.rotations:
        return (
            "predicts 6-D rotations, which robomimic 0.3 does not; train with rotation axis_angle"
            " to export"
        )
    if dotted := [key for key in policy.shapes.keys if "." in key]:
        return (
            f"reads {', '.join(dotted)}; robomimic's networks take no observation with a dot in its"
            " name"
        )
    return None


def _config(policy: RobomimicPolicy, train: dict[str, Any]) -> Any:
    """The robomimic configuration that is closest to that of the run."""
    import robomimic.algo  # noqa: F401
    from robomimic.config import config_factory

    dataset, filter_key = train["dataset"], train.get("filter_key")
    config = config_factory("bc")
    config.experiment.name = policy.name
    config.experiment.rollout.enabled = False
    config.train.data = dataset if isinstance(dataset, str) else ", ".join(dataset)
    config.train.hdf5_filter_key = filter_key if isinstance(filter_key, str) else None
    config.train.hdf5_normalize_obs = True
    config.train.frame_stack = policy.config.n_obs_steps
    config.train.seq_length = policy.config.horizon
    config.train.batch_size = train["optimizer"]["batch_size"]
    config.train.seed = train["seed"]
    config.algo.optim_params.policy.learning_rate.initial = train["optimizer"]["lr"]
    config.algo.actor_layer_dims = list(policy.layer_dims)
    for name in policy.algo_sections:
        section = config.algo[name]
        section.enabled = True
        section.update({key: value for key, value in policy.options.items() if key in section})
    if policy.sequence:
        config.algo.rnn.horizon = policy.config.horizon
    config.algo.transformer.context_length = policy.config.n_obs_steps
    config.observation.modalities.obs.rgb = list(policy.shapes.images)
    config.observation.modalities.obs.low_dim = list(policy.shapes.vectors)
    with config.unlocked():
        # What 0.5 reads and 0.3 does not have.
        config.algo.optim_params.policy.update(num_train_batches=1, num_epochs=1)
        config.algo.transformer.pred_future_acs = False
        rgb = config.observation.encoder.rgb
        ours = encoder_kwargs(policy.config, policy.options)["rgb"]
        rgb.core_class, rgb.core_kwargs = ours["core_class"], ours["core_kwargs"]
        crop = policy.config.crop
        if crop and any(size != (crop, crop) for size in policy.shapes.images.values()):
            size = {"crop_height": crop, "crop_width": crop}
            rgb.obs_randomizer_class = "CropRandomizer"
            rgb.obs_randomizer_kwargs = {**size, "num_crops": 1, "pos_enc": False}
    return config


def _statistics(policy: RobomimicPolicy) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation per observation, which 0.5 calls offset and scale;
    zeros and ones for images, which stay as they are.

    The first dimension is the number of stacked frames: robomimic's own files have 1
    there, which the rollouts of 0.3 reject if there are more frames. Those of 0.5
    normalise images `(H, W, 3)`, those of 0.3 `(3, H, W)`.
    """
    statistics: dict[str, dict[str, Any]] = {}
    frames = policy.config.n_obs_steps
    for key, (height, width) in policy.shapes.images.items():
        zeros = torch.zeros(frames, 3, height, width)
        statistics[key] = {"mean": zeros.tolist(), "std": (zeros + 1).tolist()}
        statistics[key] |= {"offset": [[0.0] * 3], "scale": [[1.0] * 3]}
    for key, normalizer in policy.observations.vector_normalizers().items():
        offset, scale = normalizer.offset.expand(frames, -1), normalizer.scale.expand(frames, -1)
        statistics[key] = {"mean": offset.tolist(), "std": scale.tolist()}
        statistics[key] |= {"offset": offset.tolist(), "scale": scale.tolist()}
    return statistics
