"""One process at a time, with a name for who it is."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.utils.files import wrap_os_error

_log = logging.getLogger(__name__)


class Held(UserError):
    """Another process is at work there."""


@contextmanager
def locked(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a file, which names the holder's process, for one process at a time.

    Args:
        what: is at work there, for the message to a second one.
        wait_s: how long to wait for another holder, seconds.

    Raises:
        Held: another process holds it.
    """
    with wrap_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        began, told = time.monotonic(), False
        while not _taken(handle):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            waited = time.monotonic() - began
            if waited > 2 and not told:
                _log.info("waiting: %s is %s", holder, what)
                told = True
            if waited >= wait_s:
                raise Held(f"{path.parent}: {holder} is {what}; wait for it, or end it first")
            time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def held(path: Path) -> bool:
    """Whether a process holds this lock now."""
    if not path.exists():
        return False
    handle = os.open(path, os.O_RDWR)
    try:
        return not _taken(handle)
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.ENOLCK:  # a file system without locks
            raise UserError(
                "the study's file system knows no locks; put the study elsewhere"
            ) from error
        raise
    return True
