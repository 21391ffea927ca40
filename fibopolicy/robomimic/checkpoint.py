"""Reads robomimic's checkpoints (`.pth`, of 0.3 and 0.5) without running anything that
is in them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import LoadedPolicy, RunDirectory, render_quality
from fibopolicy.utils.files import StrPath, atomic_write, expanded
from fibopolicy.utils.system import versions

#: Section of the `config.json` of a run directory made for a checkpoint.
SECTION = "robomimic"
LAYOUT = ("model", "config", "algo_name", "env_metadata", "shape_metadata")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Args:
        path: where it lies.
        algo_name: e.g. "bc".
        config: robomimic's configuration of the training.
        weights: the networks' state dict, or of hierarchical algorithms a dict of them.
        env_metadata: a dataset's `env_args`.
        shapes: per observation key, as the networks take it; images (C, H, W).
        action_dim: A.
        obs_statistics: per key "offset" and "scale", float arrays `(1, ...)`; empty
            where observations are not normalised.
        action_statistics: the same per action key, in the order of the actions; empty
            before 0.4.
    """

    path: Path
    algo_name: str
    config: dict[str, Any]
    weights: Mapping[str, Any]
    env_metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    action_dim: int
    obs_statistics: dict[str, dict[str, NDArray[Any]]]
    action_statistics: dict[str, dict[str, NDArray[Any]]]

    @property
    def epoch(self) -> int | None:
        """From the file's name, as robomimic gives it; the file itself does not tell."""
        match = re.search(r"epoch_(\d+)", self.path.name)
        return int(match[1]) if match else None


def read_checkpoint(path: StrPath) -> Checkpoint:
    """Load a checkpoint of tensors, numbers, text and numpy arrays; a file that holds
    anything else is refused.

    Raises:
        UserError: no such file, none of torch, one with other contents, or not laid out
            as robomimic's.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a robomimic checkpoint (.pth)")
    try:
        with _arrays_allowed():
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it holds {name[1]}, which would run code"
            if name
            else " ".join(str(error).split())[:120]
        )
        raise UserError(
            f"{path}: is not loaded, since {what}; robomimic's checkpoints hold tensors, text and"
            " arrays"
        ) from error
    except Exception as error:  # torch reads any bytes as a pickle, which may fail in any way
        raise UserError(
            f"{path}: is no torch file, or a damaged one ({' '.join(str(error).split())[:120]})"
        ) from error
    lacking = (
        [key for key in LAYOUT if key not in contents]
        if isinstance(contents, dict)
        else list(LAYOUT)
    )
    if lacking:
        raise UserError(f"{path}: is no robomimic checkpoint, it lacks {', '.join(lacking)}")
    try:
        return _parse(path, contents)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is not laid out as robomimic's checkpoints ({type(error).__name__}: {error})"
        ) from error


def _parse(path: Path, contents: dict[str, Any]) -> Checkpoint:
    config = json.loads(contents["config"])
    if not isinstance(config, dict):
        raise TypeError("config is no JSON object")
    weights = contents["model"]
    if isinstance(weights.get("nets"), Mapping) and "optimizers" in weights:  # 0.5
        weights = weights["nets"]
    shapes = contents["shape_metadata"]
    actions = _statistics(contents.get("action_normalization_stats"))
    order = list(config.get("train", {}).get("action_keys") or actions)
    return Checkpoint(
        path=path,
        algo_name=str(contents["algo_name"]),
        config=config,
        weights=weights,
        env_metadata=dict(contents["env_metadata"]),
        shapes={key: tuple(int(n) for n in shape) for key, shape in shapes["all_shapes"].items()},
        action_dim=int(shapes["ac_dim"]),
        obs_statistics=_statistics(contents.get("obs_normalization_stats")),
        action_statistics={key: actions[key] for key in order} if actions else {},
    )


def _statistics(
    stored: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, dict[str, NDArray[Any]]]:
    """0.3 says mean and std, 0.5 offset and scale."""
    return {
        key: {
            "offset": np.asarray(
                values["mean"] if "mean" in values else values["offset"], dtype=np.float32
            ),
            "scale": np.asarray(
                values["std"] if "std" in values else values["scale"], dtype=np.float32
            ),
        }
        for key, values in (stored or {}).items()
    }


def _arrays_allowed() -> AbstractContextManager[None]:
    """Numpy's arrays and numbers, under the module names of numpy 1 and 2."""
    sample = np.zeros(1)
    reconstruct, scalar = sample.__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")},
    ]
    for package in ("core", "_core"):
        allowed += [
            (reconstruct, f"numpy.{package}.multiarray._reconstruct"),
            (scalar, f"numpy.{package}.multiarray.scalar"),
        ]
    context: AbstractContextManager[None] = torch.serialization.safe_globals(allowed)
    return context


def import_checkpoint(path: Path) -> Path:
    """Run directory of a checkpoint `X.pth`: `X_evaluation` beside it, made if it does
    not exist yet.

    It holds a `config.json` like that of our runs, with a section "robomimic" that names
    the checkpoint and its digest. An evaluation adds its rows, initial states, video and
    report. The weights stay where they are.

    Raises:
        UserError: the checkpoint cannot be loaded, or the directory belongs to another
            checkpoint.
    """
    checkpoint = read_checkpoint(path)
    run = path.with_name(f"{path.stem}_evaluation")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = RunDirectory(run)
    if files.config.exists():
        if files.read_config().get(SECTION, {}).get("sha256") != digest:
            raise UserError(
                f"{run}: holds the evaluation of another {path.name}; move it away or remove it"
            )
        return run
    from fibopolicy.robomimic.imported import ImportedPolicy

    policy = ImportedPolicy(checkpoint)
    train, experiment = checkpoint.config.get("train", {}), checkpoint.config.get("experiment", {})
    document = {
        "policy": asdict(policy.config),
        "shapes": asdict(policy.shapes),
        "train": {
            "dataset": _dataset(train.get("data")),
            "demos": train.get("hdf5_filter_key") or "all demonstrations",
            "seed": train.get("seed"),
            "optimizer": {
                "steps": (checkpoint.epoch or 0) * (experiment.get("epoch_every_n_steps") or 0)
            },
        },
        "env_args": _env_args(checkpoint),
        "versions": dict(versions()),
        SECTION: {"checkpoint": path.name, "sha256": digest},
    }
    with atomic_write(files.config) as aside:
        aside.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return run


def load_imported(run: Path, document: Mapping[str, Any], device: str) -> LoadedPolicy:
    """Load the policy of a run directory that `import_checkpoint` made.

    Args:
        document: the contents of its `config.json`.
    """
    from fibopolicy.robomimic.imported import ImportedPolicy

    checkpoint = read_checkpoint(run.parent / str(document[SECTION]["checkpoint"]))
    policy = ImportedPolicy(checkpoint, device)
    policy.render_quality = render_quality(document["env_args"])
    steps = int(document["train"]["optimizer"]["steps"])
    return LoadedPolicy(policy, steps, steps, document["env_args"])


def _env_args(checkpoint: Checkpoint) -> dict[str, Any]:
    """The dataset's, with the horizon of robomimic's own rollouts, which datasets do not tell."""
    env_args = checkpoint.env_metadata
    horizon = checkpoint.config.get("experiment", {}).get("rollout", {}).get("horizon")
    if env_args.get("type") != 1 or not horizon:
        return env_args
    return {
        **env_args,
        "env_kwargs": {**(env_args.get("env_kwargs") or {}), "horizon": int(horizon)},
    }


def _dataset(data: Any) -> str:
    """0.5 may list several, each with its path."""
    if isinstance(data, list):
        return ", ".join(
            str(entry.get("path") if isinstance(entry, dict) else entry) for entry in data
        )
    return str(data)
