"""Arrays in other files: external links and virtual datasets.

HDF5 fills a virtual dataset whose source is missing with zeros and reports no error. So
the sources are checked before anything is read. HDF5 can also keep values in raw files,
whose absence it hides in the same way; such arrays are rejected.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5o, h5s

from fibopolicy.errors import UserError

_MAX_DEPTH = 16  # links or virtual datasets in a chain
_MAX_OPEN = 32  # source files kept open; more than _MAX_DEPTH, so that none in use is closed
_PRINTF = re.compile(r"%\d*b")  # HDF5 inserts the number of a block
_BLOCK_BYTES = 64 * 2**20


class Sources:
    """Finds and checks the files that hold the values of datasets.

    Close it to release these files.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, h5py.File] = OrderedDict()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def of(
        self, dataset: h5d.DatasetID, chain: tuple[tuple[str, bytes], ...] = ()
    ) -> frozenset[str]:
        """Absolute paths of all other files that hold values of the dataset.

        Raises:
            UserError: a source is missing or does not fit, or is a raw file; the message
                starts with a verb, "is a virtual dataset over ...".
        """
        if dataset.get_offset() is not None:  # contiguous: the usual case, and a fast check
            return frozenset()
        creation = dataset.get_create_plist()
        if creation.get_layout() == h5d.VIRTUAL:
            return self._of_virtual(dataset, creation, chain)
        if creation.get_external_count():
            raise UserError("has its values in raw files; copy it into one file with h5repack")
        return frozenset()

    def follow(
        self, file: h5py.File, path: str, depth: int = 0, targets: int = 0
    ) -> frozenset[str]:
        """Absolute paths of the files that external links on the way to `path` lead
        through; `path` itself need not exist.

        Args:
            targets: how many parts of `path` links have led to, so that they must exist.

        Raises:
            UserError: a link leads nowhere; the message starts with a verb, "links to
                ...".
        """
        if depth > _MAX_DEPTH:
            raise UserError("links to itself; replace the link with the data")
        parts = _parts(path)
        for position in range(1, len(parts) + 1):
            link = file.get("/".join(parts[:position]), getlink=True)
            rest, targets_left = parts[position:], max(0, targets - position)
            if link is None:
                if position <= targets:
                    raise UserError(
                        f"links to {'/'.join(parts[:targets])!r} of {file.filename}, which does not"
                        f" exist; {_ADVICE}"
                    )
                break
            if isinstance(link, h5py.SoftLink):
                parent = [] if link.path.startswith("/") else parts[: position - 1]
                target = [*parent, *_parts(link.path)]
                beyond = "/".join([*target, *rest])
                return self.follow(file, beyond, depth + 1, len(target) + targets_left)
            if isinstance(link, h5py.ExternalLink):
                name = _text(link.filename)
                found = _find(file.filename, name, "HDF5_EXT_PREFIX")
                if found is None:
                    raise UserError(
                        f"links to {link.path!r} of {name}, a file that does not exist; {_ADVICE}"
                    )
                target = _parts(link.path)
                beyond = "/".join([*target, *rest])
                needed = len(target) + targets_left
                return self.follow(self._open(found), beyond, depth + 1, needed) | {found}
        return frozenset()

    def _of_virtual(
        self, dataset: h5d.DatasetID, creation: Any, chain: tuple[tuple[str, bytes], ...]
    ) -> frozenset[str]:
        own = _text(h5f.get_name(dataset))
        place = (os.path.realpath(own), h5py.h5i.get_name(dataset) or b"")
        if place in chain or len(chain) >= _MAX_DEPTH:
            raise UserError("is a virtual dataset over itself; replace it with the data")
        files: set[str] = set()
        covered = 0
        for i in range(creation.get_virtual_count()):
            name, key = creation.get_virtual_filename(i), creation.get_virtual_dsetname(i)
            over = f"is a virtual dataset over {key!r} of {'this file' if name == '.' else name}"
            if _PRINTF.search((name + "\n" + key).replace("%%", "")):
                raise UserError(
                    f"{over}: sources with numbered names are not supported; copy the data into one"
                    " file"
                )
            name, key = name.replace("%%", "%"), key.replace("%%", "%")
            found = os.path.abspath(own) if name == "." else _find(own, name, "HDF5_VDS_PREFIX")
            if found is None:
                raise UserError(f"{over}, a file that does not exist; {_ADVICE}")
            if name != ".":
                files.add(found)
            file = self._open(found)
            with _prefixed(f"{over}, which"):
                files |= self.follow(file, key)
            source = file.get(key)
            if not isinstance(source, h5py.Dataset):
                raise UserError(f"{over}, which does not exist; {_ADVICE}")
            covered += _check_mapping(
                over,
                dataset,
                source.id,
                creation.get_virtual_vspace(i),
                creation.get_virtual_srcspace(i),
            )
            files.add(os.path.abspath(source.file.filename))
            with _prefixed(f"{over}, which"):
                files |= self.of(source.id, (*chain, place))
        if covered != (size := prod(dataset.shape)):
            raise UserError(
                f"is a virtual dataset whose sources hold {covered} of its {size} values; {_ADVICE}"
            )
        return frozenset(files - {os.path.abspath(own)})

    def _open(self, path: str) -> h5py.File:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = h5py.File(path, "r")
            if len(self._files) > _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        return self._files[path]


@contextmanager
def _prefixed(subject: str) -> Iterator[None]:
    """Put the subject before the message of a `UserError` in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject} {error}") from error


_ADVICE = "restore it, or create the file again from its sources"


def identity(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Path, size and modification time of each file, sorted, to identify their content."""
    found = []
    for path in sorted({str(Path(path).resolve()) for path in paths}):
        stat = os.stat(path)
        found.append({"path": path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return found


def read_array(group: h5py.Group, key: str) -> np.ndarray[Any, np.dtype[Any]]:
    """An array in full, after its sources were checked.

    Raises:
        UserError: a source is missing; the message names the array.
    """
    path = f"{group.name}/{key}".lstrip("/")
    with closing(Sources()) as sources:
        dataset = _resolved(sources, group, key)
        if not isinstance(dataset, h5py.Dataset):
            raise UserError(f"{path} is missing or is not an array; record it again")
        with _prefixed(path):
            sources.of(dataset.id)
        return np.asarray(dataset[()])


def points_elsewhere(file: h5py.File) -> bool:
    """Whether any content of the file lies in another file."""
    names: list[bytes] = []

    def visit(name: bytes, info: Any) -> bool | None:
        names.append(name)
        return True if info.type == h5py.h5l.TYPE_EXTERNAL else None

    if file.id.links.visit(visit, info=True):
        return True
    for name in names:
        if file.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            continue
        item = h5o.open(file.id, name)
        if isinstance(item, h5d.DatasetID) and not _is_self_contained(item):
            return True
    return False


def copy_whole(source: h5py.Group, target: h5py.Group, key: str) -> None:
    """Copy `key`, an array or a whole group, so that the copy needs no other file.

    Links become what they lead to, and virtual datasets become plain arrays.

    Raises:
        UserError: a link leads nowhere, or the source of an array is missing; the
            message names the array.
    """
    with closing(Sources()) as sources:
        _copy(sources, source, target, key, ())


def copy_file(source: h5py.File, target: h5py.File) -> None:
    """Copy everything in a file as `copy_whole` does.

    Virtual datasets over the file itself, such as `next_obs`, stay.
    """
    with closing(Sources()) as sources:
        _copy_attributes(source, target)
        for name in source:
            _copy(sources, source, target, name, (), root=os.path.abspath(source.filename))


def _copy(
    sources: Sources,
    source: h5py.Group,
    target: h5py.Group,
    key: str,
    above: tuple[Any, ...],
    root: str | None = None,
) -> None:
    path = f"{source.name}/{key}".lstrip("/")
    item = _resolved(sources, source, key)
    if isinstance(item, h5py.Group):
        if item in above:
            raise UserError(f"{path} links to a group that holds it; remove the link")
        made = target.require_group(key)
        _copy_attributes(item, made)
        for name in item:
            _copy(sources, item, made, name, (*above, item), root)
    elif isinstance(item, h5py.Dataset):
        in_place = (
            root == os.path.abspath(item.file.filename)
            and item.name == f"{target.name.rstrip('/')}/{key}"
        )
        if _is_plain(item.id) or (in_place and _is_self_contained(item.id)):
            target.copy(item, target, name=key)
            return
        with _prefixed(path):
            sources.of(item.id)
        made = target.create_dataset(key, shape=item.shape, dtype=item.dtype)
        if item.shape:
            rows = max(1, _BLOCK_BYTES // max(1, item.dtype.itemsize * prod(item.shape[1:])))
            for start in range(0, item.shape[0], rows):
                made[start : start + rows] = item[start : start + rows]
        elif item.shape is not None:
            made[()] = item[()]
        _copy_attributes(item, made)
    elif item is None:
        raise UserError(f"{path} cannot be read; the file is corrupt")


def _resolved(sources: Sources, group: h5py.Group, key: str) -> Any:
    """What `key` leads to; `None` where the group holds no such name."""
    item = group.get(key)
    if item is None:
        path = f"{group.name}/{key}"
        with _prefixed(path.lstrip("/")):
            sources.follow(group.file, path)
    return item


def _copy_attributes(source: h5py.HLObject, target: h5py.HLObject) -> None:
    for name in source.attrs:
        attribute = source.attrs.get_id(name)
        target.attrs.create(name, source.attrs[name], dtype=attribute.dtype)


def _is_plain(dataset: h5d.DatasetID) -> bool:
    creation = dataset.get_create_plist()
    return creation.get_layout() != h5d.VIRTUAL and not creation.get_external_count()


def _is_self_contained(dataset: h5d.DatasetID) -> bool:
    creation = dataset.get_create_plist()
    if creation.get_layout() != h5d.VIRTUAL:
        return not creation.get_external_count()
    return all(creation.get_virtual_filename(i) == "." for i in range(creation.get_virtual_count()))


def _check_mapping(
    over: str,
    dataset: h5d.DatasetID,
    source: h5d.DatasetID,
    filled: h5s.SpaceID,
    taken: h5s.SpaceID,
) -> int:
    """How many values a source gives to a virtual dataset, after checking that it holds them."""
    if source.dtype != dataset.dtype:
        raise UserError(f"{over}, which holds {source.dtype} instead of {dataset.dtype}; {_ADVICE}")
    count = int(filled.get_select_npoints())
    if taken.get_select_type() in (h5s.SEL_ALL, h5s.SEL_NONE):
        fits = prod(source.shape) == count
    else:
        last = taken.get_select_bounds()[1]
        fits = len(last) == source.rank and all(
            end < size for end, size in zip(last, source.shape, strict=True)
        )
    if not fits:
        raise UserError(f"{over}, whose shape {source.shape} does not fit; {_ADVICE}")
    return count


def _find(own: str, name: str, prefixes: str) -> str | None:
    """The file that HDF5 takes for a source called `name` in the file `own`: the first
    HDF5 file of those it tries.
    """
    folders = [folder for folder in os.environ.get(prefixes, "").split(":") if folder]
    folders += [os.path.dirname(os.path.abspath(own)), "", os.path.dirname(os.path.realpath(own))]
    within = os.path.basename(name) if os.path.isabs(name) else name
    candidates = [name] if os.path.isabs(name) else []
    candidates += [os.path.join(folder, within) for folder in folders]
    for path in candidates:
        if os.path.isfile(path) and h5py.is_hdf5(path):
            return os.path.abspath(path)
    return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _text(name: bytes | str) -> str:
    return name if isinstance(name, str) else os.fsdecode(name)
