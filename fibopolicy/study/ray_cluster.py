"""Execute runs on the nodes of a Ray cluster that share the study's directory."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError, one_line
from fibopolicy.study.directory import StudyDirectory, open_directory
from fibopolicy.study.executors import NextRun, RunProcess, runs_per_gpu
from fibopolicy.study.grid import Run
from fibopolicy.study.records import failed_attempts, record_failure
from fibopolicy.utils.gpu_memory import RUNS_PER_GPU

#: Seconds that an address may take to connect, and to pass Ray's health check.
CONNECT_TIMEOUT, HEALTH_TIMEOUT = 5.0, 60.0
#: How often Ray restarts a run whose node or worker is lost.
MAX_RETRIES = 5


class RayCluster:
    """One Ray task per run, with the study's threads as CPUs, and a GPU if the cluster
    has any.

    A task starts the same process as `Local`, so the rows are the same. When a node is
    lost, Ray restarts its runs on another node, where they resume from their last
    checkpoint.

    Args:
        address: "auto", HOST:PORT or ray://HOST:PORT.
        threads: torch threads of each run.
        device: device of the study.
        jobs_per_gpu: runs that share a GPU, by default one.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it is too small.
    """

    def __init__(
        self, address: str, threads: int, device: str | None, jobs_per_gpu: int | None = None
    ) -> None:
        self._ray = _connect(address)
        resources = self._ray.cluster_resources()
        cpus = int(resources.get("CPU", 0))
        self.gpus = int(resources.get("GPU", 0)) if device in (None, "cuda") else 0
        self._threads = threads
        self._per_gpu = runs_per_gpu(jobs_per_gpu, self.gpus)
        self._slots = self.gpus * self._per_gpu or cpus // threads
        if not self._slots:
            raise UserError(
                f"ray {address}: the cluster has {cpus} CPUs, a run takes {threads}; lower the"
                " threads of the study"
            )

    @property
    def slots(self) -> int:
        return self._slots

    def execute(
        self, study: StudyDirectory, next_run: NextRun, folder: Path
    ) -> Iterator[tuple[Run, float]]:
        resources = {"num_cpus": self._threads, "num_gpus": 1 / self._per_gpu if self.gpus else 0}
        task = self._ray.remote(**resources, max_retries=MAX_RETRIES)(execute_on_node)
        path = str(study.path.absolute())
        waiting: dict[Any, Run] = {}
        try:
            while True:
                for run in iter(next_run, None):
                    waiting[task.remote(path, run.name, str(folder), self._per_gpu)] = run
                if not waiting:
                    return
                ready, _ = self._ray.wait(list(waiting), num_returns=1)
                for reference in ready:
                    run = waiting.pop(reference)
                    yield run, self._seconds(study, run, reference)
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)  # the run's process ends with its worker
            self._ray.shutdown()

    def _seconds(self, study: StudyDirectory, run: Run, reference: Any) -> float:
        try:
            return float(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            attempts = failed_attempts(study, run) + 1
            record_failure(study, run, one_line(error)[:300], attempts)
            return 0.0


def execute_on_node(directory: str, name: str, folder: str, per_gpu: int) -> float:
    """The Ray task: execute a run in a process, and return its seconds."""
    study = open_directory(Path(directory))
    variables = {RUNS_PER_GPU: str(per_gpu)}
    process = RunProcess(study, study.find(name), Path(folder), variables)
    try:
        return process.wait()
    except BaseException:
        process.end()
        raise


def _connect(address: str) -> Any:
    """The ray module, connected to the cluster."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("studies on Ray need ray: pip install 'fibopolicy[ray]'") from error
    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if target != "auto":
        _check_address(target)
    try:
        ray.init(
            address=target,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except Exception as error:
        raise UserError(
            f"ray {address}: no cluster answers ({one_line(error)[:200]}); start one with"
            " `ray start --head`, or name its HOST:PORT"
        ) from error
    return ray


def _check_address(address: str) -> None:
    """Check that a Ray cluster answers, since `ray.init` would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray {address}: expected auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray {address}: does not answer ({error}); check that the cluster runs and that its"
            " port is open from here"
        ) from error
    if address.startswith("ray://"):
        return
    try:
        health = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HEALTH_TIMEOUT,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"ray {address}: the port is open, but Ray's health check did not finish"
            f" within {HEALTH_TIMEOUT:.0f} s; name the head node's HOST:PORT"
        ) from error
    if health.returncode:
        reason = (health.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"ray {address}: is not a healthy Ray cluster ({reason}); name the head node's"
            " HOST:PORT"
        )
