"""The settings of `fibopolicy evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from fibopolicy.errors import UserError
from fibopolicy.utils.files import expanded

if TYPE_CHECKING:
    from fibopolicy.envs.perturbations import Perturbation

Quality = Literal["fast", "full"]
#: Height of a view in a video, pixels.
VIDEO_SIZE = 256


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run directory of the policy, a robomimic checkpoint (.pth), hub:OWNER/NAME for a
    policy on the Hugging Face Hub, or example:reach, which comes with the package."""
    episodes: int = 50
    """Number of initial states to run, from the first."""
    init_seed: int = 0
    """Seed of the set of initial states."""
    init_states: Path | None = None
    """A file of initial states to use instead."""
    checkpoint: str = "ema"
    """"ema", the moving average; "model"; or a checkpoint chosen by validation, such as
    best/step_001000."""
    video: int = 10
    """Episodes in the video, 0 for no video."""
    video_camera: str | None = None
    """Camera of the video, any of the task's; the policy's first by default."""
    video_size: int = VIDEO_SIZE
    """Height of each episode in the video, pixels; the policy sees its own frames."""
    failures_first: bool = False
    """Show failures before successes in the video."""
    overlay: bool = False
    """Draw on the video where the encoder looks: its softmax keypoints, or else how much
    each patch changes its feature."""
    quality: Quality | None = None
    """Render quality; the dataset's by default."""
    max_steps: int | None = None
    """Control steps until an episode is truncated; the task's by default."""
    device: str | None = None
    """Device of the policy, "cpu", "cuda", ...; by default a GPU if there is one. Another
    changes the last bits of actions, and thus the results."""
    workers: int | None = None
    """Simulators, one process each; by default the number of cores, or five times as
    many, up to 20, for the light built-in tasks. Results do not depend on it."""
    batch_size: int | None = None
    """Rows in each policy call, padded where fewer episodes wait; 4 by default. Another
    number changes the last bits of actions, and thus the results."""
    threads: int = 1
    """Torch threads during the policy's calls. Another number may change the last bits,
    too."""
    step_timeout: float = 60.0
    """Seconds that a control step or a frame may take until its process counts as hung."""
    max_retries: int = 2
    """Retries of an episode whose simulator dies, hangs or fails; afterwards its row is an
    error."""
    viewer: bool = False
    """Open MuJoCo's viewer and run one episode after the other in real time."""
    task: str | None = None
    """Task id, or module:class; by default the task that the training data name. For a
    policy conditioned on the task, one of its tasks; by default all, one after the other."""
    allow_mismatch: bool = False
    """Accept initial states that do not look as they did when they were stored."""
    perturb: UseAppendAction[tuple[str, ...]] = ()
    """NAME:LEVEL: also evaluate with this perturbation, on the same initial states; without
    :LEVEL, at the levels 1, 2 and 3. May be repeated. The clean evaluation comes first; rows
    that it has are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", expanded(self.run))
        if self.episodes < 1 or self.init_seed < 0 or self.video < 0:
            raise UserError(
                "expected episodes >= 1, init_seed >= 0 and video >= 0, got"
                f" {self.episodes}, {self.init_seed}, {self.video}"
            )
        check_video_size(self.video_size)
        if self.perturb:
            self.perturbations()
        for name in ("workers", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
            if value is not None and value > 1 << 16:
                raise UserError(f"{name} must be at most {1 << 16}, got {value}")
        if not 0 <= self.max_retries <= 1 << 16:
            raise UserError(f"max_retries must be in 0 .. {1 << 16}, got {self.max_retries}")
        if not self.step_timeout > 0:
            raise UserError(f"step_timeout must be more than 0 seconds, got {self.step_timeout}")

    def perturbations(self) -> tuple[Perturbation, ...]:
        """The perturbations at their levels, each once.

        Raises:
            UserError: there is no such perturbation or level.
        """
        from fibopolicy.envs.perturbations import parse

        return tuple(dict.fromkeys(one for text in self.perturb for one in parse(text)))


def check_video_size(height: int) -> None:
    """Raise `UserError` unless a view of a video can have this height, pixels."""
    if not 64 <= height <= 1024:
        raise UserError(f"video_size must be between 64 and 1024 pixels, got {height}")
