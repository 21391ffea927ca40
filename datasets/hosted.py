"""Demonstrations that their makers host, mostly on the Hugging Face Hub: downloaded,
verified, and labelled with their licence.

`huggingface_hub` finds and transfers the files, so its settings hold: `HF_ENDPOINT` for
a mirror, `HF_TOKEN`, `HF_HUB_OFFLINE`, and its cache, whose files are not
downloaded again.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h5py
from tqdm import tqdm

from fibopolicy.datasets.layout import DOWNLOAD_SHA256
from fibopolicy.errors import UserError, one_line, unknown
from fibopolicy.utils.files import (
    StrPath,
    atomic_write,
    cache_home,
    check_output,
    expanded,
    wrap_os_error,
)

_log = logging.getLogger(__name__)

#: Attributes of `data` in a downloaded file.
_SOURCE, _REVISION = "source", "source_revision"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Attempts without a new byte until a download is abandoned.
_ATTEMPTS = 3


@dataclass(frozen=True)
class HostedDataset:
    """One dataset that its makers host.

    Attributes:
        name: the argument of `download`, for example "robomimic/lift/ph".
        about: one line: the content.
        licence: its short name.
        non_commercial: whether the licence forbids commercial use.
        origin: who made the demonstrations, for example "human".
        repository: the dataset repository on the Hub; `None` if `files` are addresses.
        files: path in the repository by type, such as "low_dim"; the first type is the
            default, and a dataset of one file has the type "".
    """

    name: str
    about: str
    licence: str
    non_commercial: bool
    origin: str
    repository: str | None
    files: Mapping[str, str]

    def file(self, type: str | None) -> str:
        """The path of a type's file.

        Raises:
            UserError: there is no such type.
        """
        if type is None:
            return next(iter(self.files.values()))
        if type in self.files:
            return self.files[type]
        if "" in self.files:
            raise UserError(f"{self.name}: has a single file, leave out --type {type}")
        raise unknown(f"type of {self.name}", type, self.files)

    def default_path(self, type: str | None = None) -> Path:
        """The file that `download` writes by default."""
        type = next(iter(self.files)) if type is None else type
        name = self.name + (f"/{type}" if type else "")
        return cache_home() / "datasets" / f"{name.replace('/', '_')}.hdf5"

    def source(self, type: str | None) -> str:
        """Where the file is from, as in its attributes."""
        file = self.file(type)
        return f"{file} of {self.repository}" if self.repository else file


def read_hosted(entries: list[dict[str, Any]]) -> dict[str, HostedDataset]:
    """The datasets by name in the section `hosted` of `sources.json`. Each entry
    describes datasets whose addresses differ in name and type only.
    """
    found = {}
    for entry in entries:
        for name in entry["names"]:
            files = {
                type: entry["path"].format(name=name, type=type)
                for type in entry.get("types", [""])
            }
            full = f"{entry['prefix']}/{name}"
            found[full] = HostedDataset(
                full,
                entry["about"],
                entry["licence"],
                entry.get("non_commercial", False),
                entry["origin"],
                entry.get("repository"),
                files,
            )
    return found


def fetch_hosted(
    dataset: HostedDataset,
    out: StrPath | None = None,
    overwrite: bool = False,
    *,
    type: str | None = None,
    accept_licence: bool = False,
) -> Path:
    """Download a dataset, or resume its download. An existing download is kept.

    Args:
        out: the file to write; `None` means `HostedDataset.default_path`. A file that
            was brought there by other means is verified instead of downloaded.
        overwrite: replace an existing file of other content.
        type: which of the dataset's files; the first by default.
        accept_licence: whether the user agrees to a non-commercial licence.

    Raises:
        UserError: no such type, a licence that was not accepted, no connection, no
            space, another file at `out`, or a file other than the host announces.
    """
    source = dataset.source(type)
    if dataset.non_commercial and not accept_licence:
        raise UserError(
            f"{dataset.name}: its licence {dataset.licence} forbids commercial use; pass"
            " --accept-licence if you agree to it"
        )
    default = dataset.default_path(type)
    path = default if out is None else expanded(out)
    label = {_SOURCE: source, "licence": dataset.licence, "origin": dataset.origin}
    present = None if overwrite else _present(path, source)
    try:
        remote = _locate(dataset, dataset.file(type), default)
    except _Unreachable:
        if present is not None:
            return path
        if path == default and path.is_file() and h5py.is_hdf5(path) and not overwrite:
            _log.info("%s: not verified, its host cannot be reached", path)
            return _adopt(path, label)
        raise
    label |= {_REVISION: remote.revision} if remote.revision else {}
    if present is not None:
        if remote.sha256 not in (None, present):
            raise UserError(
                f"{path}: was downloaded with sha256 {present}, but {remote.url} has"
                f" {remote.sha256} now; pass --overwrite to replace it, or keep both with --out"
            )
        return path
    if path.is_file() and not overwrite and remote.sha256 == _sha256(path):
        return _adopt(path, label)
    check_output(path, overwrite)
    _log.info(
        "%s: %s, %s, licence %s", dataset.name, source, _megabytes(remote.size), dataset.licence
    )
    with atomic_write(path) as partial, wrap_os_error(path):
        sha256 = _transfer(dataset.name, remote, path, incomplete := _incomplete(path, remote))
        os.replace(incomplete, partial)
        _label(partial, label | {DOWNLOAD_SHA256: sha256})
    return path


# An existing file


def _present(path: Path, source: str) -> str | None:
    """The sha256 that a file was downloaded with; `None` if it is not a download of
    `source`.
    """
    try:
        with h5py.File(path, "r") as file:
            attrs = file.get("data", file).attrs
            return str(attrs[DOWNLOAD_SHA256]) if attrs.get(_SOURCE) == source else None
    except (OSError, KeyError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _adopt(path: Path, label: Mapping[str, Any]) -> Path:
    """Label a file that was not downloaded by this module."""
    with atomic_write(path) as partial, wrap_os_error(path):
        shutil.copyfile(path, partial)
        _label(partial, {**label, DOWNLOAD_SHA256: _sha256(path)})
    return path


def _label(path: Path, label: Mapping[str, Any]) -> None:
    with h5py.File(path, "r+", locking=False) as file:
        file.get("data", file).attrs.update(label)


# The host


class _Unreachable(UserError):
    """There is no connection to the host."""


@dataclass(frozen=True)
class _Remote:
    """A file at its host.

    Attributes:
        size: in bytes, `None` if the host does not say.
        etag: the host's name for this version of the file.
        revision: the commit of its repository.
        cached: its copy in the Hub's cache.
    """

    url: str
    size: int | None
    etag: str | None
    revision: str | None
    cached: Path | None

    @property
    def sha256(self) -> str | None:
        """The etag of a large file on the Hub; `None` for other files."""
        return self.etag if self.etag and re.fullmatch("[0-9a-f]{64}", self.etag) else None


def _locate(dataset: HostedDataset, file: str, default: Path) -> _Remote:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = dataset.repository
    url = hf_hub_url(repository, file, repo_type="dataset") if repository else file

    def cached(revision: str | None) -> Path | None:
        copy = repository and try_to_load_from_cache(
            repository, file, repo_type="dataset", revision=revision
        )
        return Path(copy) if isinstance(copy, str) else None

    try:
        found = get_hf_file_metadata(url, token=None if repository else False)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{dataset.name}: {url} does not exist, or you may not read it"
            f" ({type(error).__name__}); log in with `hf auth login` if it needs a token"
        ) from error
    except Exception as error:  # of the HTTP library, which depends on huggingface_hub's version
        if (copy := cached(None)) is not None:
            return _Remote(url, copy.stat().st_size, copy.resolve().name, None, copy)
        raise _Unreachable(
            f"{dataset.name}: {urlsplit(url).netloc} cannot be reached ({one_line(error)[:150]});"
            f" check the network, set HF_ENDPOINT to a mirror, or get {url} by other means,"
            f" save it as {default} and run this again"
        ) from error
    commit = found.commit_hash
    pinned = repository and hf_hub_url(repository, file, repo_type="dataset", revision=commit)
    return _Remote(pinned or url, found.size, found.etag, commit, cached(commit))


def _incomplete(path: Path, remote: _Remote) -> Path:
    """Where the bytes of this version of the file are kept until it is complete."""
    version = re.sub(r"\W", "", remote.etag or "")[:16] or "unknown"
    return path.with_name(f"{path.name}.{version}.incomplete")


def _transfer(name: str, remote: _Remote, path: Path, incomplete: Path) -> str:
    """Complete and verify the file `incomplete`; return its sha256."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.incomplete"):
        if other != incomplete:  # of another version of the file
            other.unlink()
    done = incomplete.stat().st_size if incomplete.exists() else 0
    needed, free = (remote.size or 0) - done, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path}: needs {_megabytes(needed)}, and its disk has {_megabytes(free)} free"
        )
    try:
        if remote.cached is not None:
            shutil.copyfile(remote.cached, incomplete)
        elif remote.size is None or done < remote.size:
            _get(name, remote, incomplete)
    except OSError as error:
        if error.errno in _DISK_FULL:
            incomplete.unlink(missing_ok=True)
        raise
    size, sha256 = incomplete.stat().st_size, _sha256(incomplete)
    for what, got, expected in (("size", size, remote.size), ("sha256", sha256, remote.sha256)):
        if expected is not None and got != expected:
            incomplete.unlink()
            raise UserError(
                f"{name}: {remote.url} came with {what} {got}, expected {expected}; the file was"
                " changed or corrupted in transit; try again or use another mirror"
            )
    if not h5py.is_hdf5(incomplete):
        incomplete.unlink()
        raise UserError(f"{name}: {remote.url} is not an HDF5 file ({_megabytes(size)})")
    return sha256


def _get(name: str, remote: _Remote, incomplete: Path) -> None:
    """Append the missing bytes to `incomplete`, reconnecting as long as some arrive."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=None if remote.revision else False, library_name="fibopolicy")
    headers["Accept-Encoding"] = "identity"
    failures = 0
    with (
        incomplete.open("ab") as file,
        tqdm(
            total=remote.size,
            initial=file.tell(),
            desc=name,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        while True:
            done = file.tell()
            try:
                with get_session().stream(
                    "GET",
                    remote.url,
                    headers=headers | ({"Range": f"bytes={done}-"} if done else {}),
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    follow_redirects=True,
                ) as answer:
                    hf_raise_for_status(answer)
                    if done and answer.status_code != 206:  # the server sends the whole file
                        file.seek(0)
                        file.truncate()
                        bar.reset()
                    for block in answer.iter_bytes():
                        bar.update(file.write(block))
                return
            except Exception as error:  # of the HTTP library
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise
                failures = 0 if file.tell() > done else failures + 1
                if failures == _ATTEMPTS:
                    raise UserError(
                        f"{name}: the connection to {urlsplit(remote.url).netloc} broke after"
                        f" {_megabytes(file.tell())} of {_megabytes(remote.size)}"
                        f" ({one_line(error)[:150]}); run this again to resume"
                    ) from error
                time.sleep(1)


def _megabytes(count: int | None) -> str:
    return "unknown size" if count is None else f"{count / 1e6:.1f} MB"
