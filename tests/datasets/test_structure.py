from __future__ import annotations

import re
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command import call

from fibopolicy.datasets import inspect, structure
from fibopolicy.errors import UserError


def test_a_valid_file_passes_and_is_not_checked_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure.check_structure(path)
    monkeypatch.setattr(structure.subprocess, "Popen", None)
    structure.check_structure(path)


def test_a_tree_that_is_its_own_child_is_rejected(path: Path) -> None:
    """The library follows the nodes of a group's B-tree without an end, until its stack
    overflows.
    """
    content = bytearray(path.read_bytes())
    node = list(re.finditer(b"TREE", bytes(content)))[1].start()  # that of the group data
    content[node + 5] = 1  # a level above the leaves
    content[node + 32 : node + 40] = struct.pack("<Q", node)  # its first child
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"is corrupt: the HDF5 library crashes on it \(SIGSEGV\); download or record",
    ) as caught:
        inspect(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("last", [False, True])
def test_an_endless_heap_is_rejected(
    path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Of two collections of strings, env_args and the demos' models: free space of no
    size, which the library walks for ever.
    """
    content = bytearray(path.read_bytes())
    place = list(re.finditer(b"GCOL", bytes(content)))[-1 if last else 0].start() + 16
    while (number := struct.unpack_from("<H", content, place)[0]) != 0:
        assert number < 100
        place += 16 + -(-struct.unpack_from("<Q", content, place + 8)[0] // 8) * 8
    content[place + 8 : place + 16] = bytes(8)
    path.write_bytes(content)
    monkeypatch.setattr(structure, "TIME_LIMIT", 1.0)
    with pytest.raises(
        UserError,
        match="is corrupt: the HDF5 library made no progress in 1 s; download or record it again",
    ):
        inspect(path)


def test_reading_without_progress_ends_with_an_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    script = tmp_path / "endless.py"
    script.write_text("import time\ntime.sleep(1000)")
    monkeypatch.setattr(structure, "__file__", str(script))
    monkeypatch.setattr(structure, "TIME_LIMIT", 1.0)
    monkeypatch.setattr(structure.subprocess, "Popen", Kept)
    with pytest.raises(UserError, match="is corrupt: the HDF5 library made no progress in 1 s"):
        inspect(path)
    assert [child.returncode for child in children] == [-signal.SIGKILL]


def test_a_file_that_is_not_hdf5_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_text("no data")
    structure.check_structure(tmp_path / "text.hdf5")
    structure.check_structure(tmp_path / "absent.hdf5")


def test_training_and_inspection_end_with_code_2_on_a_corrupt_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(path.read_bytes())
    node = list(re.finditer(b"TREE", bytes(content)))[1].start()
    content[node + 5] = 1
    content[node + 32 : node + 40] = struct.pack("<Q", node)
    path.write_bytes(content)
    for arguments in (
        ["inspect", str(path)],
        ["train", "--dataset", str(path), "--out", str(tmp_path / "run")],
    ):
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"{path}: is corrupt: the HDF5 library crashes on it" in err
    assert not (tmp_path / "run").exists()
