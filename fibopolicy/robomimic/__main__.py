"""`python -m fibopolicy.robomimic train --config CONFIG.json`: robomimic's training
with our encoders.

Exit codes: 0 trained, 1 the training failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from fibopolicy.errors import UserError, quoted
from fibopolicy.utils.processes import make_streams_safe


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see fibopolicy.__main__
    make_streams_safe()
    warnings.showwarning = _print_warning
    debug = "--debug" in sys.argv
    try:
        _run(_parse())
    except UserError as error:
        _end(error, debug, f"error: {error}", 2)
    except KeyboardInterrupt as error:
        _end(error, debug, "interrupted", 130)
    except Exception as error:
        _end(
            error,
            debug,
            f"training failed: {' '.join(f'{type(error).__name__}: {error}'.split())}",
            1,
        )


def _parse() -> argparse.Namespace:
    parser = _Parser(
        prog="python -m fibopolicy.robomimic", description="robomimic with fibopolicy's encoders"
    )
    verb = parser.add_subparsers(dest="verb", required=True).add_parser(
        "train",
        help="run robomimic's training",
        description="Run robomimic's own training with fibopolicy's encoders registered.",
    )
    verb.add_argument("--config", type=Path, required=True, help="robomimic configuration, JSON")
    verb.add_argument("--dataset", type=Path, help="robomimic HDF5 file, instead of train.data")
    verb.add_argument("--name", help="instead of experiment.name")
    verb.add_argument(
        "--out", type=Path, help="folder for experiments, instead of train.output_dir"
    )
    verb.add_argument(
        "--overwrite", action="store_true", help="replace the runs of an experiment of this name"
    )
    verb.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    from fibopolicy.robomimic.train import train

    done = train(
        arguments.config,
        dataset=arguments.dataset,
        name=arguments.name,
        out=arguments.out,
        overwrite=arguments.overwrite,
    )
    print(f"{done.folder}: trained, {len(done.checkpoints)} checkpoints")
    if done.checkpoints:
        print(f"next: fibopolicy evaluate {quoted(done.checkpoints[-1])}")


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    if category is UserWarning and "fibopolicy" in filename:
        print(f"fibopolicy: warning: {message}", file=sys.stderr)


def _end(error: BaseException, debug: bool, line: str, code: int) -> NoReturn:
    if debug:
        raise error
    print(f"fibopolicy: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
