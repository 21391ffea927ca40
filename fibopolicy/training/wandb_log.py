"""Weights & Biases, an extra. Without a network, `WANDB_MODE=offline` keeps everything
in the run directory.
"""

from __future__ import annotations

import importlib
import json
import secrets
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.utils.files import atomic_write

#: Under which name a run directory goes there, so that a resumed run goes on with its
#: own curves.
IDENTITY = "wandb.json"


class WandbLog:
    """One run of a project; figures are drawn over the gradient step.

    Raises:
        UserError: wandb is not installed, or refuses to start (no key, no network).
    """

    def __init__(self, out: Path, project: str, config: dict[str, Any]) -> None:
        require_wandb(project)
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                id=_identity(out),
                name=out.name,
                dir=str(out),
                config=config,
                resume="allow",
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"wandb: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or leave out"
                " --wandb"
            ) from error
        # Not over wandb's own counter, which only grows: results of rollouts come after
        # rows of later steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def require_wandb(project: str | None) -> None:
    """Raise `UserError` when a project is to be logged to and wandb is not installed."""
    if project is None:
        return
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb needs Weights & Biases ({error}): pip install 'fibopolicy[wandb]'"
        ) from error


def _identity(out: Path) -> str:
    path = out / IDENTITY
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = secrets.token_hex(4)
    with atomic_write(path) as aside:
        aside.write_text(json.dumps({"id": made}) + "\n", encoding="utf-8")
    return made
