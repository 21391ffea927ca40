"""Encoders that do not start from scratch: weights from a run of ours, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fibopolicy.encoders import Encoder
from fibopolicy.encoders.timm import TimmEncoder
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.policies.robomimic_head import module_name
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.weights import load_strictly

ADVICE = (
    "build the encoder with the options that these weights were trained with, or name other weights"
)


def load_encoder_weights(policy: Policy, source: Path) -> None:
    """Copies weights into the policy's encoders.

    Args:
        source: a run directory, whose averaged encoders are taken, camera by camera, or
            its only one for every camera; or a file (.safetensors, else a `torch.save`
            of tensors alone) of one encoder, which every camera gets: under the
            encoder's own names or, for "timm:<name>", those of the timm model. A timm
            classifier is left out, and positions are resampled to the size of the
            images. A prefix of DataParallel or torch.compile before all names is
            dropped.

    Raises:
        UserError: no such source; it cannot be read without running code; weights are
            missing, unknown or of another shape.
    """
    ours = camera_encoders(policy)
    if not ours:
        raise UserError(
            f"{source}: the policy sees no images, so it has no encoder to take these weights"
        )
    if source.is_dir():
        theirs = camera_encoders(load_policy(source).policy)
        alone = len({id(encoder) for encoder in theirs.values()}) == 1
        for camera, encoder in ours.items():
            if camera not in theirs and not alone:
                raise UserError(
                    f"{source}: has encoders for {', '.join(theirs) or 'no camera'}, none for"
                    f" {camera}"
                )
            found = theirs[camera] if camera in theirs else next(iter(theirs.values()))
            load_strictly(encoder, found.state_dict(), f"{source}: {camera}", ADVICE)
    else:
        tensors = _unwrapped(_read(source))
        for encoder in ours.values():
            fitted = _of_timm(encoder, tensors) if isinstance(encoder, TimmEncoder) else tensors
            load_strictly(encoder, fitted, source, ADVICE)


def camera_encoders(policy: Policy) -> dict[str, Encoder]:
    """The encoder that sees each camera; cameras may share one."""
    joined = next(
        (module for module in policy.modules() if isinstance(module, ObservationEncoder)), None
    )
    named = {name: module for name, module in policy.named_modules() if isinstance(module, Encoder)}
    every: dict[str, Any] = {}
    for camera in policy.shapes.images:
        # robomimic's networks keep one encoder per camera under its name
        every[camera] = (
            joined.encoder_of(camera)
            if joined
            else next(m for n, m in named.items() if module_name(camera) in n.split("."))
        )
    return every


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or run directory; name the weights to start the encoder from"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        document = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch reads any bytes as a pickle, which may fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); save them as safetensors"
        ) from error
    for key in ("state_dict", "model"):  # as timm's and many other trainings wrap them
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
    if not isinstance(document, Mapping) or not all(
        isinstance(value, Tensor) for value in document.values()
    ):
        raise UserError(
            f"{path}: holds no mapping from names to tensors; save the encoder's state_dict()"
        )
    return {str(name): value for name, value in document.items()}


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without what DataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _of_timm(encoder: TimmEncoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm model's weights under the names of our encoder around it; weights that
    have those names already as they are.
    """
    if all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    classifier = encoder.model.default_cfg.get("classifier") or ()
    heads = tuple(
        f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier)
    )
    own = encoder.model.state_dict()
    fitted = {
        name: value for name, value in tensors.items() if name in own or not name.startswith(heads)
    }
    positions = fitted.get("pos_embed")
    if (
        positions is not None
        and "pos_embed" in own
        and positions.shape != own["pos_embed"].shape
        and positions.ndim == 3
    ):
        from timm.layers import resample_abs_pos_embed

        prefix = 0 if encoder.model.no_embed_class else encoder.prefix
        grid = list(encoder.model.patch_embed.grid_size)
        fitted["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    return {f"model.{name}": value for name, value in fitted.items()}
