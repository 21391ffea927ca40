"""Sizes of frames, and which OpenGL draws them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fibopolicy import envs
from fibopolicy.envs.rendering import FrameSizes
from fibopolicy.errors import UserError

LOOK = (
    "from fibopolicy import envs; e = envs.make('Reach-v0', image_size=16);"
    " print(e.reset(seed=0)[0]['wrist_image'].std() > 0)"
)


def run(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | changes, check=False
    )


@pytest.mark.parametrize(
    "changes",
    [{"MUJOCO_GL": ""}, {"DISPLAY": ":987"}, {"DISPLAY": ":987", "MUJOCO_GL": ""}],
    ids=["empty", "display", "both"],
)
def test_egl_is_the_default_opengl_platform(changes: dict[str, str]) -> None:
    done = run(LOOK + "; import os; print(os.environ['MUJOCO_GL'])", **changes)
    assert done.stdout.split() == ["True", "egl"], done.stderr


@pytest.mark.parametrize("first", ["", "import mujoco; "], ids=["ours", "mujoco"])
@pytest.mark.parametrize("chosen", [{}, {"MUJOCO_GL": "egl"}], ids=["default", "chosen"])
def test_a_contradictory_opengl_platform_is_named(first: str, chosen: dict[str, str]) -> None:
    if first and chosen:
        pytest.skip("mujoco itself cannot be imported so")
    code = (
        f"{first}from fibopolicy.errors import UserError\ntry:\n  {LOOK}\nexcept UserError as"
        " error: print(error)"
    )
    done = run(code, PYOPENGL_PLATFORM="osmesa", **chosen)
    assert (
        done.stdout == "cannot render: PYOPENGL_PLATFORM=osmesa contradicts MUJOCO_GL=egl; unset"
        " PYOPENGL_PLATFORM\n"
    ), done.stderr


@pytest.mark.parametrize("task", ["Reach-v0", "metaworld/reach-v3"])
def test_each_camera_has_its_own_size(task: str) -> None:
    if task.startswith("metaworld"):
        pytest.importorskip("metaworld")
    with envs.make(task, image_size=32) as env:
        first, second = env.cameras  # type: ignore[attr-defined]
        square, _ = env.reset(seed=0)
        assert env.env_args["env_kwargs"]["image_size"] == 32
    sizes: dict[str, Any] = {first: (24, 40), second: 32, "unused": 50}
    with envs.make(task, image_size=sizes) as env:
        mixed, _ = env.reset(seed=0)
        stored = json.loads(json.dumps(env.env_args))
        assert stored == env.env_args
        assert stored["env_kwargs"]["image_size"] == {first: [24, 40], second: 32}
        assert {key: value.shape for key, value in mixed.items()} == {
            key: space.shape
            for key, space in env.observation_space.items()  # type: ignore[attr-defined]
        }
    assert mixed[f"{first}_image"].shape == (24, 40, 3)
    np.testing.assert_array_equal(mixed[f"{second}_image"], square[f"{second}_image"])
    with envs.from_env_args(stored, cameras=(first,)) as env:
        np.testing.assert_array_equal(
            env.reset(seed=0)[0][f"{first}_image"], mixed[f"{first}_image"]
        )
        assert env.env_args["env_kwargs"]["image_size"] == [24, 40]
    # A wider frame shows more to the sides and the same in height: every row's middle
    # is the square frame's row.
    with envs.make(task, cameras=(second,), image_size=(32, 96)) as env:
        wide = env.reset(seed=0)[0][f"{second}_image"]
    assert np.abs(wide[:, 32:64].astype(int) - square[f"{second}_image"]).mean() < 2


def test_an_image_size_is_stored_in_its_shortest_form() -> None:
    assert (
        FrameSizes((84, 84), "ab").stored()
        == FrameSizes({"a": 84, "b": [84, 84]}, "ab").stored()
        == 84
    )
    assert FrameSizes({"a": (24, 36), "b": (24, 36)}, "ab").stored() == [24, 36]
    assert FrameSizes({}, "").stored() == 84
    assert FrameSizes(np.int64(30), "a").stored() == 30  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4, "between 8 and 1024 pixels, got 4"),
        ((24, 2000), r"between 8 and 1024 pixels, got \(24, 2000\)"),
        ("84", "number of pixels, .* got '84'"),
        (84.5, "number of pixels, .* got 84.5"),
        ((24, 36, 3), r"number of pixels, .* got \(24, 36, 3\)"),
        ({"wrist": 24}, "no size for workspace, only for wrist"),
        ({"workspace": 24, "wrist": None}, "number of pixels, .* got None"),
    ],
)
def test_an_impossible_image_size_is_rejected(size: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        envs.make("Reach-v0", image_size=size)


@pytest.mark.parametrize("early", ["", "os.environ['MUJOCO_GL'] = 'egl'"])
def test_mujoco_may_be_imported_first(early: str) -> None:
    # robosuite imports mujoco and sets the variable after it
    code = (
        f"import os, mujoco.gl_context as g; {early or 'pass'}; import fibopolicy.envs.rendering as"
        " r; r.configure_gl()"
    )
    done = run(f"{code}; print(g.GLContext.__module__)", MUJOCO_GL="", DISPLAY="")
    assert done.stdout.strip() == "mujoco.egl", done.stderr
