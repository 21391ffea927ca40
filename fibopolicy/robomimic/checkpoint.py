"""Reads robomimic's checkpoints (`.pth`, of 0.3 and 0.5) and makes run directories for
them. Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fibopolicy.errors import UserError, message_of
from fibopolicy.policies.run_directory import LoadedPolicy, RunDirectory, render_quality
from fibopolicy.utils.files import StrPath, atomic_write, expanded
from fibopolicy.utils.system import versions

#: Section of the `config.json` of a run directory made for a checkpoint.
SECTION = "robomimic"
#: What every checkpoint holds.
KEYS = ("model", "config", "algo_name", "env_metadata", "shape_metadata")
#: Per key "offset" and "scale", float32 `(1, ...)`.
Statistics = dict[str, dict[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        path: the file.
        algo_name: e.g. "bc".
        config: robomimic's configuration of the training.
        weights: state dict of the networks, of their moving average if there is one;
            hierarchical algorithms have a dict of them.
        env_metadata: `env_args` of the dataset, the first of several.
        shapes: shape per observation key as the networks read it, images (C, H, W).
        action_dim: A.
        obs_statistics: empty if observations are not normalised.
        action_statistics: in the order of the actions; empty before 0.4.
    """

    path: Path
    algo_name: str
    config: dict[str, Any]
    weights: Mapping[str, Any]
    env_metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    action_dim: int
    obs_statistics: Statistics
    action_statistics: Statistics

    @property
    def epoch(self) -> int | None:
        """The epoch in the file's name; the file does not hold it."""
        match = re.search(r"epoch_(\d+)", self.path.name)
        return int(match[1]) if match else None


def read_checkpoint(path: StrPath) -> Checkpoint:
    """Read a checkpoint of tensors, numbers, text and numpy arrays.

    Raises:
        UserError: the file does not exist, is not a torch file, holds other types, or
            is not laid out like robomimic's.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a robomimic checkpoint (.pth)")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reads any bytes as a pickle, which may fail in any way
        reason = message_of(error)[:120]
        if isinstance(error, pickle.UnpicklingError):
            if name := re.search(r"GLOBAL (\S+)", str(error)):
                reason = f"it holds {name[1]}, which would run code"
            raise UserError(
                f"{path}: was not loaded, since {reason}; robomimic's checkpoints hold tensors,"
                " text and arrays"
            ) from error
        raise UserError(f"{path}: is not a torch file, or is corrupt ({reason})") from error
    missing = [key for key in KEYS if not isinstance(contents, dict) or key not in contents]
    if missing:
        raise UserError(f"{path}: is not a robomimic checkpoint, it lacks {', '.join(missing)}")
    try:
        return _parse(path, contents)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is not laid out like robomimic's checkpoints"
            f" ({type(error).__name__}: {error})"
        ) from error


def _numpy_globals() -> list[Any]:
    """The functions and types in a pickle of numpy arrays and numbers, by their names
    in numpy 1 and 2.
    """
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}
    allowed: list[Any] = [np.ndarray, np.dtype, *dtypes]
    for package in ("numpy.core", "numpy._core"):
        allowed.append((reconstruct, f"{package}.multiarray._reconstruct"))
        allowed.append((scalar, f"{package}.multiarray.scalar"))
    return allowed


def _parse(path: Path, contents: dict[str, Any]) -> Checkpoint:
    config = json.loads(contents["config"])
    if not isinstance(config, dict):
        raise TypeError("config is not a JSON object")
    weights = contents["model"]
    if isinstance(weights.get("nets"), Mapping) and "optimizers" in weights:  # 0.5
        weights = weights.get("ema") or weights["nets"]
    # After training on several datasets, 0.5 has lists of these.
    env_metadata, shapes = (
        stored[0] if isinstance(stored, list) else stored
        for stored in (contents["env_metadata"], contents["shape_metadata"])
    )
    actions = _statistics(contents.get("action_normalization_stats"))
    order = list(config.get("train", {}).get("action_keys") or actions)
    return Checkpoint(
        path=path,
        algo_name=str(contents["algo_name"]),
        config=config,
        weights=weights,
        env_metadata=dict(env_metadata),
        shapes={key: tuple(int(n) for n in shape) for key, shape in shapes["all_shapes"].items()},
        action_dim=int(shapes["ac_dim"]),
        obs_statistics=_statistics(contents.get("obs_normalization_stats")),
        action_statistics={key: actions[key] for key in order} if actions else {},
    )


def _statistics(stored: Mapping[str, Mapping[str, Any]] | None) -> Statistics:
    statistics: Statistics = {}
    for key, values in (stored or {}).items():
        names = ("mean", "std") if "mean" in values else ("offset", "scale")  # 0.3, 0.5
        offset, scale = (np.asarray(values[name], dtype=np.float32) for name in names)
        statistics[key] = {"offset": offset, "scale": scale}
    return statistics


def import_checkpoint(path: Path) -> Path:
    """Return the run directory of a checkpoint `X.pth`: `X_evaluation` beside it,
    created if it does not exist.

    It holds a `config.json` like that of our runs, with a section "robomimic" that
    names the checkpoint and its digest. An evaluation adds its episodes, initial
    states, video and report. The weights stay where they are.

    Raises:
        UserError: the checkpoint cannot be loaded, or the directory belongs to another
            checkpoint.
    """
    checkpoint = read_checkpoint(path)
    directory = RunDirectory(path.with_name(f"{path.stem}_evaluation"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if directory.config.exists():
        if directory.read_config().get(SECTION, {}).get("sha256") != digest:
            raise UserError(
                f"{directory.path}: holds the evaluation of another {path.name}; move it away or"
                " remove it"
            )
        return directory.path
    from fibopolicy.robomimic.imported import ImportedPolicy

    policy = ImportedPolicy(checkpoint)
    train, experiment = checkpoint.config.get("train", {}), checkpoint.config.get("experiment", {})
    data = train.get("data")
    files = data if isinstance(data, list) else [data]  # 0.5 may have several, each with its path
    env_args = dict(checkpoint.env_metadata)
    horizon = experiment.get("rollout", {}).get("horizon")  # datasets have none
    if env_args.get("type") == 1 and horizon:
        env_args["env_kwargs"] = {**(env_args.get("env_kwargs") or {}), "horizon": int(horizon)}
    steps = (checkpoint.epoch or 0) * (experiment.get("epoch_every_n_steps") or 0)
    document = {
        "policy": asdict(policy.config),
        "shapes": asdict(policy.shapes),
        "train": {
            "dataset": ", ".join(str(f.get("path") if isinstance(f, dict) else f) for f in files),
            "demos": train.get("hdf5_filter_key") or "all demonstrations",
            "seed": train.get("seed"),
            "optimizer": {"steps": steps},
        },
        "env_args": env_args,
        "versions": dict(versions()),
        SECTION: {"checkpoint": path.name, "sha256": digest},
    }
    with atomic_write(directory.config) as file:
        file.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return directory.path


def load_imported(run: Path, document: Mapping[str, Any], device: str | None) -> LoadedPolicy:
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
