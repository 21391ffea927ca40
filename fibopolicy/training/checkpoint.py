"""The run directory: opened, written and resumed so that a checkpoint is whole or
absent.

`state.pt` alone is what a run resumes from: weights, average, optimiser and step, in
one file that is replaced in one rename. `model.safetensors` and `ema.safetensors` are
what everybody else reads; each says its step in its metadata. Order and randomness need
no storing, being functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fibopolicy.datasets import Windows
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.run_directory import BEST, CONFIG, EMA_WEIGHTS, WEIGHTS, read_config
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import shapes_of
from fibopolicy.training.divergence import Divergence
from fibopolicy.training.ema import EMA
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import hardware, versions
from fibopolicy.weights import load_strictly

STATE = "state.pt"
#: What a run and its evaluation write, beside the folder of videos; the configuration
#: last, since it marks a run.
RUN_FILES = (
    STATE,
    WEIGHTS,
    EMA_WEIGHTS,
    "metrics.jsonl",
    "episodes.jsonl",
    "events.out.tfevents.*",
    "starts_seed*.npz",
    "videos/*_seed*.mp4",
    "curves.png",
    "success_by_step*.png",
    "report*.html",
    ".evaluating",
    f"{BEST}/step_*.safetensors",
    *(
        f"monitoring/{name}"
        for name in (
            EMA_WEIGHTS,
            "episodes.jsonl",
            "starts_seed*.npz",
            "result.json",
            "log.txt",
            ".evaluating",
            CONFIG,
        )
    ),
    "wandb.json",
    CONFIG,
)
#: Folders that a run makes in its directory.
RUN_FOLDERS = ("videos", BEST, "monitoring")
#: Settings that do not change what is learnt: where the data lie, how steps are
#: computed, how often to log, save and measure.
_INDIFFERENT = (
    "out",
    "dataset",
    "device",
    "compute",
    "log_every",
    "checkpoint_every",
    "validation",
    "rollouts",
    "wandb",
)


@dataclass(frozen=True)
class TrainingState:
    """What changes while training."""

    policy: Policy
    ema: EMA[Policy]
    optimizer: torch.optim.Optimizer
    divergence: Divergence


def open_run(config: TrainConfig, dataset: Windows, *, resume: bool, overwrite: bool) -> None:
    """Write `config.json` into the (directory_lock) run directory, or check that the
    one there is of this very configuration.
    """
    out = config.out
    document = describe(config, dataset)
    if (out / CONFIG).exists():
        found = read_config(out)  # refuses a configuration that is not a run's
        if not overwrite:
            if not resume:
                raise UserError(
                    f"{out}: holds a run already; pass --resume to go on with it or --overwrite to"
                    " replace it"
                )
            _refuse_other(out, found, document)
            return
        _remove_run(out)
    elif any(out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no run; choose another directory")
    with atomic_write(out / CONFIG) as aside:
        aside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else that somebody may have put there."""
    for pattern in RUN_FILES:
        for path in out.glob(pattern):
            path.unlink()
    for folder in RUN_FOLDERS:
        with contextlib.suppress(OSError):  # not there, or somebody else's files in it
            (out / folder).rmdir()


def describe(config: TrainConfig, dataset: Windows) -> dict[str, Any]:
    """The contents of `config.json`: everything that made the run, as plain JSON."""
    train = asdict(config)
    policy = train.pop("policy")
    train |= {
        "cameras": dataset.cameras,
        "vectors": dataset.vectors,
        "demos": dataset.num_demos,
        "samples": len(dataset),
    }
    document = {
        "policy": policy,
        "shapes": asdict(shapes_of(dataset)),
        "statistics": {
            key: {n: v.tolist() for n, v in stats.items()} for key, stats in dataset.stats.items()
        },
        "train": train,
        "env_args": dataset.env_args,
        "versions": dict(versions()),
        "hardware": hardware(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return plain


def stored_precision(out: Path) -> str | None:
    """The precision that a run was started with; `None` where there is no run."""
    return (
        read_config(out)["train"].get("compute", {}).get("precision")
        if (out / CONFIG).exists()
        else None
    )


def _refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for section in ("policy", "shapes", "train"):
        for key in wanted[section] | found[section]:
            if key in _INDIFFERENT:
                continue
            if difference := first_difference(
                found[section].get(key), wanted[section].get(key), f"{section}.{key}"
            ):
                raise UserError(
                    f"{out}: holds a run of another configuration: {difference}; use that value or"
                    " another directory"
                )
    for key, statistics in wanted["statistics"].items():
        for name, new in statistics.items():
            old = found.get("statistics", {}).get(key, {}).get(name)
            if old is None or not np.allclose(old, new, rtol=1e-6, atol=1e-9):
                raise UserError(
                    f"{out}: was trained on other data than {wanted['train']['dataset']}: {name} of"
                    f" {key} was {_short(old)}, not {_short(new)}; resume with the data it was"
                    " started on, or use another directory"
                )


def _short(values: Any) -> str:
    return (
        "unknown" if values is None else "[" + ", ".join(f"{value:.6g}" for value in values) + "]"
    )


def save_checkpoint(out: Path, state: TrainingState, step: int) -> None:
    """Write the state after `step` gradient steps; at every moment each file on disk is
    a whole one.

    Raises:
        UserError: a file cannot be written, say because the disk is full; an older one
            of its name stays as it is.
    """
    document = {
        "step": step,
        "policy": state.policy.state_dict(),
        "ema": state.ema.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "losses": list(state.divergence.recent),
        "high_losses": state.divergence.streak,
    }
    with atomic_write(out / STATE) as aside, _failure_told(out / STATE), aside.open("wb") as file:
        torch.save(document, file)
    _export(out, state, step)


def _export(out: Path, state: TrainingState, step: int) -> None:
    save_weights(out / WEIGHTS, state.policy, {"step": str(step)})
    save_weights(out / EMA_WEIGHTS, state.ema.average, {"step": str(step)})


def save_weights(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a module's parameters and buffers as safetensors, whole or not at all."""
    # Copied, since safetensors refuses two names for one tensor, which robomimic's
    # recurrent network has.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }
    with atomic_write(path) as aside, _failure_told(path):
        save_file(tensors, aside, metadata=metadata)


@contextlib.contextmanager
def _failure_told(path: Path) -> Iterator[None]:
    """Turns a failure to write into one line. An `OSError` is what torch hides and what
    safetensors tells the number of.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))
        cause = error if isinstance(error, OSError) else error.__context__
        if told is None and not isinstance(cause, OSError):
            raise
        reason = os.strerror(int(told[1])) if told else str(getattr(cause, "strerror", cause))
        kept = (
            "; the checkpoint before it is whole: make room, then continue with --resume"
            if path.exists()
            else ""
        )
        raise UserError(f"{path}: cannot be written: {reason}{kept}") from error


def load_state(out: Path, state: TrainingState, *, writes: bool) -> int:
    """Restore the newest checkpoint into `state` and return the steps done; 0 where
    there is none yet.

    Args:
        writes: make what others read anew, since a kill may have come between the state
            and its exports.
    """
    path = out / STATE
    if not path.exists():
        if (out / WEIGHTS).exists():
            raise UserError(
                f"{path}: is missing, so the run cannot go on; pass --overwrite to start again"
            )
        return 0
    advice = "pass --overwrite to start again"
    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
        load_strictly(state.policy, document["policy"], path, advice)
        load_strictly(state.ema.average, document["ema"], path, advice)
        state.optimizer.load_state_dict(document["optimizer"])
        state.divergence.recent.extend(document["losses"])
        state.divergence.streak = int(document["high_losses"])
        step = int(document["step"])
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be resumed from ({reason}); {advice}") from error
    if writes:
        _export(out, state, step)
    return step
