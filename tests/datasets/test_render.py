from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.datasets.render import View, render
from fibopolicy.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scripted demos with images."""
    return collect(
        Plan("Reach-v0", image_size=16),
        11,
        tmp_path_factory.mktemp("reach") / "original.hdf5",
        workers=1,
    ).path


@pytest.fixture(scope="module")
def states_only(original: Path) -> Path:
    """The same without observations, rewards and dones, with what other people's files
    hold besides.
    """
    path = original.with_name("states_only.hdf5")
    with h5py.File(original) as old, h5py.File(path, "w") as new:
        old.copy("mask", new)
        data = new.create_group("data")
        data.attrs.update(old["data"].attrs)
        data.attrs["collected_by"] = "somebody"
        for name, demo in old["data"].items():
            group = data.create_group(name)
            group.attrs.update(demo.attrs)
            for key in ("actions", "executed_actions", "states"):
                demo.copy(key, group)
            group["controller_info/counters"] = np.arange(3)
            group["score"] = 0.5
    return path


def edited(path: Path, to: Path) -> h5py.File:
    to.write_bytes(path.read_bytes())
    return h5py.File(to, "r+")


@pytest.fixture(scope="module")
def rendered(states_only: Path) -> Path:
    return render(
        states_only, states_only.with_name("rendered.hdf5"), View(image_size=16), workers=1
    ).path


def test_every_observation_is_the_one_of_the_recording(original: Path, rendered: Path) -> None:
    with DemoFile(original) as old, DemoFile(rendered) as new:
        assert new.demos == old.demos
        for demo in old.demos:
            for key in (
                "obs/workspace_image",
                "obs/wrist_image",
                "next_obs/wrist_image",
                "obs/hand_position",
                "next_obs/hand_position",
                "rewards",
                "dones",
            ):
                np.testing.assert_array_equal(new.read(demo, key), old.read(demo, key))


def test_rendering_keeps_everything_except_the_images(states_only: Path, rendered: Path) -> None:
    with h5py.File(states_only) as old, h5py.File(rendered) as new:
        assert {k: v[()].tolist() for k, v in new["mask"].items()} == {
            k: v[()].tolist() for k, v in old["mask"].items()
        }
        for demo in old["data"]:
            for key in (
                "actions",
                "executed_actions",
                "states",
                "controller_info/counters",
                "score",
            ):
                a, b = old[f"data/{demo}/{key}"], new[f"data/{demo}/{key}"]
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a[()], b[()])
            assert dict(new[f"data/{demo}"].attrs) == dict(old[f"data/{demo}"].attrs)
        attrs = new["data"].attrs
        assert attrs["collected_by"] == "somebody"
        assert attrs["quality"] == "fast"
        assert attrs["rendered_from"] == "states_only.hdf5"
        assert "mujoco" in attrs["rendered_with"]
        assert "through" in attrs["renderer"]
        assert json.loads(attrs["env_args"])["env_kwargs"]["image_size"] == 16


@pytest.mark.slow
def test_the_rendered_bytes_do_not_depend_on_the_number_of_workers(
    states_only: Path, rendered: Path, tmp_path: Path
) -> None:
    render(states_only, tmp_path / "2.hdf5", View(image_size=16), workers=2)
    assert (tmp_path / "2.hdf5").read_bytes() == rendered.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["2.hdf5"]


@pytest.mark.slow
def test_a_killed_rendering_resumes_to_the_same_bytes(
    states_only: Path, rendered: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.hdf5"
    command = [
        sys.executable,
        "-m",
        "fibopolicy",
        "render",
        str(states_only),
        "--out",
        str(out),
        "--image-size",
        "16",
    ]
    killed = subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("out.hdf5.shards/demo_*.npz")):
        assert killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    with pytest.raises(UserError, match="holds unfinished work; pass --resume"):
        render(states_only, out, View(image_size=16))
    with pytest.raises(UserError, match="image_size = 16 there, 32 now"):
        render(states_only, out, View(image_size=32), resume=True)
    render(states_only, out, View(image_size=16), workers=1, resume=True)
    assert out.read_bytes() == rendered.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.hdf5"]


def test_cameras_quality_and_demos_can_be_selected(original: Path, tmp_path: Path) -> None:
    done = render(
        original, tmp_path / "out.hdf5", View(("wrist",), 20, "full"), filter_key="valid", workers=1
    )
    assert (done.cameras, done.dropped, done.demos) == (("wrist",), ("workspace_image",), 1)
    with DemoFile(done.path) as file:
        assert file.image_keys == ("wrist_image",)
        assert file.image_shape("wrist_image") == (20, 20, 3)
        assert file.demos == file.filter_keys["valid"]
        assert list(file.filter_keys) == ["valid"]
        assert file.env_args["env_kwargs"]["quality"] == "full"


def test_a_kept_vector_and_what_follows_it_are_read_alike(
    states_only: Path, tmp_path: Path
) -> None:
    with edited(states_only, tmp_path / "scalar.hdf5") as file:
        for demo in file["data"].values():
            forces = np.arange(len(demo["actions"]) + 1.0)  # one number per step
            demo["obs/force"], demo["next_obs/force"] = forces[:-1], forces[1:]
    done = render(tmp_path / "scalar.hdf5", tmp_path / "out.hdf5", View((), 16), workers=1)
    with h5py.File(done.path) as file:
        demo = file["data/demo_0"]
        assert demo["obs/force"].shape == demo["next_obs/force"].shape
        assert demo["next_obs/force"][0, 0] == demo["obs/force"][1, 0] == 1


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (
            lambda demo: demo["states"].write_direct(np.full(demo["states"].shape, np.nan)),
            "states hold nan at step 0",
        ),
        (lambda demo: demo.attrs.__setitem__("num_samples", 2), "num_samples says 2"),
        (lambda demo: demo.__delitem__("states"), "holds no states"),
        (
            lambda demo: (
                demo.__delitem__("states"),
                demo.__setitem__("states", np.zeros((len(demo["actions"]), 7))),
            ),
            "width",
        ),
    ],
)
def test_a_corrupt_demo_in_the_middle_is_named_and_skipped_only_on_request(
    states_only: Path, tmp_path: Path, harm: object, reason: str
) -> None:
    with edited(states_only, tmp_path / "corrupt.hdf5") as file:
        harm(file["data/demo_4"])  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"corrupt.hdf5: demo_4: .*{reason}"):
        render(tmp_path / "corrupt.hdf5", tmp_path / "out.hdf5", View(image_size=16), workers=1)
    assert not (tmp_path / "out.hdf5").exists()
    done = render(
        tmp_path / "corrupt.hdf5",
        tmp_path / "out.hdf5",
        View(image_size=16),
        workers=1,
        skip_corrupt=True,
        overwrite=True,
    )
    assert list(done.skipped) == ["demo_4"]
    assert reason in done.skipped["demo_4"]
    with DemoFile(done.path) as new:
        assert len(new.demos) == 10
        assert "demo_4" not in (*new.demos, *new.filter_keys["train"])


def test_wrong_arguments_are_reported(states_only: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.hdf5"
    with pytest.raises(UserError, match="is the input itself"):
        render(states_only, states_only, overwrite=True)
    with pytest.raises(UserError, match="unknown camera 'wrst': did you mean 'wrist'"):
        render(states_only, out, View(("wrst",)), workers=1)
    with pytest.raises(UserError, match="workers must be at least 1"):
        render(states_only, out, workers=0, overwrite=True)
    with pytest.raises(UserError, match="unknown filter key"):
        render(states_only, out, filter_key="trian")
    with edited(states_only, tmp_path / "other.hdf5") as file:
        file["data"].attrs["env_args"] = json.dumps(
            {"env_name": "fibopolicy/Rech-v0", "type": 2, "env_kwargs": {}}
        )
    with pytest.raises(UserError, match="fibopolicy/Rech-v0"):
        render(tmp_path / "other.hdf5", tmp_path / "new.hdf5", workers=1)
