"""What is stored in other shapes and dtypes is read as frames and vectors, or refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from demo_files import CAMERAS, VECTORS, write
from numpy.typing import NDArray
from PIL import Image

from fibopolicy.datasets import DemoFile, FrameCache, WindowDataset, inspect
from fibopolicy.datasets.conversions import resize_larger
from fibopolicy.datasets.layout import parse_map
from fibopolicy.errors import UserError

Edited = Callable[[Callable[[h5py.File], object]], Path]
Frames = NDArray[np.uint8]


def changed(convert: Callable[[Frames], Any], key: str = "obs/wrist_image") -> Callable[..., None]:
    """Replaces an array of each demo by what `convert` makes of it."""

    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            value = convert(demo[key][()])
            del demo["next_obs"], demo[key]
            if isinstance(value, list):
                demo.create_dataset(key, (len(value),), dtype=h5py.vlen_dtype(np.uint8))
                for i, row in enumerate(value):
                    demo[key][i] = np.frombuffer(row, np.uint8)
            else:
                demo.create_dataset(key, data=value, chunks=True, compression="gzip")

    return edit


def encoded(frames: Frames, kind: str, mode: str = "RGB") -> list[bytes]:
    files = [io.BytesIO() for _ in frames]
    for frame, file in zip(frames, files, strict=True):
        Image.fromarray(frame).convert(mode).save(file, kind)
    return [file.getvalue() for file in files]


def padded(rows: list[bytes]) -> Frames:
    longest = max(map(len, rows))
    return np.stack([np.frombuffer(row.ljust(longest, b"\0"), np.uint8) for row in rows])


def with_alpha(frames: Frames) -> Frames:
    return np.concatenate([frames, np.full_like(frames[..., :1], 255)], axis=-1)


def demo_0(path: Path, key: str, **options: Any) -> NDArray[Any]:
    with DemoFile(path, **options) as file:
        return file.read("demo_0", f"obs/{key}")


@pytest.mark.parametrize(
    ("convert", "description"),
    [
        (lambda frames: frames, ""),
        (lambda frames: frames / 255, "float64 0 to 1"),
        (lambda frames: (frames / 127.5 - 1).astype(np.float32), "float32 -1 to 1"),
        (lambda frames: frames.astype(np.float16), "float16 0 to 255"),
        (lambda frames: frames.astype(np.int64), "int64 0 to 255"),
        (lambda frames: frames.transpose(0, 3, 1, 2), "channels first"),
        (with_alpha, "alpha dropped"),
        (
            lambda frames: with_alpha(frames).transpose(0, 3, 1, 2) / 255,
            "channels first, alpha dropped, float64 0 to 1",
        ),
        (lambda frames: frames[:, None], "an axis of length 1 dropped"),
        (lambda frames: encoded(frames, "png"), "PNG decoded"),
        (lambda frames: padded(encoded(frames, "png", "RGBA")), "PNG decoded"),
        (lambda frames: np.array(encoded(frames, "png")), "PNG decoded"),
    ],
)
def test_frames_are_read_exactly_as_uint8_channels_last(
    edited: Edited, tmp_path: Path, convert: Callable[[Frames], Any], description: str
) -> None:
    path = edited(changed(convert))
    expected = demo_0(write(tmp_path / "plain.hdf5"), "wrist_image")
    with DemoFile(path) as file:
        assert file.image_keys == CAMERAS
        assert file.converted.get("wrist_image", "") == description
        np.testing.assert_array_equal(file.read("demo_0", "obs/wrist_image"), expected)
        np.testing.assert_array_equal(file.read("demo_0", "obs/wrist_image", 2, 4), expected[2:4])
        cache = FrameCache(file, file.demos, CAMERAS, tmp_path)
    np.testing.assert_array_equal(cache.gather("wrist_image", np.arange(5)[None])[0], expected)
    assert f"camera, converted: {description}" in inspect(path) or not description


def test_jpeg_bytes_are_decoded(edited: Edited) -> None:
    smooth = np.indices((8, 6)).sum(0)[..., None].repeat(3, -1) * 15
    path = edited(changed(lambda frames: padded(encoded(np.uint8([smooth] * len(frames)), "jpeg"))))
    assert np.abs(demo_0(path, "wrist_image") - smooth.astype(int)).max() < 12


@pytest.mark.parametrize(
    "convert",
    [
        lambda frames: frames[..., :1],
        lambda frames: frames[..., 0],
        lambda frames: encoded(frames[..., 0], "png", "L"),
    ],
)
def test_frames_of_one_channel_are_read_as_grey_only_if_they_are_named(
    edited: Edited, tmp_path: Path, convert: Callable[[Frames], Any]
) -> None:
    path = edited(changed(convert))
    assert "one channel; --cameras wrist_image reads it as grey" in inspect(path)
    with DemoFile(path) as file:
        assert file.image_keys == ("agentview_image",)
        dataset = WindowDataset(
            file, cameras=("wrist_image",), vectors=(), horizon=1, cache_dir=tmp_path
        )
    frames = dataset.batch(np.arange(5))["obs"]["wrist_image"]
    assert frames.shape == (5, 1, 8, 6, 3)
    assert (frames[..., :1] == frames).all()


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (
            lambda frames: (frames / 255 - 0.45) / 0.22,
            "float64 (N, 8, 6, 3): values from -2.0",
        ),
        (lambda frames: frames * np.nan, "float64 (N, 8, 6, 3): values from nan to nan; frames"),
        (lambda frames: np.full((len(frames), 4, 4), 0.5), "float64 (N, 4, 4): neither frames"),
        (lambda frames: np.zeros((len(frames), 0)), "float64 (N, 0): holds no values"),
        (lambda frames: [b"text"] * len(frames), "object (N): neither numbers nor JPEG or PNG"),
        (
            lambda frames: encoded(frames.astype(np.int32)[..., 0], "png", "I;16"),
            "object (N): PNG of mode I;16, not 8-bit colour",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(
    edited: Edited, convert: Callable[[Frames], Any], reason: str
) -> None:
    path = edited(changed(convert))
    with DemoFile(path) as file:
        assert list(file.unreadable) == ["wrist_image"]
        assert file.unreadable["wrist_image"].startswith(reason)
    assert f"not read: {reason.partition(': ')[2]}" in inspect(path)


def put(key: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file[f"data/demo_2/{key}"][4] = value

    return edit


@pytest.mark.parametrize(
    ("convert", "value", "message"),
    [
        (lambda frames: frames / 255, 254, "holds 254, where the first frames hold 0 to 1"),
        (lambda frames: frames / 255, np.nan, "holds nan, where"),
        (lambda f: encoded(f, "png"), np.uint8([1, 2]), "cannot be decoded"),
        (
            lambda f: encoded(f, "png"),
            np.frombuffer(encoded(np.zeros((1, 7, 7, 3), np.uint8), "png")[0], np.uint8),
            "is 7 x 7, the first 8 x 6",
        ),
    ],
)
def test_a_later_frame_that_does_not_fit_is_named_by_demo_and_step(
    edited: Edited, tmp_path: Path, convert: Callable[[Frames], Any], value: Any, message: str
) -> None:
    edited(changed(convert))
    path = edited(put("obs/wrist_image", value))
    with (
        DemoFile(path) as file,
        pytest.raises(UserError, match=f"demo_2: obs/wrist_image at step 4 {message}"),
    ):
        FrameCache(file, file.demos, CAMERAS, tmp_path)


@pytest.mark.parametrize(
    ("convert", "width", "description"),
    [
        (lambda x: (x > 0).astype(int), 3, "int64 to float"),
        (lambda x: x > 0, 3, "bool to float"),
        (lambda x: x[:, None], 3, "an axis of length 1 dropped"),
        (lambda x: x[:, 0], 1, "one number per step"),
    ],
)
def test_vectors_are_read_as_floats(
    edited: Edited, convert: Callable[[Any], Any], width: int, description: str
) -> None:
    path = edited(changed(convert, "obs/eef_pos"))
    with DemoFile(path) as file:
        assert (file.vector_keys, file.vector_dim("eef_pos")) == (VECTORS, width)
        assert file.converted["eef_pos"] == description
        values = file.read("demo_0", "obs/eef_pos")
        assert values.shape == (5, width)
        assert values.dtype.kind == "f"


@pytest.mark.parametrize(
    ("convert", "width"),
    [
        (lambda actions: np.sign(actions).astype(np.int32), 4),
        (lambda actions: actions > 0, 4),
        (lambda actions: actions[:, None], 4),
        (lambda actions: actions[:, 0], 1),
    ],
)
def test_actions_are_read_as_float_vectors(
    edited: Edited, tmp_path: Path, convert: Callable[[Any], Any], width: int
) -> None:
    path = edited(changed(convert, "actions"))
    dataset = WindowDataset(path, cameras=(), vectors=VECTORS, horizon=2, cache_dir=tmp_path)
    assert (dataset.actions.shape, dataset.actions.dtype) == ((15, width), np.float32)
    assert f"{width} dimensions, converted: {dataset.converted['actions']}" in inspect(path)


def test_chunks_of_actions_are_rejected(edited: Edited) -> None:
    path = edited(changed(lambda actions: np.repeat(actions[:, None], 2, axis=1), "actions"))
    with pytest.raises(UserError, match=r"actions are float64 \(5, 2, 4\), expected \(N, A\)"):
        DemoFile(path)


def test_frames_that_are_stored_upside_down_are_turned(edited: Edited, tmp_path: Path) -> None:
    path = edited(lambda file: file["data"].attrs.create("macros_image_convention", "opengl"))
    plain = demo_0(write(tmp_path / "plain.hdf5"), "wrist_image")
    np.testing.assert_array_equal(demo_0(path, "wrist_image"), plain[:, ::-1])
    with DemoFile(path) as file:
        assert file.converted == dict.fromkeys(CAMERAS, "turned upright")
        assert file.file_attrs == {}  # a rendered copy is upright


@pytest.mark.parametrize(
    ("size", "shape"), [((4, 3), (4, 3)), ((8, 6), (8, 6)), ((20, 20), (8, 6)), ((6, 9), (6, 9))]
)
def test_larger_frames_are_resized_once_into_the_cache(
    path: Path, tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    with DemoFile(path) as file:
        stored = file.read("demo_0", "obs/wrist_image")
        dataset = WindowDataset(
            file, cameras=CAMERAS, vectors=(), horizon=1, image_size=size, cache_dir=tmp_path
        )
    assert dataset.image_shapes["wrist_image"] == (*shape, 3)
    frames = dataset.batch(np.arange(5))["obs"]["wrist_image"][:, 0]
    np.testing.assert_array_equal(frames, resize_larger(stored, size))
    assert frames.mean() == pytest.approx(stored.mean(), rel=0.1)
    assert dataset.converted.get("wrist_image") == (
        None if shape == (8, 6) else f"8 x 6 resized to {shape[0]} x {shape[1]} pixels"
    )


def moved(*pairs: tuple[str, str]) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            del demo["next_obs"]
            for old, new in pairs:
                demo.move(old, new)

    return edit


@pytest.mark.parametrize("group", ["observation", "observations"])
def test_groups_and_actions_of_other_names_are_found(edited: Edited, group: str) -> None:
    path = edited(moved(("obs", group), ("actions", "action")))
    with DemoFile(path) as file:
        assert (file.image_keys, file.vector_keys) == (CAMERAS, VECTORS)
        assert file.read("demo_1", "obs/wrist_image").shape == (3, 8, 6, 3)
        assert file.action_dim == 4
        assert not file.is_in_place("obs/eef_pos")


def test_a_second_group_of_observations_is_named_and_can_be_mapped(edited: Edited) -> None:
    path = edited(moved(("obs/eef_pos", "observations/eef_pos")))
    with DemoFile(path, mapped={"observations/eef_pos": "eef"}) as file:
        assert file.vector_keys == ("eef",)
        assert any(
            "not read: group observations, beside obs; read an array of it with --map" in warning
            for warning in file.warnings
        )


def test_demos_may_lie_at_the_root_of_the_file(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        del file["mask"]
        for name in list(file["data"]):
            file.move(f"data/{name}", name)
        del file["data"]

    with DemoFile(edited(edit)) as file:
        assert file.demos == ("demo_0", "demo_1", "demo_2")
        assert file.read("demo_2", "obs/eef_pos").shape == (7, 3)


@pytest.mark.parametrize(
    ("entries", "image", "message"),
    [
        (["obs/a/b/front=front"], "front", ""),
        (["camera/front=agentview_image"], "agentview_image", ""),
        (["obs/a/b/front=front", "camera/left=front"], "front", ""),  # of another file
        (["camera/frnt=front"], "", "unknown array of demo_0 'camera/frnt': did you mean 'camera/"),
        (["front"], "", "--map front: expected PATH=KEY"),
    ],
)
def test_arrays_elsewhere_are_read_by_the_key_that_they_are_mapped_to(
    edited: Edited, entries: Sequence[str], image: str, message: str
) -> None:
    path = edited(
        moved(("obs/wrist_image", "obs/a/b/front"), ("obs/agentview_image", "camera/front"))
    )
    with DemoFile(path) as file:
        assert file.image_keys == ()
        assert file.frames_advice == "name what to read, e.g. --map camera/front=front"
    if message:
        with pytest.raises(UserError, match=message):
            DemoFile(path, mapped=parse_map(entries))
        return
    with DemoFile(path, mapped=parse_map(entries)) as file:
        assert file.image_keys == (image,)
        assert file.read("demo_1", f"obs/{image}").shape == (3, 8, 6, 3)


def test_another_array_can_be_mapped_to_the_actions(edited: Edited) -> None:
    path = edited(moved(("actions", "joint_targets"), ("states", "actions")))
    with DemoFile(path, mapped={"joint_targets": "actions"}) as file:
        assert file.action_dim == 4
    with pytest.raises(UserError, match="unknown array of demo_0 'joint_target': did you mean"):
        DemoFile(path, mapped={"joint_target": "actions"})
