"""What looks on while training goes on, as values."""

from __future__ import annotations

from dataclasses import dataclass

from fibopolicy.errors import UserError


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured on demonstrations that training does not see, and what is kept
    for it. Losses are those of the averaged weights.
    """

    validate_on: str | None = None
    """Filter key of demos to validate on, say valid, in the files that have it; none by default."""
    validate_every: int = 250
    """Gradient steps between validations."""
    validate_samples: int = 2048
    """Windows at most, evenly spread over those demos."""
    keep_best: int = 0
    """Checkpoints to keep in best/ by the criterion, beside the last, which stays the result."""
    criterion: str = "validation_loss"
    """The lowest of this validation figure is best."""

    def __post_init__(self) -> None:
        if self.validate_every < 1 or self.validate_samples < 1 or self.keep_best < 0:
            raise UserError(
                "expected validate_every >= 1, validate_samples >= 1 and keep_best >= 0, got"
                f" {self.validate_every}, {self.validate_samples}, {self.keep_best}"
            )
        if self.validate_on is None and (self.keep_best or self.criterion != "validation_loss"):
            raise UserError(
                f"criterion {self.criterion} needs a validation, and there is none: name its demos"
                " with --validate-on"
            )
        if not self.criterion.startswith("validation_"):
            raise UserError(
                "criterion must be a figure of the validation, such as validation_loss, got"
                f" {self.criterion!r}"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts of the averaged weights while training goes on, in a process of their
    own. They show where training stands; the result is what `fibopolicy evaluate` gives
    afterwards, on other start states.
    """

    rollout_every: int | None = None
    """Steps; none by default."""
    rollout_episodes: int = 20
    """Start states of each."""
    rollout_workers: int = 1
    """Simulators at once; each takes a core from the training while it runs."""

    def __post_init__(self) -> None:
        for name in ("rollout_every", "rollout_episodes", "rollout_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
