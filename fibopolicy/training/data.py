"""The windows that a configuration asks for: those to train on, and those to validate on."""

from __future__ import annotations

import math
from pathlib import Path

from fibopolicy.datasets import DemoFile, Mixture, WindowDataset, Windows
from fibopolicy.datasets.absolute import is_absolute, rotation_columns
from fibopolicy.datasets.mixture import check_weights
from fibopolicy.datasets.windows import share_at_limits
from fibopolicy.errors import UserError, quoted, unknown
from fibopolicy.policies import Policy, Shapes
from fibopolicy.policies.base import policy_class
from fibopolicy.training.config import PROPRIOCEPTION, TrainConfig

#: A head's least standard deviation, and the share of an action at its limits, that do not go together.
NARROW, PILED = 0.01, 0.5
#: As a filter key: every demo, also of a file that has filter keys.
ALL = "all"


def open_dataset(config: TrainConfig) -> Windows:
    """Resolve what the configuration leaves open against the first file, check the files, and cut them into windows."""
    if config.weights is not None:
        check_weights(config.weights, [path for path, _ in config.files])
    cameras, vectors = _keys(config)
    parts = [_windows(config, path, cameras, vectors, _filter_key(path, asked)) for path, asked in config.files]
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, config.weights)


def open_validation(config: TrainConfig, dataset: Windows) -> Windows | None:
    """The demos of `config.validation.validate_on`, in every file that has this filter key; `None` where none is asked for.

    Raises:
        UserError: no file has the key, or training sees some of its demos.
    """
    key = config.validation.validate_on
    if key is None:
        return None
    trained = _parts(dataset)
    parts: dict[Path, WindowDataset] = {}
    known: set[str] = set()
    for path in dict.fromkeys(part.path.resolve() for part in trained):
        with DemoFile(path) as file:
            known |= file.filter_keys.keys()
            if key not in file.filter_keys:
                continue
            held_out = set(file.select(key))
        for part in trained:
            if part.path.resolve() == path and (seen := held_out.intersection(part.demos)):
                raise UserError(
                    f"{part.path}: {len(seen)} of {len(held_out)} demos of filter key {key!r} are trained on as well, say"
                    f" {min(seen)}; a validation on them would flatter: choose another --filter-key or --validate-on, or make"
                    " both with `fibopolicy split`"
                )
        parts[path] = _windows(config, path, dataset.cameras, dataset.vectors, key)
    if not parts:
        raise UserError(f"validate_on: {unknown('filter key', key, known)}; `fibopolicy split` makes train and valid")
    windows = list(parts.values())
    return windows[0] if len(windows) == 1 else Mixture(windows)


def shapes_of(dataset: Windows) -> Shapes:
    images = {camera: (shape[0], shape[1]) for camera, shape in dataset.image_shapes.items()}
    task, dim = dataset.env_args, dataset.action_dim
    return Shapes(images, dict(dataset.vector_dims), dim, is_absolute(task), rotation_columns(task, dim))


def narrow_distributions(policy: Policy, dataset: Windows) -> list[str]:
    """Warnings of files where a likelihood can be had from actions that repeat instead of from what the cameras show.

    Actions of two values, as a gripper's, are left out: they are the same in human demonstrations, which learn well.
    """
    options = getattr(policy, "options", {})
    if options.get("min_std", math.inf) > NARROW or options.get("fixed_std"):
        return []
    told = []
    for part in _parts(dataset):
        shares = share_at_limits(part.actions)
        shares[shares == 1] = 0
        dim = int(shares.argmax())
        if shares[dim] >= PILED:
            told.append(
                f"{part.path}: {shares[dim]:.0%} of action {dim} lie at its limits, where {policy.name} with min_std"
                f" {options['min_std']:g} gains more from narrow distributions than from what it sees, and may not learn the"
                " task; try --head-options min_std 0.05, see docs/heads.md"
            )
    return told


def _parts(dataset: Windows) -> tuple[WindowDataset, ...]:
    return dataset.parts if isinstance(dataset, Mixture) else (dataset,)


def _keys(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cameras and vectors: those asked for, or those of the first file."""
    path, _ = config.files[0]
    with DemoFile(path) as file:
        # What looks like an image but is none (floats, channels first) is an error to be told.
        images = tuple(
            k for k, (shape, dtype) in file.obs.items() if k.endswith("_image") or (len(shape) == 3 and dtype == "uint8")
        )
        cameras = images if config.cameras is None else config.cameras
        vectors = tuple(k for k in PROPRIOCEPTION if k in file.vector_keys) if config.vectors is None else config.vectors
    if not cameras and config.cameras is None:
        raise UserError(
            f"{path}: holds no images for the encoder to see; make them with `fibopolicy render {quoted(path)}"
            " --out NEW`, or pass an empty --cameras to train on vectors alone"
        )
    if not cameras and not vectors:
        raise UserError(f"{path}: holds neither images nor known proprioception; name --vectors to train on")
    return cameras, vectors


def _filter_key(path: Path, asked: str | None) -> str | None:
    with DemoFile(path) as file:
        if asked is None:
            return "train" if "train" in file.filter_keys else None
        return None if asked == ALL and ALL not in file.filter_keys else asked


def _windows(
    config: TrainConfig, path: Path, cameras: tuple[str, ...], vectors: tuple[str, ...], filter_key: str | None
) -> WindowDataset:
    return WindowDataset(
        path,
        cameras=cameras,
        vectors=vectors,
        filter_key=filter_key,
        chunk=config.policy.chunk,
        history=config.policy.history,
        sequence=policy_class(config.policy.head).sequence,
    )
