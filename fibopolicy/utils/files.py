"""Files: the folder of caches, atomic writes, checks of an output, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError, message_of

StrPath = str | os.PathLike[str]

_log = logging.getLogger(__name__)


#: Cache folders of other libraries, which fail or warn without a writable home.
_LIBRARY_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")


def cache_home() -> Path:
    """The folder for files that can be created or downloaded again:
    `$XDG_CACHE_HOME/fibopolicy` or `~/.cache/fibopolicy`.

    Without a writable home, as in a container with an arbitrary user id, it is a folder
    of this user in the temporary directory, and a warning says so.

    Raises:
        UserError: that folder cannot be used either.
    """
    if folder := _chosen_cache() or _home_cache():
        return folder
    folder = _temporary_cache()
    warnings.warn(
        f"the home folder is not writable: caches go to {folder}; set XDG_CACHE_HOME to keep them",
        stacklevel=2,
    )
    return folder


def provide_caches() -> None:
    """Without a writable home, make other libraries keep their caches in `cache_home`.
    Call it before they are imported.

    Otherwise the import of robosuite fails in numba, and matplotlib makes a new folder
    each time.
    """
    if _home_cache() is None:
        with contextlib.suppress(UserError):  # raised again where a cache is needed
            folder = _chosen_cache() or _temporary_cache()
            for name in _LIBRARY_CACHES:
                os.environ.setdefault(name, str(folder / name.lower()))


def _chosen_cache() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "fibopolicy" if base else None


def _home_cache() -> Path | None:
    try:
        folder = Path.home() / ".cache" / "fibopolicy"
    except RuntimeError:  # a user id that the system does not know
        return None
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder if os.access(nearest, os.W_OK | os.X_OK) else None


def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"fibopolicy-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used for caches ({error.strerror}), and the home folder is"
            " not writable; set XDG_CACHE_HOME"
        ) from error
    return folder


def expanded(path: StrPath) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder; unchanged
    if no such home is known.
    """
    return Path(os.path.expanduser(path))


def check_resume_or_overwrite(*, resume: bool, overwrite: bool) -> None:
    """Raise `UserError` if both options are given."""
    if resume and overwrite:
        raise UserError("pass either --resume or --overwrite, not both")


def check_output(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise `UserError` if `path` is a folder, one of the command's `inputs`, or exists
    and `overwrite` is not given.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and any(source.exists() and path.samefile(source) for source in inputs):
        raise UserError(
            f"{path}: is the input itself, which is never modified; choose another name"
        )
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name or pass --overwrite")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on a clean exit that file is flushed to
    disk and renamed to `path`.

    On an exception the temporary file is removed and `path` stays as it was. The
    temporary name is fixed, so the next attempt replaces the file that a killed process
    left behind. The file is locked, so that two live processes cannot write into it at
    once (open HDF5 files under it with `locking=False`).
    """
    partial = path.with_name(path.name + ".partial")
    with wrap_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _try_lock(handle, path.parent):
            raise Locked(f"{path}: another process is writing it; wait for it, or end it first")
        renamed = False
        try:
            yield partial
            with wrap_os_error(path):
                # some writers replace the file by one that only its owner may read
                os.chmod(partial, os.fstat(handle).st_mode)
                flush(partial)
                os.replace(partial, path)
                renamed = True
                flush(path.parent)
        finally:
            if not renamed:  # after the rename, it may be another process's file
                partial.unlink(missing_ok=True)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on a clean exit its files are flushed to
    disk and it is renamed to `path`, which must not exist.

    On an exception the folder is removed, as is one that a killed process left behind.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; choose another name, or remove it first")
    partial = path.with_name(path.name + ".partial")
    with directory_lock(partial, activity="writing it"):
        try:
            _empty(partial)
            yield partial
            with wrap_os_error(path):
                for file in [*partial.rglob("*"), partial]:
                    flush(file)
                os.rename(partial, path)
                flush(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one on each line, such as `metrics.jsonl`. Lines
    that a kill cut short are left out; a file that does not exist holds none.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


class Locked(UserError):
    """Another process holds the lock."""


@contextmanager
def directory_lock(
    folder: Path,
    name: str | None = None,
    *,
    activity: str = "using it",
    max_wait: float = 0.0,
) -> Iterator[None]:
    """Hold a folder for one process at a time.

    The system releases the lock when its holder ends, however it ends.

    Args:
        folder: created if it does not exist.
        name: a lock file in the folder. It names its holder, and keeps out only other
            holders of the same lock file.
        activity: what the holder does, for the message to a second process.
        max_wait: how long to wait for another holder, seconds.

    Raises:
        Locked: another process holds it.
    """
    with wrap_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT if name else os.O_RDONLY
        handle = os.open(folder / (name or ""), flags, 0o666)
    try:
        began, logged = time.monotonic(), False
        while not _try_lock(handle, folder):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() if name else ""
            holder = holder or "another process"
            waited = time.monotonic() - began
            if waited >= max_wait:
                raise Locked(f"{folder}: {holder} is {activity}; wait for it, or end it first")
            if waited > 2 and not logged:
                _log.info("waiting: %s is %s", holder, activity)
                logged = True
            time.sleep(0.1)
        if name:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path` now, which may be another user's."""
    if not path.exists():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return not _try_lock(handle, path.parent, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _try_lock(handle: int, folder: Path, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.ENOLCK:
            raise UserError(
                f"{folder}: its file system does not support locks; choose a folder elsewhere"
            ) from error
        raise
    return True


@contextmanager
def wrap_os_error(path: Path) -> Iterator[None]:
    """Turn the system's write errors (disk full, no permission) into one line that
    names `path`. Of a full disk, h5py also raises `RuntimeError`.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or message_of(error)
        raise UserError(f"{path}: cannot be written: {reason}") from error


def flush(path: Path) -> None:
    """fsync a file or a folder, so that a later rename cannot precede its bytes on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
