"""Runs on the nodes of a Ray cluster that share the study's directory."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.study.cells import Run
from fibopolicy.study.directory import StudyDirectory, open_directory
from fibopolicy.study.executors import Ended
from fibopolicy.study.executors.process import RunProcess
from fibopolicy.study.one_run import attempts_before, fail

#: How long an address may take to answer, and what answers to prove that it is a
#: cluster, seconds.
ANSWER, PROOF = 5.0, 60.0
#: How often a run is begun again because its node or its worker was lost.
LOSSES = 5


class RayCluster:
    """One Ray task for each run, with the study's threads as its CPUs and a GPU where
    the cluster has any.

    A task starts the same process as `Local` does, so rows are the same. When a node is
    lost, Ray begins its runs again on another one, where they go on from their last
    checkpoint.

    Args:
        address: "auto", HOST:PORT or ray://HOST:PORT.
        threads: of torch in each run.
        device: of the study.

    Raises:
        UserError: Ray is missing, or no cluster answers there.
    """

    def __init__(self, address: str, threads: int, device: str | None) -> None:
        self._ray = _connected(address)
        resources = self._ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0)) if device in (None, "cuda") else 0
        self._threads = threads
        self._slots = self.gpus or int(resources.get("CPU", 0)) // threads
        if not self._slots:
            raise UserError(
                f"ray {address}: the cluster has {resources.get('CPU', 0):.0f} CPUs, a run takes"
                f" {threads}; lower threads"
            )

    @property
    def slots(self) -> int:
        return self._slots

    def carry_out(
        self, study: StudyDirectory, runs: Sequence[Run], folder: Path
    ) -> Iterator[Ended]:
        task = self._ray.remote(
            num_cpus=self._threads, num_gpus=1 if self.gpus else 0, max_retries=LOSSES
        )(carry_out_on_node)
        waiting = {
            task.remote(str(study.path.absolute()), run.name, str(folder)): run for run in runs
        }
        try:
            while waiting:
                ready, _ = self._ray.wait(list(waiting), num_returns=1)
                for reference in ready:
                    yield self._ended(study, waiting.pop(reference), reference)
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)  # the run's process ends with its worker
            self._ray.shutdown()

    def _ended(self, study: StudyDirectory, run: Run, reference: Any) -> Ended:
        try:
            done, wall_s = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            fail(
                study,
                run,
                " ".join(f"{type(error).__name__}: {error}".split())[:300],
                attempts_before(study, run) + 1,
            )
            return Ended(run, False, 0.0)
        return Ended(run, done, wall_s)


def carry_out_on_node(directory: str, name: str, folder: str) -> tuple[bool, float]:
    """The Ray task: a run of the study in a shared directory, in a process of its own;
    whether it is done, and its seconds.
    """
    study = open_directory(Path(directory))
    process = RunProcess(study, study.find(name), Path(folder))
    try:
        return process.wait(), process.wall_s
    except BaseException:
        process.end()
        raise


def _connected(address: str) -> Any:
    """The ray module, once it is connected to the cluster."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("studies on Ray need ray: pip install 'fibopolicy[ray]'") from error
    wanted = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if wanted != "auto":
        _check_answer(wanted)
    began = time.monotonic()
    try:
        ray.init(
            address=wanted,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"ray {address}: no cluster answers ({reason}, after {time.monotonic() - began:.0f} s);"
            " start one with `ray start --head`, or name its HOST:PORT"
        ) from error
    return ray


def _check_answer(address: str) -> None:
    """Ask for a connection first, and whether Ray is behind it: `ray.init` would try
    for minutes, or for ever.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray {address}: expected auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray {address}: does not answer ({error}); is the cluster up, and its port open from"
            " here?"
        ) from error
    if address.startswith("ray://"):
        return
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        found = subprocess.run(
            asked,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROOF,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"ray {address}: something listens there, but did not prove to be a Ray cluster in"
            f" {PROOF:.0f} s; name the head's HOST:PORT"
        ) from error
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"ray {address}: is no sound Ray cluster ({reason}); name the head's HOST:PORT"
        )
