"""The process of one run: `python -m fibopolicy.study.worker STUDY CONDITION/seedN`.

Every executor starts this program, so the rows do not depend on the executor. Its
output goes to the run's log. It ends when its standard input closes, which happens when
its parent dies, so that no training continues unnoticed.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fibopolicy.errors import UserError, one_line
from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.directory import StudyDirectory, open_directory, write_json
from fibopolicy.study.executors import BUSY, FAILED, GRACE, INTERRUPTED
from fibopolicy.study.grid import Run
from fibopolicy.study.records import DIVERGED, failed_attempts, record_failure
from fibopolicy.training.trainer import Diverged, train
from fibopolicy.utils.files import Locked, directory_lock
from fibopolicy.utils.processes import make_streams_safe, set_up
from fibopolicy.utils.system import peak_memory_bytes

_log = logging.getLogger("fibopolicy.study")

#: Seconds that a run waits for its lock: an orphaned process has to end first, and a
#: shared file system to release the lock.
MAX_WAIT = 120.0


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up()
    make_streams_safe()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("fibopolicy").setLevel(logging.INFO)
    try:
        study = open_directory(Path(sys.argv[1]))
        try:
            sys.exit(0 if execute(study, study.find(sys.argv[2])) else FAILED)
        except Locked as error:
            print(error, file=sys.stderr)
            sys.exit(BUSY)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def execute(study: StudyDirectory, run: Run) -> bool:
    """Train and evaluate a run, and write its `done.json`, or on an error its
    `failed.json`. Work that an earlier process has done is not repeated.

    Returns:
        whether the run is done.

    Raises:
        Locked: another process executes it.
    """
    lock = study.run_lock(run)
    activity = f"executing {run.name}"
    with directory_lock(lock.parent, lock.name, activity=activity, max_wait=MAX_WAIT):
        study = open_directory(study.path)  # it may have been extended in the meantime
        run = study.find(run.name)
        if study.done(run).exists():
            return True
        attempts = failed_attempts(study, run) + 1
        _log.info("%s: process %d on %s", run.name, os.getpid(), platform.node())
        # Training refuses a directory with a file in it and no run.
        study.failed(run).unlink(missing_ok=True)
        try:
            _train_and_evaluate(study, run)
        except Exception as error:
            traceback.print_exc()
            record_failure(study, run, one_line(error), attempts)
            return False
        return True


def _train_and_evaluate(study: StudyDirectory, run: Run) -> None:
    if study.awaits_search(run):
        raise UserError(f"the search of {run.condition.name} is not over")
    torch.set_num_threads(study.config.threads)
    try:
        train(study.train_config(run), resume=True)
    except Diverged as error:
        if run.trial is None:
            raise
        write_json(study.done(run), {DIVERGED: one_line(error), **_training_costs(study, run)})
        return
    peak_mb = _peak_mb()  # of training only
    evaluation = study.evaluate_config(run)
    done = evaluate_run(evaluation, resume=True)
    rows = done.rows
    every = [*rows, *(row for perturbed in done.perturbed.values() for row in perturbed)]
    if broken := [row for row in every if row.error]:
        raise UserError(
            f"{len(broken)} of {len(every)} episodes could not be completed; the first:"
            f" {broken[0].error}"
        )
    costs = _costs(study, run, rows, evaluation.workers or 1)
    write_json(study.done(run), {**costs, "peak_mb": peak_mb})


def _costs(
    study: StudyDirectory, run: Run, rows: Sequence[EpisodeResult], workers: int
) -> dict[str, Any]:
    """Times of a run, and the settings that identify the study's evaluation among
    others.

    Seconds come from the metrics and rows, so they are those of gradient steps and
    episodes only, and a resumed run counts like any other.
    """
    evaluate_s = sum(row.wall_s for row in rows) / workers  # simulators work in parallel
    return {
        **_training_costs(study, run),
        "evaluate_s": evaluate_s,
        "rollout_steps_per_s": sum(row.steps for row in rows) / max(evaluate_s, 1e-9),
        "episodes": len(rows),
        "max_steps": rows[0].max_steps,
        "quality": rows[0].quality,
    }


def _training_costs(study: StudyDirectory, run: Run) -> dict[str, Any]:
    optimizer, metrics = (
        study.train_config(run).optimizer,
        RunDirectory(study.run(run)).read_metrics(),
    )
    if not metrics:  # diverged at the first step
        return {"train_s": 0.0, "steps": 0}
    samples_per_s = statistics.median(row["samples_per_s"] for row in metrics)
    steps = int(metrics[-1]["step"]) + 1
    return {
        "train_s": steps * optimizer.batch_size / samples_per_s,
        "samples_per_s": samples_per_s,
        "steps": steps,
    }


def _peak_mb() -> float:
    """The most memory that this process has used, on the GPU if it uses one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory_bytes() / 2**20


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)  # even if it hangs


if __name__ == "__main__":
    main()
