"""The windows of a configuration, for training and validation, as batches."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fibopolicy.datasets import DemoFile, Mixture, WindowDataset, Windows
from fibopolicy.datasets.conventions import is_absolute, proprioception, rotation_columns
from fibopolicy.datasets.layout import parse_map
from fibopolicy.datasets.structure import check_structure
from fibopolicy.datasets.validate import ACTION_TOLERANCE
from fibopolicy.datasets.windows import check_weights, share_at_limits, task_of
from fibopolicy.errors import UserError, message_of, quoted, unknown
from fibopolicy.policies import Policy, Shapes
from fibopolicy.policies.base import policy_class
from fibopolicy.training.config import TrainConfig
from fibopolicy.utils.files import expanded

#: With a `min_std` of at most `NARROW_STD`, a policy may not learn from actions of
#: which the share `AT_LIMITS` lies at their limits.
NARROW_STD, AT_LIMITS = 0.01, 0.5
#: `TrainConfig.task_embedding` without a file.
LEARNED = "learned"


def open_dataset(config: TrainConfig) -> Windows:
    """Check the files and cut them into windows.

    Settings that the configuration leaves open are resolved against the first file.
    """
    if config.dataset_weights is not None:
        check_weights(config.dataset_weights, [path for path, _ in config.files])
    paths = dict.fromkeys(path for path, _ in config.files)
    mapped = parse_map(config.map)
    for path in paths:
        check_structure(path)
    with ExitStack() as stack:
        # Open each file once, because opening it visits every demo.
        files = {path: stack.enter_context(DemoFile(path, mapped=mapped)) for path in paths}
        cameras, vectors = _keys(config, files[config.files[0][0]])
        chosen = [(files[path], files[path].training_key(asked)) for path, asked in config.files]
        tasks = _tasks(config, chosen, (*cameras, *vectors))
        parts = [_windows(config, file, cameras, vectors, key, tasks) for file, key in chosen]
    return parts[0] if len(parts) == 1 else Mixture(parts, config.dataset_weights)


def open_validation(config: TrainConfig, dataset: Windows) -> Windows | None:
    """The demos of `config.validation.validate_on` in every file with this filter key.

    `None` if the configuration asks for no validation.

    Raises:
        UserError: no file has the key, or some of its demos are trained on.
    """
    key = config.validation.validate_on
    if key is None:
        return None
    parts: list[WindowDataset] = []
    known: set[str] = set()
    for path in dict.fromkeys(part.path.resolve() for part in parts_of(dataset)):
        with DemoFile(path, mapped=parse_map(config.map)) as file:
            known |= file.filter_keys.keys()
            if key not in file.filter_keys:
                continue
            held_out = set(file.select(key))
            for part in parts_of(dataset):
                if part.path.resolve() == path and (seen := held_out.intersection(part.demos)):
                    raise UserError(
                        f"{part.path}: {len(seen)} of {len(held_out)} demos of filter key {key!r}"
                        f" are trained on as well, such as {min(seen)}, so their loss would be"
                        " too low; choose another --filter-key or --validate-on, or make both"
                        " with `fibopolicy split`"
                    )
            parts.append(
                _windows(config, file, dataset.cameras, dataset.vectors, key, dataset.tasks)
            )
    if not parts:
        raise UserError(
            f"validate_on: {unknown('filter key', key, known)}; `fibopolicy split` makes train and"
            " valid"
        )
    return parts[0] if len(parts) == 1 else Mixture(parts)


def parts_of(dataset: Windows) -> tuple[WindowDataset, ...]:
    """The windows of each file."""
    return dataset.parts if isinstance(dataset, Mixture) else (dataset,)


def _keys(config: TrainConfig, file: DemoFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cameras and vectors: those asked for, or those of the file."""
    cameras = file.image_keys if config.cameras is None else config.cameras
    vectors = proprioception(file.vector_keys) if config.vectors is None else config.vectors
    if config.cameras is None:
        unreadable = {key: why for key, why in file.unreadable.items() if _is_colour(file, key)}
        if cameras and unreadable:
            key, reason = next(iter(unreadable.items()))
            raise file.error(
                f"{key} is {reason}; convert it, or leave it out with --cameras"
                f" {' '.join(map(quoted, cameras))}"
            )
        if not cameras:
            reasons = "".join(f"; {key} is {reason}" for key, reason in file.unreadable.items())
            raise file.error(
                f"holds no images for the encoder{reasons}; {file.frames_advice}, or pass an empty"
                " --cameras to train on vectors only"
            )
    if not cameras and not vectors:
        raise file.error(
            "holds neither images nor known proprioception; name --vectors to train on, of"
            f" {', '.join(file.vector_keys)}"
        )
    return cameras, vectors


def _is_colour(file: DemoFile, key: str) -> bool:
    """Whether an unreadable observation looks like the frames of a camera."""
    shape, dtype = file.stored[key]
    named = any(word in key.rpartition("/")[2].lower() for word in ("image", "rgb"))
    channels = len(shape) == 3 and (shape[0] in (3, 4) or shape[-1] in (3, 4))
    return channels and (named or dtype == np.uint8)


def _tasks(
    config: TrainConfig, chosen: Iterable[tuple[DemoFile, str | None]], keys: Iterable[str]
) -> dict[str, NDArray[np.float32]]:
    """The vector that stands for each task of the chosen demos, if the policy is
    conditioned on the task.
    """
    if config.task_embedding is None:
        return {}
    if "task_index" in keys:
        raise UserError(
            "task_index is reserved for --task-embedding; omit that observation key with --vectors,"
            " or rename it with --map"
        )
    names = sorted({task_of(file, demo) for file, key in chosen for demo in file.select(key)})
    if config.task_embedding == LEARNED:
        return dict(zip(names, np.eye(len(names), dtype=np.float32), strict=True))
    stored = read_task_vectors(expanded(config.task_embedding))
    for name in names:
        if name not in stored:
            raise UserError(f"{config.task_embedding}: {unknown('task', name, stored)}")
    return {name: stored[name] for name in names}


def read_task_vectors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read an .npz file with a vector per task, all of one size.

    Raises:
        UserError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name].astype(np.float32) for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = message_of(error)[:120]
        raise UserError(
            f"{path}: is not an .npz file with a vector per task ({reason}); write one with"
            f" numpy.savez, or pass --task-embedding {LEARNED}"
        ) from error
    shapes = {vector.shape for vector in stored.values()}
    finite = all(np.isfinite(vector).all() for vector in stored.values())
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not finite:
        raise UserError(
            f"{path}: expected a finite vector (D,) per task, all of one size, got shapes"
            f" {', '.join(map(str, sorted(shapes))) or 'of no task'}"
        )
    return stored


def _windows(
    config: TrainConfig,
    file: DemoFile,
    cameras: tuple[str, ...],
    vectors: tuple[str, ...],
    filter_key: str | None,
    tasks: Mapping[str, NDArray[np.float32]],
) -> WindowDataset:
    size = config.image_size
    return WindowDataset(
        file,
        cameras=cameras,
        vectors=vectors,
        filter_key=filter_key,
        horizon=config.policy.horizon,
        n_obs_steps=config.policy.n_obs_steps,
        sequence=policy_class(config.policy.policy).sequence,
        image_size=(size, size) if isinstance(size, int) else size,
        tasks=tasks,
    )


def shapes_of(dataset: Windows) -> Shapes:
    """The shapes that a policy for this data is built with."""
    images = {camera: (shape[0], shape[1]) for camera, shape in dataset.image_shapes.items()}
    task, dim = dataset.env_args, dataset.action_dim
    largest = max(np.abs(dataset.stats["actions"][name]).max() for name in ("min", "max"))
    unbounded = is_absolute(task) or bool(largest > 1 + ACTION_TOLERANCE)
    return Shapes(
        images,
        dict(dataset.vector_dims),
        dim,
        unbounded,
        rotation_columns(task, dim),
        tasks=tuple(dataset.tasks),
        task_dim=max((len(vector) for vector in dataset.tasks.values()), default=0),
    )


def converted(dataset: Windows) -> list[str]:
    """One line per file with observations or actions that are not read as they are stored."""
    how = {part.path: part.converted for part in parts_of(dataset)}
    return [
        f"{path}: converted: {', '.join(f'{key} ({text})' for key, text in texts.items())}"
        for path, texts in how.items()
        if texts
    ]


def left_out(dataset: Windows) -> list[str]:
    """One line per file with observations that training does not read."""
    lines = []
    for path, keys in {part.path: part.left_out for part in parts_of(dataset)}.items():
        more = f" and {len(keys) - 8} more" * (len(keys) > 8)
        if keys:
            names = ", ".join(keys[:8]) + more
            lines.append(f"{path}: not read: {names}; choose with --cameras and --vectors")
    return lines


def narrow_distributions(policy: Policy, dataset: Windows) -> list[str]:
    """Warnings about files whose repeated actions raise a likelihood more than its
    images.

    Actions of two values, such as a gripper's, are excluded: they are the same in human
    demonstrations, from which policies learn well.
    """
    options = getattr(policy, "options", {})
    if options.get("min_std", math.inf) > NARROW_STD or options.get("fixed_std"):
        return []
    lines = []
    for part in parts_of(dataset):
        shares = share_at_limits(part.actions)
        shares[shares == 1] = 0
        dim = int(shares.argmax())
        if shares[dim] >= AT_LIMITS:
            lines.append(
                f"{part.path}: {shares[dim]:.0%} of action {dim} lie at its limits, where"
                f" {policy.name} with min_std {options['min_std']:g} gains more from narrow"
                " distributions than from its observations, and may not learn the task; try"
                " --policy-options min_std 0.05, see docs/guides/policies.md"
            )
    return lines


def mapped(batch: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """The same nested batch with `function` applied to each of its arrays or tensors."""
    return {
        key: mapped(value, function) if isinstance(value, Mapping) else function(value)
        for key, value in batch.items()
    }


def leaves(batch: Mapping[str, Any]) -> Iterator[Any]:
    """The arrays or tensors of a nested batch."""
    for value in batch.values():
        yield from leaves(value) if isinstance(value, Mapping) else [value]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A nested batch of arrays as torch tensors on the device."""
    return mapped(batch, lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device))


def rows(batch: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """Some samples of a nested batch of tensors, as views."""
    return mapped(batch, lambda x: x[which])
