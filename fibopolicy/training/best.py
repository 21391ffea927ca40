"""The checkpoints that a validation liked best. They are kept beside the last one,
which stays a run's result.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import BEST
from fibopolicy.training.checkpoint import save_weights


class BestWeights:
    """Keeps the `keep` averaged weights with the lowest criterion in
    `best/step_<steps>.safetensors`.

    What a file is worth stands in its metadata, so that a resumed run goes on from the
    files alone, and a repeated step replaces its own.
    """

    def __init__(self, out: Path, keep: int, criterion: str) -> None:
        self._folder, self._keep, self._criterion = out / BEST, keep, criterion

    def offer(self, step: int, figures: dict[str, float], weights: nn.Module) -> None:
        """After `step` gradient steps: keep the weights if they are among the best so
        far; a tie goes to the earlier.

        Raises:
            UserError: a file cannot be written.
        """
        if not self._keep:
            return
        value = figures[self._criterion]
        if not math.isfinite(value):
            return
        path = self._folder / f"step_{step:06d}.safetensors"
        ranked = sorted((*self._kept(without=path), (value, step, path)))
        if path in (kept for _, _, kept in ranked[: self._keep]):
            save_weights(path, weights, {"step": str(step), self._criterion: repr(value)})
        for _, _, dropped in ranked[self._keep :]:
            dropped.unlink(missing_ok=True)

    def _kept(self, without: Path) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._folder.glob("step_*.safetensors"):
            if path == without:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                found.append((float(metadata[self._criterion]), int(metadata["step"]), path))
            except (SafetensorError, KeyError, ValueError) as error:
                raise UserError(
                    f"{path}: does not say its {self._criterion}; move it away to go on"
                ) from error
        return found
