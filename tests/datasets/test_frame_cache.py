from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from demo_files import CAMERAS, ENV_ARGS, demo, write

from fibopolicy.datasets import DemoFile, DemoWriter, FrameCache
from fibopolicy.datasets.cache import Buffers
from fibopolicy.errors import UserError


def build(path: Path, demos: tuple[str, ...] | None = None, **options: int) -> FrameCache:
    with DemoFile(path) as file:
        return FrameCache(file, demos or file.demos, CAMERAS, path.parent / "cache", **options)


def folders(path: Path) -> list[str]:
    return sorted(item.name for item in (path.parent / "cache").iterdir() if item.is_dir())


def expected(*seeds_and_steps: tuple[int, int], camera: str = "wrist_image") -> np.ndarray:
    return np.concatenate([demo(steps, seed)["obs"][camera] for seed, steps in seeds_and_steps])


def test_frames_are_those_of_the_demos_in_a_row(path: Path) -> None:
    cache = build(path)
    indices = np.array([[14, 0], [5, 5], [8, 7]])
    for camera in CAMERAS:
        np.testing.assert_array_equal(
            cache.gather(camera, indices), expected((0, 5), (1, 3), (2, 7), camera=camera)[indices]
        )


def test_a_finished_cache_is_used_again(path: Path) -> None:
    first = build(path)
    written = {item: item.stat().st_mtime_ns for item in first.path.iterdir()}
    assert {item: item.stat().st_mtime_ns for item in build(path).path.iterdir()} == written


def test_other_demos_have_their_own_cache(path: Path) -> None:
    assert build(path).path != build(path, ("demo_2",)).path
    np.testing.assert_array_equal(
        build(path, ("demo_2",)).gather("wrist_image", np.array([[0]]))[0], expected((2, 7))[:1]
    )


def test_caches_of_demos_with_frames_in_different_files_live_side_by_side(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("demo_0", "demo_1"):
            with h5py.File(path.with_name(f"{name}.hdf5"), "w") as other:
                file.copy(f"data/{name}", other, "demo")
            del file[f"data/{name}"]
            file[f"data/{name}"] = h5py.ExternalLink(f"{name}.hdf5", "demo")
    first, second = build(path, ("demo_0",)).path, build(path, ("demo_1",)).path
    assert folders(path) == sorted([first.name, second.name])
    os.utime(path.with_name("demo_0.hdf5"), ns=(0, 0))
    third = build(path, ("demo_0",)).path
    assert folders(path) == sorted([second.name, third.name])


def test_a_changed_file_is_cached_again_and_its_old_cache_removed(path: Path) -> None:
    before = build(path).path
    with DemoWriter(path, ENV_ARGS, overwrite=True) as writer:
        writer.add(**demo(4, 9))
    after = build(path)
    np.testing.assert_array_equal(
        after.gather("wrist_image", np.array([[0, 3]]))[0], expected((9, 4))[[0, 3]]
    )
    assert not before.exists()
    assert folders(path) == [after.path.name]


@pytest.mark.parametrize("missing", ["meta.json", "camera_1.uint8", "half of camera_0.uint8"])
def test_a_half_built_cache_is_built_again(path: Path, missing: str) -> None:
    folder = build(path).path
    if missing.startswith("half of "):
        os.truncate(folder / "camera_0.uint8", 100)
    else:
        (folder / missing).unlink()
    killed = folder.with_name(f"{folder.name}.partial")
    killed.mkdir()
    (killed / "camera_0.uint8").write_bytes(b"half")
    cache = build(path)
    np.testing.assert_array_equal(
        cache.gather("wrist_image", np.arange(15)[None])[0], expected((0, 5), (1, 3), (2, 7))
    )
    assert folders(path) == [folder.name]


def test_processes_that_build_at_once_share_one_complete_cache(path: Path) -> None:
    script = (
        "import sys, numpy as np\n"
        "from fibopolicy.datasets import DemoFile, FrameCache\n"
        "with DemoFile(sys.argv[1]) as file:\n"
        "    cache = FrameCache(file, file.demos, file.image_keys, sys.argv[2])\n"
        "print(int(cache.gather('wrist_image', np.arange(15)[None]).astype(np.int64).sum()))\n"
    )
    command = [sys.executable, "-c", script, str(path), str(path.parent / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=1000)[0].strip() for process in started}
    assert sums == {str(int(expected((0, 5), (1, 3), (2, 7)).astype(np.int64).sum()))}
    assert len(folders(path)) == 1


def test_a_full_disk_is_a_one_line_error_and_leaves_no_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        build(path)
    assert folders(path) == []


def test_a_lack_of_disk_space_is_reported_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=4000))
    with pytest.raises(
        UserError, match=r"cache of frames needs 0\.0 GB, 0\.0 GB are free; .* XDG_CACHE_HOME"
    ):
        build(path)
    assert folders(path) == []


def in_a_process(path: Path, prelude: str) -> subprocess.CompletedProcess[str]:
    """Builds the cache of a file in a separate process, after some lines of Python."""
    script = (
        "import os, resource, signal, sys\n"
        "from fibopolicy.datasets import DemoFile, FrameCache, cache\n"
        f"{prelude}\n"
        "with DemoFile(sys.argv[1]) as file:\n"
        "    FrameCache(file, file.demos, file.image_keys, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(path), str(path.parent / "cache")]
    return subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)


def test_a_write_that_fails_amid_the_frames_leaves_no_files(path: Path) -> None:
    ended = in_a_process(path, "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))")
    assert "UserError" in ended.stderr
    assert "cannot be written: File too large" in ended.stderr
    assert folders(path) == []


def test_a_killed_builder_leaves_no_cache_that_looks_finished(path: Path) -> None:
    ended = in_a_process(
        path,
        "blocks = cache._blocks\n"
        "def killed(*arguments):\n"
        "    yield next(blocks(*arguments))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache._blocks = killed",
    )
    assert ended.returncode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in folders(path)] == [True]
    cache = build(path)  # does not wait for the lock of the dead
    np.testing.assert_array_equal(
        cache.gather("wrist_image", np.arange(15)[None])[0], expected((0, 5), (1, 3), (2, 7))
    )
    assert folders(path) == [cache.path.name]


def test_a_cache_of_other_settings_is_not_used(path: Path) -> None:
    """Neither cameras in another order, which look alike in size, nor another cache
    under this one's name.
    """
    folder = build(path).path
    with DemoFile(path) as file:
        turned = FrameCache(file, file.demos, CAMERAS[::-1], path.parent / "cache")
    assert turned.path != folder
    frames = [cache.gather("wrist_image", np.array([[3]])) for cache in (build(path), turned)]
    np.testing.assert_array_equal(*frames)
    shutil.rmtree(folder)
    turned.path.rename(folder)
    cache = build(path)
    for camera in CAMERAS:
        frames_of = expected((0, 5), (1, 3), (2, 7), camera=camera)
        np.testing.assert_array_equal(cache.gather(camera, np.arange(15)[None])[0], frames_of)


def test_later_batches_do_not_change_returned_frames(path: Path) -> None:
    """Their memory is used again, but not before the caller, a view and a tensor have
    let go of it.
    """
    cache = build(path)
    every = expected((0, 5), (1, 3), (2, 7))
    held = cache.gather("wrist_image", np.array([[0, 1]]))
    view = cache.gather("wrist_image", np.array([[2, 3]]))[0][1:]
    tensor = torch.from_numpy(cache.gather("wrist_image", np.array([[4, 5]])))[:, 0]
    for i in range(12):
        cache.gather("wrist_image", np.array([[i, i + 1]]))
    np.testing.assert_array_equal(held[0], every[:2])
    np.testing.assert_array_equal(view[0], every[3])
    np.testing.assert_array_equal(tensor[0].numpy(), every[4])
    address = held.ctypes.data
    del held
    assert cache.gather("wrist_image", np.array([[6, 7]])).ctypes.data == address


def test_batches_of_changing_sizes_do_not_accumulate_memory() -> None:
    buffers = Buffers()
    for size in range(1, 200):
        buffers.array((size, 3))
    assert len(buffers._free) <= 4
    assert buffers.array((5, 3)).shape == (5, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_within_the_budget_however_much_is_read(tmp_path: Path) -> None:
    """Of a cache of 96 MB under a budget of 16 MB; untouched by the advice to the
    system, all 96 MB would be resident.
    """
    script = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom fibopolicy.datasets import"
        " DemoFile, FrameCache\ndef mapped(): return"
        " int(Path('/proc/self/statm').read_text().split()[2]) * 4096\nwith DemoFile(sys.argv[1])"
        " as file:\n    cache = FrameCache(file, file.demos, file.image_keys, sys.argv[2],"
        " resident_bytes=int(sys.argv[3]))\nstart, most = mapped(), 0\nfor row in"
        " np.random.default_rng(0).integers(0, cache.num_frames - 4, (400, 2, 1)):\n   "
        " cache.gather('image', row + np.arange(4))\n    most = max(most, mapped() -"
        " start)\nprint(most)\n"
    )
    path = tmp_path / "large.hdf5"
    steps = 4000
    frames = np.zeros((steps, 128, 64, 3), np.uint8)
    with DemoWriter(path, ENV_ARGS) as writer:
        writer.add(
            {"image": frames},
            np.zeros((steps, 4)),
            np.zeros((steps, 1)),
            np.zeros(steps),
            np.zeros(steps),
        )

    def most(budget: int) -> int:
        command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache"), str(budget)]
        return int(
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=1000).stdout
        )

    assert most(2**30) > 60 * 2**20
    assert most(16 * 2**20) < 32 * 2**20


def test_a_cache_in_the_home_folder_respects_xdg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with DemoFile(write(tmp_path / "demos.hdf5")) as file:
        cache = FrameCache(file, file.demos, CAMERAS)
    assert cache.path.parent == tmp_path / "xdg" / "fibopolicy" / "frames"


def test_a_pickled_cache_maps_its_files_again_and_says_when_they_are_gone(path: Path) -> None:
    cache = build(path)
    content = pickle.dumps(cache)
    indices = np.array([[14, 0]])
    np.testing.assert_array_equal(
        pickle.loads(content).gather("wrist_image", indices), cache.gather("wrist_image", indices)
    )
    shutil.rmtree(cache.path)
    with pytest.raises(UserError, match="the cache of frames was removed"):
        pickle.loads(content)
