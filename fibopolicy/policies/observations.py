"""Raw observations to features: check, crop and scale, encode, join. Every policy begins here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast, get_args

import torch
from torch import Tensor, nn

from fibopolicy.encoders import Encoder, build_encoder
from fibopolicy.encoders.base import encoder_options
from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.actions import Normalizer
from fibopolicy.policies.base import PolicyConfig, Shapes, Statistics, Views
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.tasks import TASK_FEATURES, TaskEncoder

VIEWS = get_args(Views)


def module_name(key: str) -> str:
    """An observation key as the name of a module, which may not hold a dot."""
    return key.replace(".", "|")


class ObservationPreprocessor(nn.Module):
    """Crops or shifts frames and scales them to [0, 1]; normalises vectors; encodes the
    task, if the policy is conditioned on it.

    In training mode frames are augmented: a random crop or shift per sample and camera,
    the same for all T_o frames. In evaluation mode crops are central.

    Args:
        sequence: also accept `n_obs_steps + horizon - 1` observations, see
            `Policy.sequence`.

    Attributes:
        image_sizes: (H', W') per camera after the crop.
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes, *, sequence: bool = False) -> None:
        super().__init__()
        self.shift, self.shapes = config.shift, shapes
        self.lengths = {config.n_obs_steps}
        if sequence:
            self.lengths.add(config.n_obs_steps + config.horizon - 1)
        for camera, size in shapes.images.items():
            if config.crop is not None and config.crop > min(size):
                raise UserError(
                    f"crop {config.crop} does not fit camera {camera} of {size[0]} x {size[1]}"
                    " pixels"
                )
        crop = (config.crop, config.crop) if config.crop else None
        self.image_sizes = {camera: crop or size for camera, size in shapes.images.items()}
        # In the order of `shapes.vectors`: a dataset's key may hold a dot, a module's
        # name may not.
        self.normalizers = nn.ModuleList(
            Normalizer(dim, "gaussian") for dim in shapes.vectors.values()
        )
        self.tasks = TaskEncoder(shapes.tasks, shapes.task_dim) if shapes.tasks else None

    def vector_normalizers(self) -> dict[str, Normalizer]:
        """The normalizer of each vector key."""
        normalizers = cast(list[Normalizer], self.normalizers)
        return dict(zip(self.shapes.vectors, normalizers, strict=True))

    def fit(self, statistics: Statistics) -> None:
        for key, normalizer in self.vector_normalizers().items():
            normalizer.fit(statistics[key])

    def prepare(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        """Prepare every observation that the policy reads.

        Args:
            obs: camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float `(B, T_o, D)`.
            rng: generator of the augmentation.

        Returns:
            Camera keys float `(B, T_o, 3, H', W')` in [0, 1], vector keys `(B, T_o,
            D)`, and `task_index` `(B, T_o, F)` if the policy is conditioned on it.

        Raises:
            UserError: the observations differ from those of training, see
                `check_observations`.
        """
        check_observations(obs, self.shapes, self.lengths)
        prepared = {}
        for camera, size in self.image_sizes.items():
            images = self._frames(obs[camera], size, rng)
            prepared[camera] = images.view(*obs[camera].shape[:2], *images.shape[1:])
        for key, normalizer in self.vector_normalizers().items():
            prepared[key] = normalizer(obs[key].to(normalizer.offset.dtype))
        if self.tasks is not None:
            batch, steps = obs[self.shapes.keys[0]].shape[:2]
            task = self.tasks(obs, batch)  # (B, F)
            prepared["task_index"] = task.unsqueeze(1).expand(-1, steps, -1)
        return prepared

    def encoder_input(self, camera: str, frames: Tensor) -> Tensor:
        """Prepare frames of one camera: uint8 `(T, H, W, 3)` to float `(T, 3, H', W')`.

        Raises:
            UserError: the frames differ in size or type from those of training.
        """
        seen = Shapes({camera: self.shapes.images[camera]}, {}, self.shapes.action_dim)
        check_observations({camera: frames[None]}, seen, {len(frames)})
        return self._frames(frames[None], self.image_sizes[camera])

    def _frames(self, frames: Tensor, size: tuple[int, int], rng: SampleRng = GLOBAL_RNG) -> Tensor:
        """uint8 `(B, T_o, H, W, 3)` to float `(B * T_o, 3, *size)` in [0, 1]."""
        height, width = frames.shape[2:4]
        if self.training and (self.shift or size != (height, width)):
            frames = _random_window(frames, size, self.shift, rng)
        elif size != (height, width):
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
            frames = frames[:, :, top : top + size[0], left : left + size[1]]
        return frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255


class ObservationEncoder(ObservationPreprocessor):
    """Encodes all cameras, appends the vectors and the task, and joins the T_o
    observations.

    `config.views` says how several cameras are encoded: "separate", one encoder each;
    "shared", one encoder applied to each; "joint", one encoder whose token sequence
    holds the patches of all cameras, so that attention crosses cameras.

    Attributes:
        output_dim: `n_obs_steps` times the features of one observation, F.
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.cameras, self.views = tuple(shapes.images), config.views
        encoders = _build_encoders(config, self.image_sizes)
        self.encoders = nn.ModuleList(encoders)
        calls = len(self.cameras) if self.views == "shared" else 1  # per encoder
        feature_dim = calls * sum(encoder.output_dim for encoder in encoders)
        feature_dim += sum(vector_dims(shapes).values())
        self.output_dim = config.n_obs_steps * feature_dim

    def encoder_of(self, camera: str) -> nn.Module:
        """The encoder of a camera's frames; with joint views, the one of all cameras."""
        return self.encoders[self.cameras.index(camera) if self.views == "separate" else 0]

    def forward(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Tensor:
        """Observations as in `prepare` to features `(B, output_dim)`."""
        prepared = {key: x.flatten(0, 1) for key, x in self.prepare(obs, rng).items()}
        vectors = [prepared[key] for key in vector_dims(self.shapes)]
        features = torch.cat([*self.encode(prepared), *vectors], dim=-1)  # (B * T_o, F)
        return features.reshape(len(obs[self.shapes.keys[0]]), -1)

    def encode(self, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Camera keys float `(B * T_o, 3, H', W')` in [0, 1] to features
        `(B * T_o, F_i)`, one per camera.
        """
        frames = [images[camera] for camera in self.cameras]
        if not frames:
            return []
        if self.views == "joint":
            _, feature = self.encoders[0](torch.stack(frames, dim=1))
            return [feature]
        if self.views == "shared":
            _, feature = self.encoders[0](torch.cat(frames))  # (cameras * B * T_o, F_i)
            return list(feature.chunk(len(frames)))
        features = []
        for encoder, frame in zip(self.encoders, frames, strict=True):
            _, feature = encoder(frame)
            features.append(feature)
        return features


def vector_dims(shapes: Shapes) -> dict[str, int]:
    """The size of each prepared vector, the task's included."""
    return {**shapes.vectors, **({"task_index": TASK_FEATURES} if shapes.tasks else {})}


def _build_encoders(config: PolicyConfig, sizes: Mapping[str, tuple[int, int]]) -> list[Encoder]:
    """One encoder per camera for separate views, else one for all; none without cameras."""
    options = dict(config.encoder_options)
    if config.views not in VIEWS:
        raise unknown("views", config.views, VIEWS)
    if config.views == "separate":
        return [build_encoder(config.encoder, image_size=s, **options) for s in sizes.values()]
    if len(set(sizes.values())) > 1:
        raise UserError(
            f"views={config.views!r} needs cameras of one size, got {dict(sizes)}; use"
            " views='separate'"
        )
    if config.views == "joint":
        if "num_views" not in encoder_options(config.encoder):
            raise UserError(
                "views='joint' needs an encoder with one token sequence for all cameras;"
                f" {config.encoder} has none"
            )
        options["num_views"] = len(sizes)
    return [build_encoder(config.encoder, image_size=s, **options) for s in set(sizes.values())]


def check_observations(obs: Mapping[str, Tensor], shapes: Shapes, lengths: Collection[int]) -> None:
    """Check that observations are like those that a policy was trained on.

    Args:
        obs: camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float `(B, T_o, D)`;
            keys that the policy does not read are ignored.
        shapes: what the policy reads.
        lengths: the values of T_o that it accepts.

    Raises:
        UserError: a key is missing or has another type, size or layout, or B and T_o
            differ between keys or are not accepted.
    """
    known = ", ".join(shapes.keys)
    if not isinstance(obs, Mapping):
        raise UserError(
            f"observations are of type {type(obs).__name__}, the policy reads a mapping with"
            f" {known}"
        )
    first: tuple[int, int] | None = None
    for key in shapes.keys:
        value = obs.get(key)
        if not isinstance(value, Tensor):
            found = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise UserError(f"observation {key!r} {found}; the policy reads tensors {known}")
        if key in shapes.images:
            size: tuple[int, ...] = (*shapes.images[key], 3)
            fits, expected = value.dtype == torch.uint8, "uint8 in 0..255"
            advice = "resize the frames, channels last"
        else:
            size = (shapes.vectors[key],)
            fits, expected = value.dtype.is_floating_point, "floating-point numbers"
            advice = "another robot, task or simulator version may differ"
        if not fits:
            raise UserError(f"observation {key!r} holds {value.dtype}, the policy reads {expected}")
        if value.ndim != 2 + len(size) or value.shape[2:] != size:
            raise UserError(
                f"observation {key!r} has shape {tuple(value.shape)}, the policy was trained on"
                f" (B, T_o, {', '.join(map(str, size))}); {advice}"
            )
        batch, steps = value.shape[:2]
        first = first or (batch, steps)
        if (batch, steps) != first or steps not in lengths or batch == 0:
            raise UserError(
                f"observation {key!r} holds {batch} episodes x {steps} steps; expected"
                f" {max(first[0], 1)} episodes, as for all keys, and"
                f" {' or '.join(map(str, sorted(lengths)))} steps"
            )


def _random_window(frames: Tensor, size: tuple[int, int], shift: int, rng: SampleRng) -> Tensor:
    """A window of `size` at a random place in each sample's frames.

    Beyond the edge of a frame, by at most `shift` pixels, the edge is repeated.
    """
    b, device = len(frames), frames.device
    index = []
    for full, part in zip(frames.shape[2:4], size, strict=True):
        start = rng.randint(-shift, full - part + shift + 1, b, 1, device=device)  # (B, 1)
        index.append((start + torch.arange(part, device=device)).clamp(0, full - 1))  # (B, part)
    rows, columns = index[0][:, :, None], index[1][:, None, :]
    sample = torch.arange(b, device=device)[:, None, None]
    window = frames[sample, :, rows, columns]  # (B, h, w, T_o, 3): indexed dimensions come first
    return window.permute(0, 3, 1, 2, 4)
