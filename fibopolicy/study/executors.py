"""Executors execute the runs of a study, each in a process: on this machine, or with
`ray_cluster` on a Ray cluster.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from fibopolicy.errors import UserError
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.grid import Run
from fibopolicy.study.records import failed_attempts, record_failure
from fibopolicy.utils.files import provide_caches
from fibopolicy.utils.gpu_memory import RUNS_PER_GPU
from fibopolicy.utils.system import usable_cores

#: Exit codes of a run's process: it failed and `failed.json` says why; it was
#: interrupted; another process executes the run.
FAILED, INTERRUPTED, BUSY = 1, 130, 75
#: Seconds that an interrupted process may take to end.
GRACE = 10.0
#: Names the GPUs that a process may use.
VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Seconds between two polls of the processes.
POLL_INTERVAL = 0.1


#: Gives the next run to execute; `None` if there is none until another run has ended.
NextRun = Callable[[], Run | None]


class Executor(Protocol):
    """Executes runs. A failed run does not stop the others."""

    @property
    def slots(self) -> int:
        """Number of runs at a time."""

    def execute(
        self, study: StudyDirectory, next_run: NextRun, folder: Path
    ) -> Iterator[tuple[Run, float]]:
        """Execute runs until there is no next one, and yield each with its seconds when
        its process has ended, done or not. "module:function" encoders are imported from
        `folder`.
        """


class RunProcess:
    """The process of a run; its output goes to the run's log.

    Args:
        folder: folder that "module:function" encoders are imported from.
        variables: environment variables for this process.
    """

    def __init__(
        self,
        study: StudyDirectory,
        run: Run,
        folder: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.study, self.run = study, run
        self._attempts, self._began = failed_attempts(study, run), time.monotonic()
        provide_caches()  # before the process imports anything that needs them
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), str(folder)) if p)
        threads = {"OMP_NUM_THREADS": str(study.config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        study.run_log(run).parent.mkdir(parents=True, exist_ok=True)
        with study.run_log(run).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fibopolicy.study.worker", study.path.absolute(), run.name],
                stdin=subprocess.PIPE,  # closes when this process dies, which ends the run
                stdout=log,
                stderr=log,
                env={**os.environ, **threads, "PYTHONPATH": path, **(variables or {})},
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> float:
        """Wait for the process, and return the seconds it took. Writes `failed.json`
        for a process that was killed.
        """
        code = self._process.wait()
        self._close()
        study, run = self.study, self.run
        explained = code in (INTERRUPTED, BUSY) or (code == FAILED and study.failed(run).exists())
        if not explained and not study.done(run).exists():
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            error = f"its process {how} without an error message"
            record_failure(study, run, error, self._attempts + 1)
        return time.monotonic() - self._began

    def end(self) -> None:
        """Interrupt the process, and kill it if it does not end."""
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def runs_per_gpu(jobs_per_gpu: int | None, gpus: int) -> int:
    """How many runs share each of the `gpus`: `jobs_per_gpu`, by default one.

    Raises:
        UserError: a number below 1, or no GPU.
    """
    if jobs_per_gpu is None:
        return 1
    if jobs_per_gpu < 1:
        raise UserError(f"jobs_per_gpu must be at least 1, got {jobs_per_gpu}")
    if not gpus:
        raise UserError("--jobs-per-gpu needs a GPU for the study, and there is none; use --jobs")
    return jobs_per_gpu


class Local:
    """Executes runs in parallel on this machine.

    Args:
        jobs: processes at a time; by default `jobs_per_gpu` on each GPU, or without
            GPUs as many as there are cores for their threads.
        threads: torch threads of each process.
        device: device of the study.
        jobs_per_gpu: processes that share a GPU, by default one.

    Raises:
        UserError: a number below 1, or `jobs_per_gpu` with `jobs` or without a GPU.
    """

    def __init__(
        self,
        jobs: int | None,
        threads: int,
        device: str | None,
        jobs_per_gpu: int | None = None,
    ) -> None:
        if jobs is not None and jobs < 1:
            raise UserError(f"jobs must be at least 1, got {jobs}")
        if jobs is not None and jobs_per_gpu is not None:
            raise UserError("--jobs counts all processes, --jobs-per-gpu those of a GPU; give one")
        self.gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
        on_gpus = self.gpus * runs_per_gpu(jobs_per_gpu, self.gpus)
        self._jobs = jobs or on_gpus or max(1, usable_cores() // threads)

    @property
    def slots(self) -> int:
        return self._jobs

    def execute(
        self, study: StudyDirectory, next_run: NextRun, folder: Path
    ) -> Iterator[tuple[Run, float]]:
        # A scheduler may have given this process other GPUs than the first ones.
        named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
        names = named or list(map(str, range(self.gpus)))
        sharing = {RUNS_PER_GPU: str(math.ceil(self._jobs / (self.gpus or 1)))}
        free = list(range(self._jobs))
        active: dict[int, RunProcess] = {}
        try:
            while True:
                while free and (run := next_run()) is not None:
                    slot = free.pop(0)
                    gpu = {VISIBLE: names[slot % self.gpus]} if self.gpus else {}
                    active[slot] = RunProcess(study, run, folder, sharing | gpu)
                if not active:
                    return
                while not (ended := [i for i, process in active.items() if process.has_ended()]):
                    time.sleep(POLL_INTERVAL)
                for slot in ended:
                    process = active.pop(slot)
                    free.append(slot)
                    yield process.run, process.wait()
        finally:
            for process in active.values():
                process.end()
