"""The encoders of a policy in training: initial weights, freezing, memory, compilation."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fibopolicy.encoders import Encoder
from fibopolicy.encoders.timm import TimmEncoder
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.observations import ObservationEncoder, module_name
from fibopolicy.policies.run_directory import load_policy, load_strictly

ADVICE = (
    "build the encoder with the options that these weights were trained with, or name other weights"
)


def encoders_of(policy: nn.Module) -> list[Encoder]:
    """All encoders, in the order of the policy's modules."""
    return [module for module in policy.modules() if isinstance(module, Encoder)]


def camera_encoders(policy: Policy) -> dict[str, Encoder]:
    """The encoder of each camera; cameras may share one."""
    for module in policy.modules():
        if isinstance(module, ObservationEncoder):
            found: dict[str, Any] = {key: module.encoder_of(key) for key in policy.shapes.images}
            return found
    # robomimic's networks keep one encoder per camera under its name.
    named = {tuple(n.split(".")): m for n, m in policy.named_modules() if isinstance(m, Encoder)}
    return {
        camera: encoder
        for camera in policy.shapes.images
        for names, encoder in named.items()
        if module_name(camera) in names
    }


def freeze(policy: nn.Module) -> None:
    """Give the encoders no gradients; `training_mode` keeps them in evaluation mode."""
    for encoder in encoders_of(policy):
        encoder.requires_grad_(False)


def training_mode(policy: nn.Module) -> None:
    """`train()`, but frozen encoders stay in evaluation mode: no dropout, no statistics."""
    policy.train()
    for encoder in encoders_of(policy):
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()


def checkpoint_gradients(policy: nn.Module) -> None:
    """See `Encoder.checkpoint_gradients`."""
    for encoder in encoders_of(policy):
        encoder.checkpoint_gradients()


def compile_encoders(policy: nn.Module, device: torch.device) -> None:
    """Compile in place, including the sparse attention kernel; weights keep their
    names.

    Raises:
        UserError: on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX") or "g++"  # as torch chooses
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a C++ compiler on a CPU and found no {compiler}; install g++, or"
            " leave --compile out"
        )
    for encoder in encoders_of(policy):
        encoder.compile()


def load_encoder_weights(policy: Policy, source: Path) -> None:
    """Copy weights into the policy's encoders.

    Args:
        source: a run directory or a file. A run gives each camera its averaged encoder,
            or every camera its only encoder. A file (.safetensors, else a `torch.save`
            of tensors only) holds one encoder for every camera, under the encoder's
            own names or, for "timm:<name>", those of the timm model. The classifier of
            a timm model is left out, and its positions, of square images, are resampled
            to the image size. A prefix of DataParallel or torch.compile is dropped.

    Raises:
        UserError: no such source; it cannot be read without running code; weights are
            missing, unknown or of another shape.
    """
    encoders = camera_encoders(policy)
    if not encoders:
        raise UserError(
            f"{source}: the policy sees no images, so it has no encoder for these weights"
        )
    if not source.is_dir():
        tensors = _without_prefix(_read(source))
        for encoder in encoders.values():
            fitted = _from_timm(encoder, tensors) if isinstance(encoder, TimmEncoder) else tensors
            load_strictly(encoder, fitted, source, ADVICE)
        return
    trained = camera_encoders(load_policy(source).policy)
    only = next(iter(trained.values())) if len({id(e) for e in trained.values()}) == 1 else None
    for camera, encoder in encoders.items():
        found = trained.get(camera, only)
        if found is None:
            raise UserError(
                f"{source}: has encoders for {', '.join(trained) or 'no camera'}, none for {camera}"
            )
        load_strictly(encoder, found.state_dict(), f"{source}: {camera}", ADVICE)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or run directory; name the weights to start the encoder from"
        )
    document: Any
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        document = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch reads any bytes as a pickle, which may fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); save them as safetensors"
        ) from error
    for key in ("state_dict", "model"):  # wrappers of timm and many other libraries
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
    if not isinstance(document, Mapping) or not all(
        isinstance(value, Tensor) for value in document.values()
    ):
        raise UserError(
            f"{path}: holds no mapping from names to tensors; save the encoder's state_dict()"
        )
    return {str(name): value for name, value in document.items()}


def _without_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Strip the prefix that DataParallel or torch.compile adds to every name."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_prefix({n.removeprefix(prefix): t for n, t in tensors.items()})
    return tensors


def _from_timm(encoder: TimmEncoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a timm model, or of our encoder around it, under our encoder's names."""
    if all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    classifier = encoder.model.default_cfg.get("classifier") or ()
    classifiers = [classifier] if isinstance(classifier, str) else classifier
    unused = tuple(f"{name}." for name in classifiers)
    own = encoder.model.state_dict()
    fitted = {n: value for n, value in tensors.items() if n in own or not n.startswith(unused)}
    old, new = fitted.get("pos_embed"), own.get("pos_embed")
    grid = getattr(getattr(encoder.model, "patch_embed", None), "grid_size", None)
    if grid and old is not None and new is not None and old.shape != new.shape and old.ndim == 3:
        from timm.layers import resample_abs_pos_embed

        prefix = new.shape[1] - math.prod(grid)
        fitted["pos_embed"] = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)
    return {f"model.{name}": value for name, value in fitted.items()}
