"""Finds damage that makes the HDF5 library run for ever or crash, which no exception
handler can catch.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from fibopolicy.datasets import structure_walk
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, expanded

#: Seconds without progress, one demo or more, after which a file counts as damaged.
#: Slow network disks need some.
TIME_LIMIT = 60.0
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


def check_structure(path: StrPath, *, attributes: bool = False) -> None:
    """Walk through a file's structure in another process, and return quietly if that
    ends. Other faults are not reported.

    A file that has not changed since it was checked is not checked again by this
    process.

    Args:
        path: the file.
        attributes: read the attributes of all demos too, of which `model_file` may be
            large.

    Raises:
        UserError: the walk crashes, or makes no progress for `TIME_LIMIT` seconds.
    """
    path = expanded(path)
    if path.is_file() and sys.executable:
        stat = path.stat()
        _check(path, stat.st_size, stat.st_mtime_ns, attributes)


@functools.lru_cache(maxsize=256)
def _check(path: Path, size: int, mtime_ns: int, attributes: bool) -> None:
    # -P: this folder's modules must not hide those of the standard library
    command = [
        sys.executable,
        "-P",
        structure_walk.__file__,
        str(path),
        *["attributes"][:attributes],
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            while select.select([child.stdout], [], [], TIME_LIMIT)[0]:
                if not os.read(child.stdout.fileno(), 4096):
                    break
            else:
                raise UserError(
                    f"{path}: is damaged: the HDF5 library made no progress in {TIME_LIMIT:g} s;"
                    " fetch or record it again"
                )
        except BaseException:
            child.kill()
            raise
    if -child.returncode in _CRASHES:
        name = signal.Signals(-child.returncode).name
        raise UserError(
            f"{path}: is damaged: the HDF5 library crashes on it ({name}); fetch or record it again"
        )
