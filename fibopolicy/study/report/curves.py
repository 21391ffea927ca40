"""Learning curves of a cell: what its seeds logged, in few enough points to draw."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibopolicy.study.records import read_metrics

#: What may be logged, and how it is called in print.
QUANTITIES = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "monitoring_success": "monitored success",
}
#: Points along a curve.
POINTS = 60

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Band:
    """A curve over gradient steps: mean, lowest and highest of the training seeds, each `(n,)`."""

    step: Curve
    mean: Curve
    low: Curve
    high: Curve


def read_curves(run: Path) -> dict[str, Curve]:
    """Per quantity that a run logged its finite values `(n, 2)`: step, value. Lines
    that a kill cut short are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in read_metrics(run):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for name in QUANTITIES:
                if name in row:
                    found.setdefault(name, []).append((float(row["step"]), float(row[name])))
    curves = {name: np.array(values) for name, values in found.items()}
    return {name: values[np.isfinite(values).all(axis=1)] for name, values in curves.items()}


def band(curves: Sequence[Curve], steps: int) -> Band | None:
    """Curves `(n, 2)` of several seeds in `POINTS` equal intervals of 0 .. `steps`,
    averaged within each; `None` if empty.
    """
    sums, counts = np.zeros((2, len(curves), POINTS))
    for i, curve in enumerate(curves):
        if len(curve):
            place = np.clip(curve[:, 0] * POINTS / max(1, steps), 0, POINTS - 1).astype(int)
            np.add.at(sums[i], place, curve[:, 1])
            np.add.at(counts[i], place, 1)
    seen = (counts > 0).any(axis=0)
    if not seen.any():
        return None
    with np.errstate(invalid="ignore"):
        values = (sums / np.where(counts > 0, counts, np.nan))[:, seen]
    centres = (np.arange(POINTS)[seen] + 0.5) * steps / POINTS
    return Band(
        centres, np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    )
