"""The cache folder with and without a home, and locks."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fibopolicy.errors import UserError
from fibopolicy.utils import files, processes


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run as an unknown user without HOME; return the folder for temporary files."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (*files._LIBRARY_CACHES, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_caches_go_to_a_private_temporary_folder(homeless: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"the home folder is not writable: caches go to .*; set XDG_CACHE_HOME"
    ):
        folder = files.cache_home()
    assert folder == homeless / f"fibopolicy-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_unwritable_home_counts_as_missing(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = homeless / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    assert files.cache_home() == home / ".cache" / "fibopolicy"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.warns(UserWarning, match="the home folder is not writable"):
        assert files.cache_home().parent == homeless


def test_a_temporary_folder_of_another_user_is_rejected(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (homeless / "fibopolicy-4242").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    if (homeless / "fibopolicy-4242").stat().st_uid == 4242:
        pytest.skip("this user has that id")
    with pytest.raises(UserError, match=r"belongs to another user.*set XDG_CACHE_HOME"):
        files.cache_home()


def test_without_a_home_other_libraries_get_cache_folders_too(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    processes.set_up()
    folder = homeless / f"fibopolicy-{os.getuid()}"
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder / "numba_cache_dir")
    assert os.environ["MPLCONFIGDIR"].startswith(str(folder))
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_with_a_home_other_libraries_keep_their_cache_folders(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: homeless)
    processes.set_up()
    assert not {*files._LIBRARY_CACHES} & {*os.environ}


def test_a_lock_names_its_holder_to_a_second_process(tmp_path: Path) -> None:
    with files.directory_lock(tmp_path / "run", "run.lock", activity="training"):
        assert files.is_locked(tmp_path / "run" / "run.lock")
        with (
            pytest.raises(files.Locked, match=rf"process {os.getpid()} on .* is training; wait"),
            files.directory_lock(tmp_path / "run", "run.lock", max_wait=0.2, activity="training"),
        ):
            pass
    assert not files.is_locked(tmp_path / "run" / "run.lock")
    assert not files.is_locked(tmp_path / "absent.lock")


def test_the_lock_of_another_user_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, flags: int, *_: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError
        return real(path, flags)

    real = os.open
    with files.directory_lock(tmp_path, "run.lock"):
        monkeypatch.setattr(os, "open", read_only)
        assert files.is_locked(tmp_path / "run.lock")
    assert not files.is_locked(tmp_path / "run.lock")


def test_a_second_process_waits_for_a_lock(tmp_path: Path) -> None:
    entered = threading.Event()
    order: list[str] = []

    def hold() -> None:
        with files.directory_lock(tmp_path):
            entered.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with files.directory_lock(tmp_path, max_wait=10):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
