"""The process of one run, as every executor starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fibopolicy.study.cells import Run
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.one_run import BUSY, FAILED, INTERRUPTED, LAST_WORDS, attempts_before, fail


class RunProcess:
    """A run under way in `python -m fibopolicy.study.one_run`; its output goes to the
    run's log.

    Args:
        folder: where "module:function" encoders are found.
        variables: of the environment, beside those that all runs get.
    """

    def __init__(
        self,
        study: StudyDirectory,
        run: Run,
        folder: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.study, self.run = study, run
        self._attempts, self._began = attempts_before(study, run), time.monotonic()
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), str(folder)) if p)
        shared = {
            "OMP_NUM_THREADS": str(study.config.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": path,
        }
        study.cell(run.cell).mkdir(parents=True, exist_ok=True)
        with study.run_log(run).open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fibopolicy.study.one_run",
                    str(study.path.absolute()),
                    run.name,
                ],
                stdin=subprocess.PIPE,  # closes when this process dies, whereupon the run ends too
                stdout=log,
                stderr=log,
                env={**os.environ, **shared, **(variables or {})},
            )

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> bool:
        """Wait until it is over; returns whether the run is done. What was killed
        without a word gets its `failed.json`.
        """
        code = self._process.wait()
        self._close()
        if self.study.done(self.run).exists():
            return True
        if code not in (FAILED, INTERRUPTED, BUSY) or (
            code == FAILED and not self.study.failed(self.run).exists()
        ):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            fail(self.study, self.run, f"its process {how} and left no word", self._attempts + 1)
        return False

    def end(self) -> None:
        """End it, kindly at first."""
        self._process.terminate()
        try:
            self._process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
