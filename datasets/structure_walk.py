"""Opens everything in a demonstration file that training reads; run by `structure` as a
script, in a process of its own.

    python -P structure_walk.py FILE [attributes]

With "attributes", the values of the demos' attributes are read as well. Writes one byte
for every demo, so that the parent sees progress. Errors are left to the parent, which
meets them again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import h5py
from h5py import h5a, h5d, h5g, h5o

_UNREAD = b"next_obs"
_DEPTH = 3  # data/demo/obs/key


def walk(path: str, attributes: bool) -> None:
    with h5py.File(path, "r") as file:
        _touch_attributes(file.id, attributes)
        _touch_attributes(file["data"].id, True)
        for name in file["data"].id:
            with contextlib.suppress(Exception):
                _touch(file["data"].id, name, attributes)
            os.write(1, b".")
        for filter_key in file.get("mask", {}).values():
            filter_key[()]


def _touch(parent: h5g.GroupID, name: bytes, attributes: bool, depth: int = 0) -> None:
    item = h5o.open(parent, name)
    if isinstance(item, h5d.DatasetID):
        # An array in one piece has an offset, and no chunks to look up.
        if item.get_offset() is None and item.get_create_plist().get_layout() == h5d.CHUNKED:
            item.get_num_chunks()
    elif isinstance(item, h5g.GroupID) and depth < _DEPTH:
        if depth == 0:  # of attributes, only those of demos are read
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
        walk(sys.argv[1], "attributes" in sys.argv[2:])
