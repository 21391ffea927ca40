"""A process that evaluates a snapshot while its training goes on: `python -m
fibopolicy.evaluation.monitor FOLDER ...`.

Training starts it and holds the other end of its standard input; when that closes, this
process ends. Its start states are of a seed of their own, so that nothing is chosen on
those that `fibopolicy evaluate` measures with.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from fibopolicy.errors import UserError

#: Of the start states; far from those that people give to `fibopolicy evaluate`.
SEED = 730_001
#: Training goes first on a busy machine.
NICENESS = 5


def main() -> None:
    """Evaluate, write the result, end. Exit code 2 for the user's mistakes, told in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="snapshot in the form of a run directory")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the evaluation of these very weights"
    )
    options = parser.parse_args()
    # a keyboard interrupts the whole group: training alone answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()
    os.nice(NICENESS)
    try:
        monitor(options)
    except UserError as error:
        print(f"fibopolicy: error: {error}", file=sys.stderr)
        sys.exit(2)


def monitor(options: argparse.Namespace) -> None:
    """The success rate of the snapshot, with its 95 % Wilson interval, as a JSON file."""
    # Here, since every process of a simulator imports this module once more.
    from fibopolicy.evaluation.config import EvaluateConfig
    from fibopolicy.evaluation.evaluate_run import evaluate_run
    from fibopolicy.utils.files import atomic_write

    config = EvaluateConfig(
        options.folder,
        options.episodes,
        seed=SEED,
        video=0,
        workers=options.workers,
        device=options.device,
    )
    done = evaluate_run(config, resume=options.resume, overwrite=not options.resume)
    rate = done.rate
    document = {
        "success": rate.value,
        "low": rate.low,
        "high": rate.high,
        "episodes": rate.episodes,
        "errors": rate.errors,
        "seconds": done.seconds,
        "text": str(rate),
    }
    with atomic_write(options.result) as aside:
        aside.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _end_with_training() -> None:
    # not through Python's buffer, whose lock this thread would take to its grave
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
