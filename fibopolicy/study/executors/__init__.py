"""Where runs are carried out: on this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fibopolicy.study.cells import Run
from fibopolicy.study.directory import StudyDirectory


@dataclass(frozen=True)
class Ended:
    """A run that is over: whether it is done, and how long its process took, seconds."""

    run: Run
    done: bool
    wall_s: float


class Executor(Protocol):
    """Carries runs out, each in a process of its own, and says when one is over; a
    failed one does not stop the others.
    """

    @property
    def slots(self) -> int:
        """Runs at a time."""

    def carry_out(
        self, study: StudyDirectory, runs: Sequence[Run], folder: Path
    ) -> Iterator[Ended]:
        """Start every run; `folder` is where "module:function" encoders are found."""
