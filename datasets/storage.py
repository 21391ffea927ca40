"""Where cached files live, and how an output appears: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fibopolicy.errors import UserError

StrPath = str | os.PathLike[str]


def cache_home() -> Path:
    """The folder for everything that can be made or downloaded again: `$XDG_CACHE_HOME/fibopolicy` or `~/.cache/fibopolicy`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fibopolicy"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise `UserError` when `path` exists and may not be replaced."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name or pass overwrite")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on a clean exit that file is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and `path` stays as it was. The temporary name is fixed, so what a killed
    process left behind is replaced by the next attempt instead of piling up.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file or a folder, so that a rename after it cannot be seen before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
