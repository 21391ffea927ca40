"""One evaluation as a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fibopolicy.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation."""

    run: Positional[Path]
    """Run directory of the policy, or a robomimic checkpoint (.pth)."""
    episodes: int = 50
    """Start states to run, from the first."""
    seed: int = 0
    """Of the set of start states; other seeds are other layouts."""
    starts: Path | None = None
    """A file of start states to use instead."""
    weights: str = "ema"
    """"ema" or "model"."""
    video: int = 10
    """Episodes shown in the video, 0 for none."""
    video_camera: str | None = None
    """Camera that films; the policy's first by default."""
    quality: str | None = None
    """Render quality; the dataset's by default."""
    horizon: int | None = None
    """Control steps until an episode is given up; the task's by default."""
    device: str = "cpu"
    """For the policy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run).expanduser())
        if self.episodes < 1 or self.seed < 0 or self.video < 0:
            raise UserError(f"expected episodes >= 1, seed >= 0 and video >= 0, got {self.episodes}, {self.seed}, {self.video}")
