"""A run directory for a robomimic checkpoint, so that it is evaluated like any other
policy.

It lies beside the checkpoint and holds `config.json`, in the form of our own runs, with
a section "robomimic" that names the checkpoint and its digest; the evaluation adds its
rows, start states, video and report. The weights stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.policies import run_directory
from fibopolicy.policies.run_directory import CONFIG, Loaded, read_config, render_quality
from fibopolicy.robomimic.checkpoint import Checkpoint, read_checkpoint
from fibopolicy.utils.files import StrPath, atomic_write, expanded
from fibopolicy.utils.system import versions

SECTION = "robomimic"


def adopted(path: StrPath) -> Path:
    """The run directory of a checkpoint `X.pth`: `X_evaluation` beside it, made if need
    be; anything else as it is.

    Raises:
        UserError: the checkpoint cannot be loaded, or the directory is another
            checkpoint's.
    """
    path = expanded(path)
    if path.suffix != ".pth" or path.is_dir():
        return path
    checkpoint = read_checkpoint(path)
    run = path.with_name(f"{path.stem}_evaluation")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if (run / CONFIG).exists():
        if read_config(run).get(SECTION, {}).get("sha256") != digest:
            raise UserError(
                f"{run}: holds the evaluation of another {path.name}; move it away or remove it"
            )
        return run
    from fibopolicy.robomimic.policy import RobomimicPolicy

    policy = RobomimicPolicy(checkpoint)
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
    with atomic_write(run / CONFIG) as aside:
        aside.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return run


def load_policy(run: Path, *, weights: str = "ema", device: str = "cpu") -> Loaded:
    """The policy of a run directory, ours or an adopted one, as
    `fibopolicy.policies.run_directory.load_policy` gives it.

    A robomimic checkpoint has one set of weights, whatever `weights` says.
    """
    document = read_config(run)
    if SECTION not in document:
        return run_directory.load_policy(run, weights=weights, device=device)
    from fibopolicy.robomimic.policy import RobomimicPolicy

    checkpoint = read_checkpoint(run.parent / str(document[SECTION]["checkpoint"]))
    policy = RobomimicPolicy(checkpoint, device)
    policy.render_quality = render_quality(document["env_args"])
    steps = int(document["train"]["optimizer"]["steps"])
    return Loaded(policy, steps, steps, document["env_args"])


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
