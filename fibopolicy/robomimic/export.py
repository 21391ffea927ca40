"""Our runs as robomimic checkpoints, for the heads that are robomimic's."""

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
    """Write a run's policy as a checkpoint that robomimic 0.3 loads, and that acts
    alike.

    Args:
        run: a run directory of ours.
        out: the file to write.
        checkpoint: "ema", the moving average, or "model".
        overwrite: replace an existing `out`.

    Raises:
        UserError: the head is none of robomimic's, or predicts several actions at once,
            scaled ones or 6-D rotations, none of which robomimic 0.3 can do; `out`
            exists.
    """
    run, out = expanded(run), expanded(out)
    check_output(out, overwrite, [*run.glob("*.safetensors"), RunDirectory(run).config])
    document = RunDirectory(run).read_config()
    if SECTION in document:
        raise UserError(
            f"{run}: is the evaluation of a robomimic checkpoint,"
            f" {document[SECTION]['checkpoint']}; take that file"
        )
    loaded = load_policy(run, checkpoint=checkpoint)
    policy = loaded.policy
    if not isinstance(policy, RobomimicPolicy):
        known = ", ".join(
            name for name in POLICIES.names() if issubclass(POLICIES[name], RobomimicPolicy)
        )
        raise UserError(
            f"{run}: robomimic has no counterpart of policy {policy.name}; it has one of {known}"
        )
    if policy.config.horizon != 1 and not policy.sequence:
        raise UserError(
            f"{run}: predicts {policy.config.horizon} actions at once, robomimic one; train with"
            " horizon 1 to export"
        )
    if policy.config.action_normalization != "none":
        raise UserError(
            f"{run}: scales actions ({policy.config.action_normalization}), which robomimic 0.3"
            " does not; train with action_normalization none to export"
        )
    if policy.actions.rotations:
        raise UserError(
            f"{run}: predicts 6-D rotations, which robomimic 0.3 does not; train with rotation"
            " axis_angle to export"
        )
    if dotted := [key for key in (*policy.shapes.images, *policy.shapes.vectors) if "." in key]:
        raise UserError(
            f"{run}: reads {', '.join(dotted)}; robomimic's networks take no observation with a dot"
            " in its name"
        )
    config = _config(policy, document)
    shapes = network_shapes(policy.shapes, policy.shapes.images)
    contents = {
        "model": {
            f"policy.{name}": tensor.detach().clone()
            for name, tensor in policy.network.state_dict().items()
        },
        "config": config.dump(),
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
    with atomic_write(out) as aside:
        torch.save(contents, aside)
    return out


def _config(policy: RobomimicPolicy, document: dict[str, Any]) -> Any:
    """robomimic's configuration of the same training, as far as it has words for it."""
    import robomimic.algo  # noqa: F401
    from robomimic.config import config_factory

    options, train, optimizer = policy.options, document["train"], document["train"]["optimizer"]
    config = config_factory("bc")
    config.experiment.name = policy.name
    config.experiment.rollout.enabled = False
    dataset, filter_key = train["dataset"], train.get("filter_key")
    # one path is all that its release knows
    config.train.data = dataset if isinstance(dataset, str) else ", ".join(dataset)
    config.train.hdf5_filter_key = filter_key if isinstance(filter_key, str) else None
    config.train.hdf5_normalize_obs = True
    config.train.frame_stack = policy.config.n_obs_steps
    config.train.seq_length = policy.config.horizon
    config.train.batch_size = optimizer["batch_size"]
    config.train.seed = train["seed"]
    config.algo.optim_params.policy.learning_rate.initial = optimizer["lr"]
    config.algo.actor_layer_dims = list(policy.layer_dims)
    mixture = config.algo.gaussian if policy.name == "bc_gaussian" else config.algo.gmm
    network = {"bc_rnn_gmm": config.algo.rnn, "bc_transformer_gmm": config.algo.transformer}.get(
        policy.name
    )
    for section in (mixture, network):
        if section is not None:
            section.enabled = True
            for name in options:
                if name in section:
                    section[name] = options[name]
    if policy.name == "bc_rnn_gmm":
        config.algo.rnn.horizon = policy.config.horizon
    config.algo.transformer.context_length = policy.config.n_obs_steps
    config.observation.modalities.obs.rgb = list(policy.shapes.images)
    config.observation.modalities.obs.low_dim = list(policy.shapes.vectors)
    with config.unlocked():
        rgb = config.observation.encoder.rgb
        ours = encoder_kwargs(policy.config, options)["rgb"]
        rgb.core_class, rgb.core_kwargs = ours["core_class"], ours["core_kwargs"]
        crop = policy.config.crop
        if crop and any(size != (crop, crop) for size in policy.shapes.images.values()):
            rgb.obs_randomizer_class = "CropRandomizer"
            rgb.obs_randomizer_kwargs = {
                "crop_height": crop,
                "crop_width": crop,
                "num_crops": 1,
                "pos_enc": False,
            }
    return config


def _statistics(policy: RobomimicPolicy) -> dict[str, dict[str, Any]]:
    """What robomimic subtracts and divides by; images stay as they are, for which it
    wants zeros and ones of their shape.

    Each with a leading dimension of the stacked frames: 1 is usual, and robomimic's
    rollouts refuse it for more.
    """
    statistics: dict[str, dict[str, Any]] = {}
    frames = policy.config.n_obs_steps
    for key, (height, width) in policy.shapes.images.items():
        zeros = torch.zeros(frames, 3, height, width)
        statistics[key] = {"mean": zeros.tolist(), "std": (zeros + 1).tolist()}
    for key, normalizer in policy.observations.vector_normalizers().items():
        offset, scale = normalizer.offset.expand(frames, -1), normalizer.scale.expand(frames, -1)
        statistics[key] = {"mean": offset.tolist(), "std": scale.tolist()}
    return statistics
