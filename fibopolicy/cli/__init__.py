"""`fibopolicy <verb>`: parse, call, print. Each verb is a dataclass in a file beside
this one; the work is done below.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from fibopolicy.cli.attention import ShowPattern
from fibopolicy.cli.compare import Compare
from fibopolicy.cli.data import Collect, Expand, Fetch, Inspect, Render, Replay, Split
from fibopolicy.cli.evaluate import Evaluate, Rates
from fibopolicy.cli.init_states import InitStates
from fibopolicy.cli.mistakes import mistake
from fibopolicy.cli.profile import Profile
from fibopolicy.cli.robomimic import Robomimic
from fibopolicy.cli.study import Study
from fibopolicy.cli.train import Train, with_preset
from fibopolicy.errors import UserError, unknown
from fibopolicy.quickstart import Quickstart
from fibopolicy.utils.imports import IMPORTED
from fibopolicy.utils.processes import drop_output, make_streams_safe

VERBS: dict[str, Callable[..., Any]] = {
    "quickstart": Quickstart,
    "collect": Collect,
    "expand": Expand,
    "fetch": Fetch,
    "inspect": Inspect,
    "split": Split,
    "replay": Replay,
    "render": Render,
    "train": Train,
    "init-states": InitStates,
    "evaluate": Evaluate,
    "rates": Rates,
    "compare": Compare,
    "study": Study,
    "robomimic": Robomimic,
    "profile": Profile,
    "show-pattern": ShowPattern,
}


def main() -> None:
    """The console command. Exit codes: 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    make_streams_safe()
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _print_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fibopolicy").setLevel(logging.INFO)
    verb = None
    try:
        if arguments == ["--version"]:
            from fibopolicy.utils.system import versions

            print(
                *(f"{name} {version}" for name, version in versions().items()), sep=", ", flush=True
            )
            return
        verb = _parse(arguments)
        verb.run()
        sys.stdout.flush()  # here, where a failure is reported
    except UserError as error:
        _end(error, debug, f"error: {error}", 2)
    except KeyboardInterrupt as error:
        resumable = dict.fromkeys((Collect, Expand, Render, Train, Evaluate), RESUME)
        advice = {Quickstart: SAME, Study: SAME, **resumable}.get(type(verb), "")
        _end(error, debug, f"interrupted{advice}", 130)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has gone
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # the error came from printing, and would come again at the end
            drop_output()
        _end(
            error,
            debug,
            f"error: {error.filename or 'input or output'}: {error.strerror or error}",
            2,
        )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        # as `Path.expanduser` says it
        if isinstance(error, RuntimeError) and "home directory" in reason:
            _end(
                error,
                debug,
                "error: a path begins with ~ or a library asks for a home, and this user id has"
                " none; set HOME",
                2,
            )
        # numpy's, torch's
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "allocate" in reason
        ):
            _end(
                error,
                debug,
                f"error: not enough memory ({reason[:200]}); use a smaller batch, image or network",
                2,
            )
        ours = (
            "please report it"
            if not IMPORTED
            else f"in this library, or in your own {', '.join(sorted(IMPORTED))}"
        )
        _end(error, debug, f"internal error: {reason} (--debug shows where; {ours})", 1)


def _parse(arguments: list[str]) -> Any:
    """The verb that the arguments ask for; a mistake in them becomes a `UserError` of
    one line instead of tyro's box.
    """
    if arguments in ([], ["help"]):
        arguments = ["--help"]
    if not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise unknown("verb", arguments[0], VERBS)
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in arguments):
        raise UserError(
            f"{arguments[0]}: an argument is empty; if it came from a shell variable, that is"
            " not set"
        )
    verbs = VERBS | {"train": with_preset(arguments)}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(
                verbs, args=arguments, prog="fibopolicy", description=DESCRIPTION, config=PLAIN
            )
    except SystemExit as end:
        if end.code != 2:
            sys.stdout.flush()
            raise
        raise mistake(told.getvalue(), arguments, VERBS) from end


SAME = "; the same command goes on"
RESUME = "; the same command with --resume, and without --overwrite, goes on"
#: A flag is given or not; there is no --no-flag.
PLAIN = (tyro.conf.FlagCreatePairsOff,)
DESCRIPTION = (
    "Train visuomotor policies by behaviour cloning, measure them in simulation. "
    "--debug shows tracebacks, --version what is installed."
)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Ours, and only ours, are for the user; those of libraries are for us."""
    if category is UserWarning:
        print(f"fibopolicy: warning: {message}", file=sys.stderr)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end(error: BaseException, debug: bool, line: str, code: int) -> None:
    if debug:
        raise error
    with contextlib.suppress(OSError):  # standard error may be full or gone
        print(f"fibopolicy: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
