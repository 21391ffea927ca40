"""One evaluation as a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fibopolicy.errors import UserError
from fibopolicy.utils.files import expanded


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run directory of the policy, or a robomimic checkpoint (.pth)."""
    episodes: int = 50
    """Start states to run, from the first."""
    seed: int = 0
    """Which set of start states is drawn; other seeds are other layouts."""
    starts: Path | None = None
    """A file of start states to use instead."""
    weights: str = "ema"
    """"ema", the moving average, or "model"; or one that a validation liked, as best/step_001000."""  # noqa: E501
    video: int = 10
    """Episodes shown in the video, 0 for none."""
    video_camera: str | None = None
    """Camera that films; the policy's first by default."""
    failures_first: bool = False
    """Film the failures first, then as many successes as there is room for."""
    overlay: bool = False
    """Draw on the video where the encoder looks: its softmax keypoints, or else how much each patch moves its feature."""  # noqa: E501
    quality: str | None = None
    """Render quality, fast or full; the dataset's by default."""
    horizon: int | None = None
    """Control steps until an episode is given up; the task's by default."""
    device: str = "cpu"
    """Where the policy runs: "cpu", "cuda", ..."""
    workers: int | None = None
    """Simulators, one process each; by default as many as cores, or five times as many, up to 20, for the light built-in
    tasks. Rows do not depend on it."""  # noqa: E501
    batch: int | None = None
    """Rows in each of the policy's calls, filled up where fewer episodes wait; 4 by default. Another number gives other last
    bits, and so other rows."""  # noqa: E501
    threads: int = 1
    """Of torch during the policy's calls, fixed since another number may give other last bits too."""  # noqa: E501
    step_limit: float = 60.0
    """Seconds that a control step or a frame may take until its process counts as hung."""
    tries: int = 3
    """Attempts for an episode whose simulator dies, hangs or fails; then it becomes an error row."""  # noqa: E501
    viewer: bool = False
    """Open MuJoCo's own viewer and run one episode after the other, in real time."""
    allow_mismatch: bool = False
    """Go on where start states do not look as they did when they were stored."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", expanded(self.run))
        if self.episodes < 1 or self.seed < 0 or self.video < 0:
            raise UserError(
                f"expected episodes >= 1, seed >= 0 and video >= 0, got {self.episodes},"
                f" {self.seed}, {self.video}"
            )
        for name in ("workers", "batch", "threads", "tries"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
            if value is not None and value > 1 << 16:
                raise UserError(f"{name} must be at most {1 << 16}, got {value}")
        if not self.step_limit > 0:
            raise UserError(f"step_limit must be more than 0 seconds, got {self.step_limit}")
