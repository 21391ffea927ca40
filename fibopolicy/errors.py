"""Errors that the user can fix, each one clear line."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can fix: a file, an option, a missing library.

    The message is one line: the thing, what was found, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """


def quoted(path: str | os.PathLike[str]) -> str:
    """`path` as one word of a shell command: quoted if necessary, and never an option."""
    name = os.fspath(path)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def printable(text: str) -> str:
    """`text` with escapes for characters that UTF-8 cannot encode, such as raw bytes in a
    file name.
    """
    return text.encode(errors="backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """An error with its type, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def message_of(error: BaseException) -> str:
    """An error's message alone, in one line."""
    return " ".join(str(error).split())


def unknown(kind: str, name: object, known: Iterable[str], summary: str = "") -> UserError:
    """The error for an unregistered name, with the nearest match and the known names, or
    a `summary` instead of these.
    """
    names = sorted(known)
    any_case = {entry.lower(): entry for entry in names}
    near = [
        any_case[match]
        for match in difflib.get_close_matches(str(name).lower(), any_case, n=1, cutoff=0.5)
    ]
    if not summary and len(names) > 60:
        nearest = f"did you mean {near[0]!r}?" if near else f"for example {names[0]!r}"
        return UserError(f"unknown {kind} {str(name)!r}: {nearest} ({len(names)} are known)")
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(
        f"unknown {kind} {str(name)!r}: {hint}known: {summary or ', '.join(names) or 'none'}"
    )
