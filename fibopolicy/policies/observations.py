"""From a batch of raw observations to what a head reads; shared by every head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fibopolicy.encoders import ObservationEncoder
from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig, Shapes, Statistics
from fibopolicy.policies.normalizer import Normalizer
from fibopolicy.policies.per_sample import per_sample


def check_observations(obs: Mapping[str, Tensor], shapes: Shapes, steps: tuple[int, ...]) -> None:
    """Check that observations are like those a policy was trained on; keys that it does
    not read are ignored.

    Args:
        obs: per camera uint8 `(B, T_o, H, W, 3)`, per vector floating `(B, T_o, D)`.
        shapes: what the policy reads.
        steps: the values of T_o that it takes.

    Raises:
        UserError: a key is missing, or has another type, size, layout, or other B and
            T_o than the first.
    """
    first: tuple[int, int] | None = None
    keys = (*shapes.images, *shapes.vectors)
    if not isinstance(obs, Mapping):
        raise UserError(
            f"observations are of type {type(obs).__name__}, the policy reads a mapping with"
            f" {', '.join(keys)}"
        )
    for key in keys:
        value = obs.get(key)
        if not isinstance(value, Tensor):
            found = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise UserError(
                f"observation {key!r} {found}; the policy reads tensors"
                f" {', '.join((*shapes.images, *shapes.vectors))}"
            )
        image = key in shapes.images
        size = (*shapes.images[key], 3) if image else (shapes.vectors[key],)
        if (value.dtype != torch.uint8) if image else (not value.dtype.is_floating_point):
            expected = "uint8 in 0..255" if image else "floating-point numbers"
            raise UserError(f"observation {key!r} holds {value.dtype}, the policy reads {expected}")
        shape = tuple(value.shape)
        if len(shape) != 2 + len(size) or shape[2:] != size:
            advice = (
                "resize the frames, channels last"
                if image
                else "another robot, task or simulator version may differ"
            )
            expected = f"(B, T_o, {', '.join(map(str, size))})"
            raise UserError(
                f"observation {key!r} has shape {shape}, the policy was trained on {expected};"
                f" {advice}"
            )
        first = first or (shape[0], shape[1])
        if shape[:2] != first or shape[1] not in steps or not shape[0]:
            raise UserError(
                f"observation {key!r} holds {shape[0]} episodes x {shape[1]} steps; expected"
                f" {max(first[0], 1)} episodes, as for all keys, and {' or '.join(map(str, steps))}"
                " steps"
            )


class ObservationInputs(nn.Module):
    """Crop or shift and scale the frames; normalise the vectors. In training mode
    frames are augmented: one offset per sample and camera, the same for all T_o frames.

    Args:
        sequence: as the policy's, see `Policy`: a training batch holds history + chunk
            - 1 observations.
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes, *, sequence: bool = False) -> None:
        super().__init__()
        self.shift, self.history, self.shapes = config.shift, config.history, shapes
        self.steps = (
            (config.history, config.history + config.chunk - 1) if sequence else (config.history,)
        )
        for camera, size in shapes.images.items():
            if config.crop is not None and config.crop > min(size):
                raise UserError(
                    f"crop {config.crop} does not fit camera {camera} of {size[0]} x {size[1]}"
                    " pixels"
                )
        self.sizes = {
            c: (config.crop, config.crop) if config.crop else s for c, s in shapes.images.items()
        }
        # By position: a key of a dataset may hold a dot, which the name of a module may
        # not.
        self.vectors = tuple(shapes.vectors)
        self.normalizers = nn.ModuleList(
            Normalizer(dim, "gaussian") for dim in shapes.vectors.values()
        )

    def fit(self, statistics: Statistics) -> None:
        for key, normalizer in zip(self.vectors, self.normalizers, strict=True):
            cast(Normalizer, normalizer).fit(statistics[key])

    def prepare(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Camera keys uint8 `(B, T_o, H, W, 3)` to float `(B, T_o, 3, *sizes[key])` in
        [0, 1], vector keys `(B, T_o, D)`.

        Raises:
            UserError: the observations are not like those of training, see
                `check_observations`.
        """
        check_observations(obs, self.shapes, self.steps)
        images = {camera: self._frames(obs[camera], size) for camera, size in self.sizes.items()}
        images = {
            camera: frames.view(*obs[camera].shape[:2], *frames.shape[1:])
            for camera, frames in images.items()
        }
        for key, normalizer in zip(self.vectors, self.normalizers, strict=True):
            images[key] = normalizer(obs[key].to(cast(Normalizer, normalizer).offset.dtype))
        return images

    def encoder_input(self, camera: str, frames: Tensor) -> Tensor:
        """What the encoder sees of a camera's frames: uint8 `(T, H, W, 3)` -> float
        `(T, 3, H', W')` in [0, 1], cropped.

        Raises:
            UserError: frames of another size or type than those of training.
        """
        seen = Shapes({camera: self.shapes.images[camera]}, {}, self.shapes.action_dim)
        check_observations({camera: frames[None]}, seen, (len(frames),))
        return self._frames(frames[None], self.sizes[camera])

    def _frames(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 `(B, T_o, H, W, 3)` -> float `(B * T_o, 3, *size)` in [0, 1]."""
        full = (int(frames.shape[2]), int(frames.shape[3]))
        if self.training and (self.shift or size != full):
            frames = _window(frames, size, self.shift)
        elif size != full:
            top, left = (full[0] - size[0]) // 2, (full[1] - size[1]) // 2
            frames = frames[:, :, top : top + size[0], left : left + size[1]]
        return frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255


class ObservationFeatures(ObservationInputs):
    """Encode the prepared frames, append the vectors, join the history.

    `forward` takes camera keys uint8 `(B, T_o, H, W, 3)` and vector keys float32 `(B,
    T_o, D)` and returns `(B, output_dim)`; anything else is refused, see
    `check_observations`.
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.encoder = ObservationEncoder(
            config.encoder,
            config.encoder_options,
            self.sizes,
            sum(shapes.vectors.values()),
            config.views,
        )
        self.output_dim = config.history * self.encoder.output_dim

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        # (B * T_o, ...)
        prepared = {key: value.flatten(0, 1) for key, value in self.prepare(obs).items()}
        first = obs[next(iter((*self.sizes, *self.vectors)))]
        parts = [prepared[key] for key in self.vectors]
        rows = first.shape[0] * first.shape[1]
        vectors = torch.cat(parts, dim=-1) if parts else torch.zeros(rows, 0, device=first.device)
        # (B * T_o, F)
        features = self.encoder({camera: prepared[camera] for camera in self.sizes}, vectors)
        joined: Tensor = features.reshape(first.shape[0], -1)
        return joined


def _window(frames: Tensor, size: tuple[int, int], shift: int) -> Tensor:
    """A window of `size` at a random place of each sample's frames; beyond the edge,
    the edge is repeated.
    """
    b, device = frames.shape[0], frames.device
    index = []
    for full, part in ((frames.shape[2], size[0]), (frames.shape[3], size[1])):
        low, high = -shift, full - part + shift + 1
        start = per_sample(partial(_starts, low, high, device), b)  # (B, 1)
        index.append((start + torch.arange(part, device=device)).clamp(0, full - 1))  # (B, part)
    sample = torch.arange(b, device=device)
    # Indexed dimensions come first: (B, h, w, T_o, 3).
    picked = frames[sample[:, None, None], :, index[0][:, :, None], index[1][:, None, :]]
    return picked.permute(0, 3, 1, 2, 4)


def _starts(
    low: int, high: int, device: torch.device, rows: int, generator: torch.Generator | None
) -> Tensor:
    return torch.randint(low, high, (rows, 1), device=device, generator=generator)
