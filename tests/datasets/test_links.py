"""Files whose arrays are stored in other files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from demo_files import CAMERAS, ENV_ARGS, VECTORS, demo, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fibopolicy.datasets import DemoFile, DemoWriter, WindowDataset, split, validate
from fibopolicy.datasets.links import copy_whole, read_array
from fibopolicy.datasets.render import View, _plan
from fibopolicy.errors import UserError

Put = Callable[[h5py.Group, str, Path, str], None]


def virtual(group: h5py.Group, key: str, source: Path, path: str) -> None:
    with h5py.File(source) as file:
        shape, dtype = file[path].shape, file[path].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(source.name, path, shape, dtype)
    group.create_virtual_dataset(key, layout)


def external(group: h5py.Group, key: str, source: Path, path: str) -> None:
    group[key] = h5py.ExternalLink(source.name, path)


def link(
    path: Path,
    source: Path,
    put: Put,
    key: str = "obs/wrist_image",
    demos: tuple[str, ...] = ("demo_1",),
) -> Path:
    """Replace an array of some demos by a reference to another file."""
    with h5py.File(path, "r+") as file:
        for name in demos:
            del file[f"data/{name}/{key}"]
            put(file[f"data/{name}"], key, source, f"/data/{name}/{key}")
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return write(tmp_path / "recording.hdf5")


def read(path: Path) -> np.ndarray:
    with DemoFile(path) as file:
        validate(file, CAMERAS, VECTORS)
        return file.read("demo_1", "obs/wrist_image")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize("put", [virtual, external])
def test_arrays_of_another_file_are_read(path: Path, recording: Path, put: Put) -> None:
    link(path, recording, put)
    np.testing.assert_array_equal(read(path), demo(3, 1)["obs"]["wrist_image"])


@pytest.mark.parametrize("put", [virtual, external])
def test_a_renamed_recording_is_named_and_not_read_as_zeros(
    path: Path, recording: Path, put: Put
) -> None:
    link(path, recording, put)
    recording.rename(recording.with_name("other.hdf5"))
    message = refusal(path)
    assert "demo_1/obs/wrist_image" in message
    assert "'/data/demo_1/obs/wrist_image' of recording.hdf5, a file that does not exist" in message


@pytest.mark.parametrize("put", [virtual, external])
def test_a_recording_without_the_array_is_named(path: Path, recording: Path, put: Put) -> None:
    link(path, recording, put)
    with h5py.File(recording, "r+") as file:
        del file["data/demo_1/obs/wrist_image"]
    message = refusal(path)
    assert "recording.hdf5" in message
    assert "does not exist" in message


@pytest.mark.parametrize("put", [virtual, external])
@pytest.mark.parametrize("key", ["actions", "obs/wrist_image", "states"])
def test_links_of_the_first_demo_and_of_every_array_are_checked(
    path: Path, recording: Path, put: Put, key: str
) -> None:
    link(path, recording, put, key, ("demo_0",))
    recording.unlink()
    assert f"demo_0/{key}" in refusal(path)


def test_a_dangling_link_of_a_demo_or_group_is_named(path: Path, recording: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"], file["data/demo_0/obs"]
        file["data/demo_1"] = h5py.ExternalLink("gone.hdf5", "/data/demo_1")
    assert "'/data/demo_1' of gone.hdf5, a file that does not exist" in refusal(path)
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"]
        file["data/demo_0/obs"] = h5py.SoftLink("/nowhere")
    assert "links to" in refusal(path)


@pytest.mark.parametrize("kind", ["external", "soft"])
def test_a_linked_demo_may_lack_arrays_that_are_optional(
    path: Path, recording: Path, kind: str
) -> None:
    with h5py.File(path, "r+") as file, h5py.File(recording, "r+") as other:
        holder = other if kind == "external" else file
        holder.move("data/demo_1", "episode")
        del holder["episode/states"]
        file.pop("data/demo_1", None)
        file["data/demo_1"] = {
            "external": h5py.ExternalLink(recording.name, "episode"),
            "soft": h5py.SoftLink("/episode"),
        }[kind]
    with DemoFile(path) as file:
        assert not file.has("demo_1", "states")
        assert file.has("demo_1", "rewards")


@pytest.mark.parametrize(
    "change", [np.zeros((2, 8, 6, 3), np.uint8), np.zeros((3, 8, 6, 3), np.float32)]
)
def test_a_source_of_another_length_or_type_is_rejected(
    path: Path, recording: Path, change: np.ndarray
) -> None:
    link(path, recording, virtual)
    with h5py.File(recording, "r+") as file:
        del file["data/demo_1/obs/wrist_image"]
        file["data/demo_1/obs/wrist_image"] = change
    assert "recording.hdf5" in refusal(path)


def test_raw_storage_is_rejected(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/actions"]
        storage = [(str(path.with_suffix(".raw")), 0, 96)]
        file["data/demo_1"].create_dataset("actions", (3, 4), float, external=storage)[:] = 0
    assert "demo_1/actions has its values in raw files; copy it" in refusal(path)


def test_rows_without_a_source_numbered_sources_and_cycles_are_rejected(
    path: Path, recording: Path
) -> None:
    def put(source: h5py.VirtualSource, rows: int) -> Path:
        with h5py.File(path, "r+") as file:
            del file["data/demo_1/obs/wrist_image"]
            layout = h5py.VirtualLayout((3, 8, 6, 3), np.uint8)
            layout[:rows] = source[:rows]
            file["data/demo_1/obs"].create_virtual_dataset("wrist_image", layout)
        return path

    key = "data/demo_1/obs/wrist_image"
    whole = {"shape": (3, 8, 6, 3), "dtype": np.uint8}
    assert "hold 288 of its 432 values" in refusal(
        put(h5py.VirtualSource(recording.name, key, **whole), 2)
    )
    with h5py.File(path, "r+") as file:
        del file[key]
        rows = h5py.h5s.create_simple((3, 8, 6, 3), (h5py.h5s.UNLIMITED, 8, 6, 3))
        rows.select_hyperslab((0, 0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1, 1), block=(1, 8, 6, 3))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_virtual(rows, b"part_%b.hdf5", b"image", h5py.h5s.create_simple((1, 8, 6, 3)))
        h5py.h5d.create(file.id, key.encode(), h5py.h5t.NATIVE_UINT8, rows, creation)
    assert "numbered names are not supported" in refusal(path)
    assert "virtual dataset over itself" in refusal(put(h5py.VirtualSource(".", key, **whole), 3))
    with h5py.File(path, "r+") as file:
        del file[key]
        file[key] = h5py.SoftLink(f"/{key}")
    assert "too many links" in refusal(path)


def test_a_chain_is_followed_to_its_end(path: Path, recording: Path) -> None:
    between = write(path.parent / "between.hdf5")
    link(between, recording, virtual)
    link(path, between, external)
    np.testing.assert_array_equal(read(path), demo(3, 1)["obs"]["wrist_image"])
    with DemoFile(path) as file:
        linked = file.identity(["demo_1"], ["obs/wrist_image"])["linked"]
    assert [Path(item["path"]).name for item in linked] == ["between.hdf5", "recording.hdf5"]
    recording.unlink()
    message = refusal(path)
    assert "recording.hdf5, a file that does not exist" in message


@pytest.mark.parametrize("put", [virtual, external])
def test_split_writes_a_self_contained_file(
    path: Path, recording: Path, tmp_path: Path, put: Put
) -> None:
    link(path, recording, put)
    out = tmp_path / "elsewhere" / "out.hdf5"
    split(path, out)
    for item in tmp_path.iterdir():
        if item.is_file():
            item.unlink()
    np.testing.assert_array_equal(read(out), demo(3, 1)["obs"]["wrist_image"])
    with DemoFile(out) as file:
        assert file.attrs("demo_1")["model_file"] == "<mujoco/>"
        assert file.env_args == ENV_ARGS
        np.testing.assert_array_equal(
            file.read("demo_1", "next_obs/agentview_image"),
            demo(3, 1)["next_obs"]["agentview_image"],
        )


@pytest.mark.parametrize("put", [virtual, external])
def test_split_rejects_a_file_whose_recording_is_missing(
    path: Path, recording: Path, tmp_path: Path, put: Put
) -> None:
    link(path, recording, put)
    recording.unlink()
    with pytest.raises(UserError, match=r"recording\.hdf5, a file that does not exist"):
        split(path, tmp_path / "out.hdf5")
    assert not (tmp_path / "out.hdf5").exists()


def test_a_copy_of_a_group_holds_the_data_of_its_links(path: Path, recording: Path) -> None:
    link(path, recording, virtual)
    link(path, recording, external, "obs/eef_pos")
    with h5py.File(path) as source, h5py.File(path.with_name("copy.hdf5"), "w") as target:
        copy_whole(source["data/demo_1"], target, "obs")
    recording.unlink()
    with h5py.File(path.with_name("copy.hdf5")) as file:
        for key in ("wrist_image", "eef_pos"):
            np.testing.assert_array_equal(file["obs"][key], demo(3, 1)["obs"][key])


def test_a_converted_recording_is_checked_too(path: Path, recording: Path) -> None:
    link(path, recording, virtual, "actions")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(
            read_array(file["data/demo_1"], "actions"), demo(3, 1)["actions"]
        )
        recording.unlink()
        with pytest.raises(
            UserError, match=r"data/demo_1/actions is a virtual dataset .* does not exist"
        ):
            read_array(file["data/demo_1"], "actions")


@pytest.mark.parametrize("put", [virtual, external])
def test_frames_of_an_overwritten_recording_are_cached_again(
    path: Path, recording: Path, put: Put
) -> None:
    link(path, recording, put)

    def frames() -> tuple[Path, np.ndarray]:
        dataset = WindowDataset(
            path, cameras=CAMERAS, vectors=VECTORS, horizon=1, cache_dir=path.parent / "cache"
        )
        return dataset._frames.path, dataset.batch(np.arange(5, 8))["obs"]["wrist_image"][:, 0]

    before, _ = frames()
    new = demo(3, 7)["obs"]["wrist_image"]
    with h5py.File(recording, "r+") as file:
        file["data/demo_1/obs/wrist_image"][:] = new
    after, seen = frames()
    np.testing.assert_array_equal(seen, new)
    assert before != after
    assert not before.exists()


def test_shards_of_a_rendering_name_the_recording(path: Path, recording: Path) -> None:
    link(path, recording, external, "states")
    with DemoFile(path) as file:
        before = _plan(file, file.demos, View())
    os.utime(recording, ns=(1, 1))
    with DemoFile(path) as file:
        assert _plan(file, file.demos, View()) != before


def test_arrays_that_are_not_read_may_be_of_any_length(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for group in file["data"].values():
            group["src_demo_inds"] = [3, 1]
            group["instruction"] = "lift the cube"
            group["intrinsics"] = np.eye(3)
    read(path)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_file_that_is_being_written_is_reported_as_such(path: Path, interrupted: bool) -> None:
    end = "os._exit(0)" if interrupted else "print(flush=True); input()"
    code = (
        f"import h5py, os; f = h5py.File({str(path)!r}, 'w', libver='latest'); f['x'] = 1;"
        f" f.flush(); {end}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            with pytest.raises(
                UserError, match=r"process has the file open for writing.*wait"
            ) as caught:
                DemoFile(path)
        finally:
            writer.communicate(b"\n")
    assert ("interrupted" in str(caught.value)) == interrupted


def read_split(path: Path, out: Path) -> None:
    """References within a file are copied unchanged, and then the copy must be rejected."""
    split(path, out, valid_fraction=0)
    with DemoFile(out) as file:
        validate(file, CAMERAS, VECTORS)


# One array under a random structure of links

_STEPS = st.lists(
    st.tuples(st.sampled_from(["external", "soft", "virtual", "virtual here"]), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(steps=_STEPS, key=st.sampled_from(["obs/eef_pos", "actions", "obs/wrist_image"]))
def test_a_random_chain_of_links_gives_the_data_or_an_error(
    steps: list[tuple[str, bool]], key: str
) -> None:
    """Each step is a kind of reference, and whether what it leads to is missing."""
    values = demo(4, 5)
    wanted = np.asarray(
        values["obs"][key.removeprefix("obs/")] if key.startswith("obs/") else values[key]
    )
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "top.hdf5"
        with DemoWriter(top, ENV_ARGS) as writer:
            writer.add(**values)
        place, file = f"data/demo_0/{key}", h5py.File(top, "r+")
        del file[place]
        missing = False
        for number, (kind, lost) in enumerate(steps):
            missing = missing or lost
            target, other = f"target_{number}", file
            if kind in ("external", "virtual"):
                name = f"part_{number}.hdf5"
                other = h5py.File(Path(folder) / (f"lost_{number}.hdf5" if lost else name), "w")
            else:
                name = "."
            if kind == "external":
                file[place] = h5py.ExternalLink(name, f"/{target}")
            elif kind == "soft":
                file[place] = h5py.SoftLink(f"/{target}")
            else:
                layout = h5py.VirtualLayout(wanted.shape, wanted.dtype)
                layout[:] = h5py.VirtualSource(name, target, wanted.shape, wanted.dtype)
                file.create_virtual_dataset(place, layout)
            if other is not file:
                file.close()
            file, place = other, f"lost_{number}" if lost else target
        file[place] = wanted
        file.close()
        out = Path(folder) / "elsewhere" / "out.hdf5"
        if missing:
            with pytest.raises(UserError, match=r"\A[^\n]*\Z"), DemoFile(top) as opened:
                validate(opened, CAMERAS, VECTORS)
            with pytest.raises(UserError, match=r"\A[^\n]*\Z"):
                read_split(top, out)
            return
        split(top, out, valid_fraction=0)
        for path in (top, out):
            with DemoFile(path) as opened:
                validate(opened, CAMERAS, VECTORS)
                np.testing.assert_array_equal(opened.read("demo_0", key), wanted)
