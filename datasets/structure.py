"""Finds corruption that makes the HDF5 library hang or crash, beyond any exception
handler.

`check_structure` runs this file as a script, in a separate process, which opens
everything in a demonstration file that training reads:

    python -P structure.py FILE [attributes]

With "attributes", the values of the demos' attributes are read as well. The process
writes one byte for every demo, so that the parent sees progress. It ignores errors: the
parent meets them again when it reads the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
from h5py import h5a, h5d, h5g, h5o

#: Seconds without progress, one demo or more, after which a file counts as corrupt.
#: Slow network disks need some.
TIME_LIMIT = 60.0
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

_UNREAD = b"next_obs"
_DEPTH = 3  # data/demo/obs/key


# In the parent process. The child runs this file alone, so these functions import the
# rest of the library themselves.


def check_structure(path: str | os.PathLike[str], *, attributes: bool = False) -> None:
    """Walk through a file's structure in another process; other faults are not
    reported.

    A file that is unchanged since this process checked it is not checked again.

    Args:
        path: the file.
        attributes: read the attributes of all demos too, of which `model_file` may be
            large.

    Raises:
        UserError: the walk crashes, or makes no progress for `TIME_LIMIT` seconds.
    """
    from fibopolicy.utils.files import expanded

    path = expanded(path)
    if path.is_file() and sys.executable:
        stat = path.stat()
        _check(path, stat.st_size, stat.st_mtime_ns, attributes)


@functools.lru_cache(maxsize=256)
def _check(path: Path, size: int, mtime_ns: int, attributes: bool) -> None:
    from fibopolicy.errors import UserError

    # -P: the modules in this folder must not hide those of the standard library
    command = [sys.executable, "-P", __file__, str(path), *["attributes"][:attributes]]
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
                    f"{path}: is corrupt: the HDF5 library made no progress in {TIME_LIMIT:g} s;"
                    " download or record it again"
                )
        except BaseException:
            child.kill()
            raise
    if -child.returncode in _CRASHES:
        name = signal.Signals(-child.returncode).name
        raise UserError(
            f"{path}: is corrupt: the HDF5 library crashes on it ({name}); download or record it"
            " again"
        )


# In the child process


def _walk(path: str, attributes: bool) -> None:
    with h5py.File(path, "r") as file:
        _touch_attributes(file.id, attributes)
        data = file.get("data", file).id  # demos may lie at the root
        _touch_attributes(data, True)
        for name in data:
            with contextlib.suppress(Exception):
                _touch(data, name, attributes)
            os.write(1, b".")
        for filter_key in file.get("mask", {}).values():
            filter_key[()]


def _touch(parent: h5g.GroupID, name: bytes, attributes: bool, depth: int = 0) -> None:
    item = h5o.open(parent, name)
    if isinstance(item, h5d.DatasetID):
        # A contiguous array has an offset, and no chunks to look up.
        if item.get_offset() is None and item.get_create_plist().get_layout() == h5d.CHUNKED:
            item.get_num_chunks()
    elif isinstance(item, h5g.GroupID) and depth < _DEPTH:
        if depth == 0:  # only the attributes of demos are read
            _touch_attributes(item, attributes)
        for key in item:
            if key != _UNREAD:
                with contextlib.suppress(Exception):
                    _touch(item, key, attributes, depth + 1)


def _touch_attributes(item: Any, values: bool) -> None:
    if not h5a.get_num_attrs(item):
        return
    if values:
        manager = h5py.AttributeManager(_Holder(item))
        for name in manager:
            with contextlib.suppress(Exception):
                manager[name]
    else:
        h5a.iterate(item, lambda name: None)


class _Holder:
    """What `h5py.AttributeManager` needs of an object."""

    def __init__(self, item: Any) -> None:
        self.id = item


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        _walk(sys.argv[1], "attributes" in sys.argv[2:])
