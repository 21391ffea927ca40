"""The windows that a configuration asks for: those to train on, and those to validate on."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fibopolicy.datasets import DemoFile, Mixture, WindowDataset, Windows
from fibopolicy.datasets.absolute import is_absolute, rotation_columns
from fibopolicy.datasets.mixture import check_weights
from fibopolicy.datasets.proprioception import proprioception
from fibopolicy.datasets.structure import check_structure
from fibopolicy.datasets.validate import ACTION_TOLERANCE
from fibopolicy.datasets.windows import share_at_limits
from fibopolicy.errors import UserError, quoted, unknown
from fibopolicy.policies import Policy, Shapes
from fibopolicy.policies.base import POLICIES
from fibopolicy.training.config import TrainConfig

#: A head's least standard deviation, and the share of an action at its limits, that do
#: not go together.
NARROW, PILED = 0.01, 0.5
#: As a filter key: every demo, also of a file that has filter keys.
ALL = "all"


def open_dataset(config: TrainConfig) -> Windows:
    """Resolve what the configuration leaves open against the first file, check the
    files, and cut them into windows.
    """
    if config.weights is not None:
        check_weights(config.weights, [path for path, _ in config.files])
    for path, _ in config.files:
        check_structure(path)
    with ExitStack() as stack:
        # Once each, since opening a file looks at all of its demos.
        files = {
            path: stack.enter_context(DemoFile(path))
            for path in dict.fromkeys(path for path, _ in config.files)
        }
        cameras, vectors = _keys(config, files[config.files[0][0]])
        parts = [
            _windows(config, files[path], cameras, vectors, _filter_key(files[path], asked))
            for path, asked in config.files
        ]
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, config.weights)


def open_validation(config: TrainConfig, dataset: Windows) -> Windows | None:
    """The demos of `config.validation.validate_on`, in every file that has this filter
    key; `None` where none is asked for.

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
                        f"{part.path}: {len(seen)} of {len(held_out)} demos of filter key {key!r}"
                        f" are trained on as well, say {min(seen)}; a validation on them would"
                        " flatter: choose another --filter-key or --validate-on, or make both with"
                        " `fibopolicy split`"
                    )
            parts[path] = _windows(config, file, dataset.cameras, dataset.vectors, key)
    if not parts:
        raise UserError(
            f"validate_on: {unknown('filter key', key, known)}; `fibopolicy split` makes train and"
            " valid"
        )
    windows = list(parts.values())
    return windows[0] if len(windows) == 1 else Mixture(windows)


def shapes_of(dataset: Windows) -> Shapes:
    images = {camera: (shape[0], shape[1]) for camera, shape in dataset.image_shapes.items()}
    task, dim = dataset.env_args, dataset.action_dim
    largest = max(np.abs(dataset.stats["actions"][name]).max() for name in ("min", "max"))
    unbounded = is_absolute(task) or bool(largest > 1 + ACTION_TOLERANCE)
    return Shapes(images, dict(dataset.vector_dims), dim, unbounded, rotation_columns(task, dim))


def narrow_distributions(policy: Policy, dataset: Windows) -> list[str]:
    """Warnings of files where a likelihood can be had from actions that repeat instead
    of from what the cameras show.

    Actions of two values, as a gripper's, are left out: they are the same in human
    demonstrations, which learn well.
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
                f"{part.path}: {shares[dim]:.0%} of action {dim} lie at its limits, where"
                f" {policy.name} with min_std {options['min_std']:g} gains more from narrow"
                " distributions than from what it sees, and may not learn the task; try"
                " --head-options min_std 0.05, see docs/heads.md"
            )
    return told


def _parts(dataset: Windows) -> tuple[WindowDataset, ...]:
    return dataset.parts if isinstance(dataset, Mixture) else (dataset,)


def _keys(config: TrainConfig, file: DemoFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cameras and vectors: those asked for, or those of the first file."""
    cameras = file.image_keys if config.cameras is None else config.cameras
    vectors = proprioception(file.vector_keys) if config.vectors is None else config.vectors
    refused = {
        key: reason
        for key, reason in file.unreadable.items()
        if config.cameras is None and _is_colour(file, key)
    }
    if refused and cameras:
        key, reason = next(iter(refused.items()))
        raise file.error(
            f"{key} is {reason}; convert it, or leave it out with --cameras"
            f" {' '.join(map(quoted, cameras))}"
        )
    if not cameras and config.cameras is None:
        told = "".join(f"; {key} is {reason}" for key, reason in file.unreadable.items())
        raise file.error(
            f"holds no images for the encoder to see{told}; {file.frames_advice}, or pass an empty"
            " --cameras to train on vectors alone"
        )
    if not cameras and not vectors:
        raise file.error(
            "holds neither images nor known proprioception; name --vectors to train on, of"
            f" {', '.join(file.vector_keys)}"
        )
    return cameras, vectors


def left_out(dataset: Windows) -> list[str]:
    """One line for each file that holds observations which training does not read."""
    unread = {part.path: part.left_out for part in _parts(dataset)}
    return [
        f"{path}: not read: {', '.join(keys)}; --cameras and --vectors choose"
        for path, keys in unread.items()
        if keys
    ]


def _is_colour(file: DemoFile, key: str) -> bool:
    """Whether an observation that cannot be read looks like a camera's frames, which
    nobody leaves out on purpose.
    """
    shape, dtype = file.obs[key]
    named = any(word in key.rpartition("/")[2].lower() for word in ("image", "rgb"))
    return (
        len(shape) == 3
        and (shape[0] in (3, 4) or shape[-1] in (3, 4))
        and (named or dtype == np.uint8)
    )


def _filter_key(file: DemoFile, asked: str | None) -> str | None:
    if asked is None:
        return "train" if "train" in file.filter_keys else None
    return None if asked == ALL and ALL not in file.filter_keys else asked


def _windows(
    config: TrainConfig,
    file: DemoFile,
    cameras: tuple[str, ...],
    vectors: tuple[str, ...],
    filter_key: str | None,
) -> WindowDataset:
    return WindowDataset(
        file,
        cameras=cameras,
        vectors=vectors,
        filter_key=filter_key,
        chunk=config.policy.chunk,
        history=config.policy.history,
        sequence=POLICIES[config.policy.head].sequence,
    )
