from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from demo_files import CAMERAS, VECTORS

from fibopolicy.datasets import DemoFile, validate
from fibopolicy.datasets.validate import clipped
from fibopolicy.errors import UserError

Edited = Callable[[Callable[[h5py.File], object]], Path]


def refusal(path: Path, cameras: Sequence[str] = CAMERAS, vectors: Sequence[str] = VECTORS) -> str:
    with DemoFile(path) as file, pytest.raises(UserError) as caught:
        validate(file, cameras, vectors)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def replaced(key: str, value: object) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[f"data/demo_1/{key}"]
        file[f"data/demo_1/{key}"] = value

    return edit


def put(key: str, place: tuple[int, int], value: float) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file[f"data/demo_1/{key}"][place] = value

    return edit


def test_a_valid_file_passes(path: Path) -> None:
    with DemoFile(path) as file:
        validate(file, CAMERAS, VECTORS)


def test_a_missing_camera_gets_a_suggestion_and_a_list_of_the_known_ones(path: Path) -> None:
    message = refusal(path, cameras=["agentview"])
    assert (
        "unknown camera 'agentview': did you mean 'agentview_image'? known: agentview_image,"
        " wrist_image" in message
    )


def test_a_vector_is_not_accepted_as_a_camera(path: Path) -> None:
    assert "camera 'eef_pos' is float64 (N, 3), expected uint8 (N, H, W, 3)" in refusal(
        path, cameras=["eef_pos"]
    )


def test_a_camera_is_not_accepted_as_a_vector(path: Path) -> None:
    assert "expected float (N, D)" in refusal(path, vectors=["wrist_image"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            replaced("obs/wrist_image", np.zeros((3, 8, 8, 3), np.uint8)),
            "demo_1: obs/wrist_image is uint8 (N, 8, 8, 3), but",
        ),
        (
            replaced("obs/wrist_image", np.zeros((3, 8, 6, 3), np.float32)),
            "demo_1: obs/wrist_image is float32 (N, 8, 6, 3), but",
        ),
        (
            replaced("obs/wrist_image", np.zeros((2, 8, 6, 3), np.uint8)),
            "num_samples says 3, obs/wrist_image holds 2 steps",
        ),
        (
            replaced("obs/eef_pos", np.zeros((3, 4))),
            "demo_1: obs/eef_pos is float64 (N, 4), but float64 (N, 3) in demo_0",
        ),
        (replaced("rewards", np.zeros(4)), "demo_1: num_samples says 3, rewards holds 4 steps"),
        (
            replaced("actions", np.zeros((3, 5))),
            "demo_1: actions have 5 dimensions, those of demo_0 have 4",
        ),
        (
            replaced("actions", np.zeros((3, 4), np.int64)),
            "demo_1: actions are int64 (3, 4), expected floats",
        ),
        (put("actions", (2, 3), 1e300), "demo_1: action 1e+300 at step 2, dimension 3"),
        (put("actions", (0, 1), np.nan), "demo_1: action nan at step 0, dimension 1"),
        (put("actions", (0, 1), -np.inf), "demo_1: action -inf at step 0, dimension 1"),
        (put("obs/eef_pos", (1, 2), np.nan), "demo_1: obs/eef_pos is nan at step 1, dimension 2"),
        (put("obs/eef_pos", (1, 2), 1e300), "demo_1: obs/eef_pos is 1e+300 at step 1, dimension 2"),
        (lambda file: file["data/demo_1/obs"].pop("wrist_image"), "demo_1: unknown array"),
    ],
)
def test_invalid_content_is_named_by_demo_and_location(
    edited: Edited, edit: Callable[[h5py.File], object], message: str
) -> None:
    assert message in refusal(edited(edit))


def task(name: str, kind: int, **settings: object) -> dict[str, object]:
    return {"env_name": name, "type": kind, "env_kwargs": settings}


@pytest.mark.parametrize(
    "env_args", [task("Lift", 1), task("fibopolicy/Lift-v0", 2), task("metaworld/reach-v3", 2)]
)
def test_single_actions_beyond_the_bounds_are_clipped_like_in_the_simulator(
    env_args: dict[str, object],
) -> None:
    actions = np.array([[0.5, -0.5], [1.79, -2.0], [0.1, 0.2]])
    found, warning = clipped(actions, env_args)
    np.testing.assert_array_equal(found, [[0.5, -0.5], [1, -1], [0.1, 0.2]])
    assert (
        warning
        == "1 of 3 steps hold actions outside [-1, 1], up to 2; they are clipped, as the simulator"
        " does"
    )


def test_rounding_at_a_bound_is_accepted() -> None:
    actions = np.array([[1 + 5e-7, 0.0]])
    assert clipped(actions, task("Lift", 1)) == (actions, None)  # the very array


@pytest.mark.parametrize(
    "env_args",
    [
        {},
        task("RealKitchen", 4),
        task("my_robot:Kitchen", 1),
        task("Lift", 1, controller_configs={"type": "OSC_POSE", "control_delta": False}),
        task(
            "Lift",
            1,
            controller_configs={"type": "JOINT_POSITION", "input_max": 3.0, "input_min": -3.0},
        ),
        task(
            "Lift",
            1,
            controller_configs={
                "body_parts": {"right": {"type": "JOINT_POSITION", "input_type": "absolute"}}
            },
        ),
    ],
)
def test_other_tasks_accept_actions_of_any_range(env_args: dict[str, object]) -> None:
    actions = np.array([[2.9, 255.0], [-3.0, 0.0]])
    assert clipped(actions, env_args) == (actions, None)  # the very array


def test_absolute_poses_declared_as_displacements_are_rejected_with_the_setting_to_change() -> None:
    poses = np.tile([0.1, 0.0, 1.0, 3.1, 0.0, 0.0, -1.0], (4, 1))
    settings = {"type": "OSC_POSE", "control_delta": True}
    with pytest.raises(
        UserError,
        match=r"4 of 4 steps hold actions outside \[-1, 1\], up to 3.1, .*control_delta false",
    ):
        clipped(poses, task("Lift", 1, controller_configs=settings))


def test_only_the_selected_demos_are_checked(edited: Edited) -> None:
    with DemoFile(edited(put("actions", (0, 0), np.nan))) as file:
        validate(file, CAMERAS, VECTORS, demos=["demo_0", "demo_2"])
        with pytest.raises(UserError):
            validate(file, CAMERAS, VECTORS, demos=["demo_1"])


def test_a_file_without_observations_gets_a_hint_to_render_it(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            del demo["obs"]

    assert "render them before training" in refusal(edited(edit))
