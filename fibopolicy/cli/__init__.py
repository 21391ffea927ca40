"""`fibopolicy <command>`: parse, call, print. A command is a dataclass with a `run`, in
the file of its group beside this one; the work is done in the packages below.

Options are flat (`--batch-size`, not `--optimizer.batch-size`): commands share the
config dataclasses of the library, whose field names are unique. tyro parses, and
reports mistakes on the command line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from fibopolicy.cli.data import (
    Collect,
    Download,
    Export,
    Generate,
    Import,
    Inspect,
    Render,
    Replay,
    Split,
)
from fibopolicy.cli.evaluate import Compare, Evaluate, MakeInitStates, Results
from fibopolicy.cli.hub import Upload
from fibopolicy.cli.options import join_help_lines
from fibopolicy.cli.profile import PlotPattern, Profile
from fibopolicy.cli.robomimic import RobomimicCommand
from fibopolicy.cli.study import StudyCommand
from fibopolicy.cli.train import Train, with_preset
from fibopolicy.errors import UserError, one_line
from fibopolicy.quickstart import Quickstart
from fibopolicy.utils.imports import IMPORTED
from fibopolicy.utils.processes import drop_output, make_streams_safe

COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": Quickstart,
    "collect": Collect,
    "generate": Generate,
    "download": Download,
    "import": Import,
    "export": Export,
    "inspect": Inspect,
    "split": Split,
    "replay": Replay,
    "render": Render,
    "train": Train,
    "init-states": MakeInitStates,
    "evaluate": Evaluate,
    "results": Results,
    "compare": Compare,
    "upload": Upload,
    "study": StudyCommand,
    "robomimic": RobomimicCommand,
    "profile": Profile,
    "plot-pattern": PlotPattern,
}
DESCRIPTION = (
    "Train visuomotor policies by behaviour cloning and evaluate them in simulation. "
    "--debug shows tracebacks, --version the installed versions."
)
#: A flag is given or not; there is no --no-flag.
CONFIG = (tyro.conf.FlagCreatePairsOff,)
join_help_lines()


def main() -> None:
    """The console command. Exit codes: 0 done, 1 an internal error, 2 a user
    error, 130 interrupted, 141 the reader of its output is gone.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    make_streams_safe()
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _print_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fibopolicy").setLevel(logging.INFO)
    command = None
    try:
        if arguments == ["--version"]:
            from fibopolicy.utils.system import versions

            print(*(f"{name} {version}" for name, version in versions().items()), sep=", ")
        else:
            command = parse(arguments)
            command.run()
        sys.stdout.flush()  # here, where a failure is reported
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)  # as of any command that `| head` ends
    except KeyboardInterrupt as error:
        _end(error, debug, f"interrupted{_how_to_resume(command)}", 130)
    except Exception as error:
        if isinstance(error, OSError):
            try:
                sys.stdout.flush()
            except OSError:  # the error came from printing, and would recur at exit
                drop_output()
        _end(error, debug, *_explain(error))


def parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for.

    Raises:
        UserError: an argument is empty, or a value is not accepted.
        SystemExit: after `--help`, or with code 2 after tyro's message about a mistake.
    """
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in arguments):
        raise UserError(
            f"{arguments[0]}: an argument is empty; if it came from a shell variable, set that"
            " variable"
        )
    arguments = [re.sub("^(--[a-z-]+=)?(~.*)", _at_home, word) for word in arguments]
    if shutil.get_terminal_size().columns < 40:  # tyro takes very long to wrap at a few letters
        os.environ["COLUMNS"] = "40"
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS | {"train": with_preset(arguments)},
            args=["--help"] if arguments in ([], ["help"]) else arguments,
            prog="fibopolicy",
            description=DESCRIPTION,
            config=CONFIG,
        )
    except SystemExit:
        sys.stdout.flush()
        raise


def _at_home(word: re.Match[str]) -> str:
    """`--out=~/x` with the home folder; shells replace a ~ only where a word begins."""
    return (word[1] or "") + os.path.expanduser(word[2])


def _explain(error: Exception) -> tuple[str, int]:
    """The line that reports an error, and the exit code."""
    reason = one_line(error)
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {error.filename or 'input or output'}: {error.strerror or error}", 2
    if isinstance(error, RuntimeError) and "home directory" in reason:  # from `Path.expanduser`
        return (
            "error: a path begins with ~ or a library needs a home directory, and this user has"
            " none; set HOME"
        ), 2
    if isinstance(error, MemoryError) or (  # numpy's, torch's
        isinstance(error, RuntimeError) and "allocate" in reason
    ):
        return (
            f"error: not enough memory ({reason[:200]}); use a smaller batch, image or network"
        ), 2
    where = f"in this library, or in your {', '.join(sorted(IMPORTED))}"
    advice = where if IMPORTED else "please report it"
    return f"internal error: {reason} (--debug shows where; {advice})", 1


def _how_to_resume(command: object) -> str:
    if hasattr(command, "resume"):
        return "; to resume, run the same command with --resume and without --overwrite"
    if isinstance(command, Quickstart | StudyCommand | Download):
        return "; to resume, run the same command"
    return ""


def _print_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    """Print warnings of this library, which are `UserWarning`, and drop all others."""
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
