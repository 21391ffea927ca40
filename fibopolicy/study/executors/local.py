"""Runs side by side on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fibopolicy.errors import UserError
from fibopolicy.study.cells import Run
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.executors import Ended
from fibopolicy.study.executors.process import RunProcess
from fibopolicy.utils.system import usable_cores

#: How often processes are looked at, seconds.
NAP = 0.1


class Local:
    """As many processes as asked for, or as the machine has GPUs, or cores for the
    study's threads.

    Args:
        jobs: processes at a time.
        threads: of torch in each.
        device: of the study.
    """

    def __init__(self, jobs: int | None, threads: int, device: str | None) -> None:
        if jobs is not None and jobs < 1:
            raise UserError(f"jobs must be at least 1, got {jobs}")
        self.gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
        self._jobs = jobs or self.gpus or max(1, usable_cores() // threads)

    @property
    def slots(self) -> int:
        return self._jobs

    def carry_out(
        self, study: StudyDirectory, runs: Sequence[Run], folder: Path
    ) -> Iterator[Ended]:
        waiting, free = list(runs), list(range(self._jobs))
        under_way: dict[int, RunProcess] = {}
        try:
            while waiting or under_way:
                while waiting and free:
                    slot = free.pop(0)
                    variables = {"CUDA_VISIBLE_DEVICES": str(slot % self.gpus)} if self.gpus else {}
                    under_way[slot] = RunProcess(study, waiting.pop(0), folder, variables)
                over = [slot for slot, process in under_way.items() if process.over()]
                for slot in over:
                    process = under_way.pop(slot)
                    free.append(slot)
                    yield Ended(process.run, process.wait(), process.wall_s)
                if not over:
                    time.sleep(NAP)
        finally:
            for process in under_way.values():
                process.end()
