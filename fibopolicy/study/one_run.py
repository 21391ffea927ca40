"""One run of a study in a process of its own: `python -m fibopolicy.study.one_run STUDY
CELL/seedN`.

Every executor starts this same program, so rows do not depend on the executor. What it
prints goes to the run's log. It ends when its standard input closes, as happens when
whoever started it dies: nothing is left behind to train unseen.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fibopolicy.utils.processes import make_streams_safe, set_up

if TYPE_CHECKING:
    from fibopolicy.study.cells import Run
    from fibopolicy.study.directory import StudyDirectory

_log = logging.getLogger("fibopolicy.study")

#: Exit codes: the run failed and says so in `failed.json`; it was interrupted; another
#: process is at work on it.
FAILED, INTERRUPTED, BUSY = 1, 130, 75
#: How long a run waits for a lost process of its own to end, and a shared file system
#: to let go of its lock, seconds.
PATIENCE = 120.0
#: How long an interrupted process may take to end, seconds.
LAST_WORDS = 10.0


def main() -> None:
    """The whole life of a run's process."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    set_up()
    make_streams_safe()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("fibopolicy").setLevel(logging.INFO)
    try:
        from fibopolicy.study.directory import open_directory
        from fibopolicy.utils.files import Locked

        study = open_directory(Path(sys.argv[1]))
        try:
            sys.exit(0 if carry_out(study, study.find(sys.argv[2])) else FAILED)
        except Locked as error:
            print(error, file=sys.stderr)
            sys.exit(BUSY)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def carry_out(study: StudyDirectory, run: Run) -> bool:
    """Train, evaluate, write `done.json`; on an error `failed.json`. Returns whether
    the run is done.

    What an earlier process has done is not repeated.
    """
    from fibopolicy.study.directory import open_directory
    from fibopolicy.utils.files import directory_lock

    lock = study.run_lock(run)
    activity = f"at work on {run.name}"
    with directory_lock(lock.parent, lock.name, activity=activity, max_wait=PATIENCE):
        study = open_directory(study.path)  # it may have grown before this run was held
        run = study.find(run.name)
        if study.done(run).exists():
            return True
        attempts = attempts_before(study, run) + 1
        _log.info("%s: process %d on %s", run.name, os.getpid(), platform.node())
        # training takes no directory with something in it that is no run
        study.failed(run).unlink(missing_ok=True)
        try:
            _train_and_evaluate(study, run)
        except Exception as error:
            traceback.print_exc()
            fail(study, run, " ".join(f"{type(error).__name__}: {error}".split()), attempts)
            return False
        return True


def attempts_before(study: StudyDirectory, run: Run) -> int:
    """How often a run has failed so far."""
    from fibopolicy.study.directory import read_json

    failed = study.failed(run)
    return int(read_json(failed).get("attempts", 0)) if failed.exists() else 0


def fail(study: StudyDirectory, run: Run, reason: str, attempts: int) -> None:
    """Write a run's `failed.json`."""
    from fibopolicy.study.directory import write_json

    log = str(study.run_log(run).relative_to(study.path))
    write_json(study.failed(run), {"error": reason, "log": log, "attempts": attempts})


def _train_and_evaluate(study: StudyDirectory, run: Run) -> None:
    import torch

    from fibopolicy.errors import UserError
    from fibopolicy.evaluation.evaluate import evaluate_run
    from fibopolicy.study.directory import write_json
    from fibopolicy.study.records import measured_costs
    from fibopolicy.training.trainer import train

    torch.set_num_threads(study.config.threads)
    training = study.train_config(run)
    train(training, resume=True)
    memory = _peak_mb()
    config = study.evaluate_config(run)
    rows = evaluate_run(config, resume=True).rows
    if broken := [row for row in rows if row.error]:
        raise UserError(
            f"{len(broken)} of {len(rows)} episodes could not be run to their end; the first:"
            f" {broken[0].error}"
        )
    write_json(
        study.done(run),
        measured_costs(study.run(run), training.optimizer, rows, config.workers or 1, memory),
    )


def _peak_mb() -> float:
    """The most that this process has held so far: on the GPU if it uses one, else resident."""
    import torch

    from fibopolicy.utils.system import peak_memory_bytes

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory_bytes() / 2**20


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_the_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS)
    os.kill(os.getpid(), signal.SIGKILL)  # whatever it hangs in


if __name__ == "__main__":
    main()
