"""Open, write and resume a run directory whose checkpoints are always complete.

A run resumes from `state.pt` only: weights, average, optimizer and step, in one file
that is replaced by one rename. `model.safetensors` and `ema.safetensors` are exports
for other programs; their metadata holds the step. Order and randomness are functions of
(seed, step) and need not be stored.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fibopolicy.datasets import Windows
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.run_directory import RunDirectory, load_strictly
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import shapes_of
from fibopolicy.training.optim import EMA, Divergence, load_optimizer
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import hardware, versions

#: Settings that do not change the weights: paths, and how steps are computed and
#: logged.
_MAY_CHANGE = (
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
    """Everything that changes during training and that a checkpoint restores."""

    policy: Policy
    ema: EMA[Policy]
    optimizer: torch.optim.Optimizer
    divergence: Divergence


def prepare_run(config: TrainConfig, dataset: Windows, *, resume: bool, overwrite: bool) -> None:
    """Write `config.json` into the locked run directory, or check that it holds this run."""
    run, out = RunDirectory(config.out), config.out
    document = describe(config, dataset)
    if run.config.exists():
        found = run.read_config()  # raises if it is not the configuration of a run
        if not overwrite:
            if not resume:
                raise UserError(
                    f"{out}: holds a run already; pass --resume to continue it or --overwrite to"
                    " replace it"
                )
            _check_same_run(out, found, document)
            return
        run.remove()
    elif any(out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no run; choose another directory")
    with atomic_write(run.config) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def describe(config: TrainConfig, dataset: Windows) -> dict[str, Any]:
    """The contents of `config.json`: everything that defines the run, as plain JSON."""
    train = asdict(config)
    policy = train.pop("policy")
    train |= {
        "cameras": dataset.cameras,
        "vectors": dataset.vectors,
        "demos": dataset.num_demos,
        "samples": len(dataset),
    }
    shapes = asdict(shapes_of(dataset))
    if not dataset.tasks:
        del shapes["tasks"], shapes["task_dim"]
    document = {
        "policy": policy,
        "shapes": shapes,
        "statistics": {
            key: {name: values.tolist() for name, values in stats.items()}
            for key, stats in dataset.stats.items()
        },
        "train": train,
        "env_args": dataset.env_args,
        **({"task_env_args": dataset.task_env_args} if dataset.tasks else {}),
        "versions": dict(versions()),
        "hardware": hardware(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return plain


def _check_same_run(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for section in ("policy", "shapes", "train"):
        for key in wanted[section] | found[section]:
            old, new = found[section].get(key), wanted[section].get(key)
            difference = first_difference(old, new, f"{section}.{key}")
            if difference and key not in _MAY_CHANGE:
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
                    f" {key} was {_brief(old)}, not {_brief(new)}; resume with the original data,"
                    " or use another directory"
                )


def _brief(values: Any) -> str:
    return "unknown" if values is None else f"[{', '.join(f'{value:.6g}' for value in values)}]"


def save_checkpoint(out: Path, state: TrainingState, step: int) -> None:
    """Write the state after `step` gradient steps; each file is complete at any moment.

    Raises:
        UserError: a file cannot be written, e.g. because the disk is full; an older one
            of its name stays as it is.
    """
    document = {
        "step": step,
        "policy": state.policy.state_dict(),
        "ema": state.ema.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "losses": list(state.divergence.recent),
        "high_losses": state.divergence.num_bad,
    }
    path = RunDirectory(out).state
    with atomic_write(path) as partial, _wrap_write_error(path), partial.open("wb") as file:
        torch.save(document, file)
    _export(out, state, step)


def _export(out: Path, state: TrainingState, step: int) -> None:
    run = RunDirectory(out)
    save_weights(run.model, state.policy, {"step": str(step)})
    save_weights(run.ema, state.ema.average, {"step": str(step)})


def save_weights(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write the parameters and buffers of a module as safetensors, atomically."""
    # Copied, because safetensors refuses shared tensors, which robomimic's RNN has.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }
    with atomic_write(path) as partial, _wrap_write_error(path):
        save_file(tensors, partial, metadata=metadata)


@contextlib.contextmanager
def _wrap_write_error(path: Path) -> Iterator[None]:
    """Turn a failure to write into one line.

    torch hides the `OSError` as the error's context; safetensors has its number in the
    message.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        cause = error if isinstance(error, OSError) else error.__context__
        if number is None and not isinstance(cause, OSError):
            raise
        reason = os.strerror(int(number[1])) if number else str(getattr(cause, "strerror", cause))
        advice = (
            "; the previous checkpoint is complete: free some space, then continue with --resume"
        )
        raise UserError(
            f"{path}: cannot be written: {reason}{advice if path.exists() else ''}"
        ) from error


def load_checkpoint(out: Path, state: TrainingState, *, export: bool) -> int:
    """Restore the newest checkpoint into `state`; return its steps, 0 without a
    checkpoint.

    Args:
        export: write the exports again, which may be stale after a kill.
    """
    run, path = RunDirectory(out), RunDirectory(out).state
    if not path.exists():
        if run.model.exists():
            raise UserError(f"{path}: is missing; pass --overwrite to start again")
        return 0
    advice = "pass --overwrite to start again"
    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
        load_strictly(state.policy, document["policy"], path, advice)
        load_strictly(state.ema.average, document["ema"], path, advice)
        load_optimizer(state.optimizer, document["optimizer"])
        state.divergence.recent.extend(document["losses"])
        state.divergence.num_bad = int(document["high_losses"])
        step = int(document["step"])
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot resume from it ({reason}); {advice}") from error
    if export:
        _export(out, state, step)
    return step


class TopKCheckpoints:
    """Keeps the `keep` averaged weights with the lowest criterion in `best/`.

    A file `step_<steps>.safetensors` has its criterion in its metadata, so that a
    resumed run continues from these files. A repeated step replaces its file.
    """

    def __init__(self, out: Path, keep: int, criterion: str) -> None:
        self._run, self._keep, self._criterion = RunDirectory(out), keep, criterion

    def update(self, step: int, metrics: dict[str, float], weights: nn.Module) -> None:
        """Keep the weights after `step` steps if they are among the best; ties keep the
        earlier.

        Raises:
            UserError: a file cannot be written, or one there has no criterion.
        """
        if not self._keep or not math.isfinite(value := metrics[self._criterion]):
            return
        path = self._run.best_checkpoint(step)
        ranked = sorted((*self._kept(without=path), (value, step, path)))
        if (value, step, path) in ranked[: self._keep]:
            save_weights(path, weights, {"step": str(step), self._criterion: repr(value)})
        for _, _, dropped in ranked[self._keep :]:
            dropped.unlink(missing_ok=True)

    def _kept(self, without: Path) -> Iterator[tuple[float, int, Path]]:
        for path in self._run.best_checkpoints():
            if path == without:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                yield float(metadata[self._criterion]), int(metadata["step"]), path
            except (SafetensorError, KeyError, ValueError) as error:
                raise UserError(
                    f"{path}: its metadata has no {self._criterion}; move it away and start again"
                ) from error
