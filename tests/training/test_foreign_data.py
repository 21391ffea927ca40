"""Training on what is not simulated here: what is chosen, what is refused, and what the
policy gives back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from command import TINY_ENCODER_OPTIONS, call

from fibopolicy.datasets import DemoWriter
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import TrainConfig
from fibopolicy.training.config import RolloutConfig
from fibopolicy.training.data import left_out, open_dataset, shapes_of
from fibopolicy.training.trainer import train

KITCHEN = {"env_name": "RealKitchen", "type": 4, "env_kwargs": {}}
FRAMES = np.zeros((12, 24, 24, 3), np.uint8)
Files = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Files:
    def write(env_args: dict[str, Any] = KITCHEN, actions: Any = None, **obs: Any) -> Path:
        path = tmp_path / "demos.hdf5"
        random = np.random.default_rng(0)
        seen = {"front_image": FRAMES, "robot0_eef_pos": random.normal(size=(12, 3)), **obs}
        with DemoWriter(path, env_args, overwrite=True) as writer:
            for _ in range(2):
                done = random.uniform(-1, 1, (12, 7)) if actions is None else actions
                writer.add(
                    {k: v for k, v in seen.items() if v is not None},
                    done,
                    np.zeros((12, 5)),
                    None,
                    None,
                )
        return path

    return write


@pytest.mark.parametrize("normalization", ["minmax", "none", "gaussian"])
def test_a_policy_predicts_joint_targets_in_their_range(
    write: Files, tiny_config: TrainConfig, tmp_path: Path, normalization: str
) -> None:
    targets = np.tile([2.5, -2.0, 0.1, 3.0, 0.0, 0.5, 255.0], (12, 1))
    targets[::2, 0], targets[::2, 6] = 2.4, 0.0
    policy = replace(tiny_config.policy, action_normalization=normalization)
    config = replace(
        tiny_config, dataset=write(actions=targets), out=tmp_path / "run", policy=policy
    )
    train(config)
    loaded = load_policy(config.out).policy
    assert loaded.shapes.absolute
    # a policy after little training stays near the middle of the range
    if normalization == "minmax":
        obs = {
            "front_image": torch.zeros(1, 1, 24, 24, 3, dtype=torch.uint8),
            "robot0_eef_pos": torch.zeros(1, 1, 3),
        }
        actions, _ = loaded.act(obs, None)
        assert actions[..., 3].min() > 1


def test_actions_within_the_bounds_are_not_absolute(write: Files, tiny_config: TrainConfig) -> None:
    assert not shapes_of(open_dataset(replace(tiny_config, dataset=write()))).absolute


def test_all_arms_are_read(write: Files, tiny_config: TrainConfig) -> None:
    path = write(robot1_eef_pos=np.zeros((12, 3)), robot0_joint_pos=np.zeros((12, 7)))
    assert open_dataset(replace(tiny_config, dataset=path)).vectors == (
        "robot0_eef_pos",
        "robot1_eef_pos",
    )


def test_unread_observations_are_listed_at_the_start(
    write: Files, tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(cube_pos=np.zeros((12, 3)), front_depth=np.zeros((12, 24, 24, 1), np.uint8))
    with caplog.at_level(logging.INFO):
        train(replace(tiny_config, dataset=path, out=tmp_path / "run"))
    assert (
        f"{path}: not read: cube_pos, front_depth; choose with --cameras and --vectors"
        in caplog.messages
    )
    path = write(**{f"object_{i}": np.zeros((12, 3)) for i in range(40)})
    names = ", ".join(sorted(f"object_{i}" for i in range(40))[:8])
    assert left_out(open_dataset(replace(tiny_config, dataset=path))) == [
        f"{path}: not read: {names} and 32 more; choose with --cameras and --vectors"
    ]


@pytest.mark.parametrize("kind", [4, 1])
def test_unreadable_frames_are_named_with_a_hint_to_render_known_tasks(
    write: Files, tiny_config: TrainConfig, kind: int
) -> None:
    name = "RealKitchen" if kind == 4 else "Lift"
    path = write(
        {"env_name": name, "type": kind, "env_kwargs": {}},
        front_image=np.full((12, 24, 24, 3), -3.0, np.float32),
    )
    with pytest.raises(UserError) as caught:
        open_dataset(replace(tiny_config, dataset=path))
    assert (
        "front_image is float32 (N, 24, 24, 3): values from -3 to -3; frames hold 0 to 255"
        in str(caught.value)
    )
    assert ("fibopolicy render" in str(caught.value)) == (kind == 1)


def test_an_unreadable_camera_is_not_skipped_silently(
    write: Files, tiny_config: TrainConfig
) -> None:
    config = replace(tiny_config, dataset=write(wrist_image=np.full((12, 24, 24, 3), np.nan)))
    with pytest.raises(
        UserError,
        match=r"wrist_image is .*frames hold 0 to 255.*leave it out with --cameras front_image",
    ):
        open_dataset(config)
    assert open_dataset(replace(config, cameras=("front_image",))).cameras == ("front_image",)


@pytest.mark.parametrize(
    ("env_args", "message"),
    [
        ({}, "the data name no task"),
        (KITCHEN, "task 'RealKitchen' of type 4"),
        ({"env_name": "Coffee_D0", "type": 1, "env_kwargs": {}}, "task 'Coffee_D0' is MimicGen's"),
        ({"env_name": "Libero_Floor_Manipulation", "type": 1, "env_kwargs": {}}, "is LIBERO's"),
    ],
)
def test_data_of_another_simulator_can_be_trained_on_but_not_rolled_out(
    write: Files,
    tiny_config: TrainConfig,
    tmp_path: Path,
    env_args: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = write(env_args), tmp_path / "run"
    options = (
        "--steps",
        "2",
        *TINY_ENCODER_OPTIONS,
    )
    code, out, _ = call(
        monkeypatch, capsys, "train", "--dataset", str(path), "--out", str(run), *options
    )
    assert (code, "next:" in out) == (0, False)
    assert json.loads((run / "config.json").read_text())["env_args"] == env_args
    for roll_out in (
        lambda: evaluate_run(EvaluateConfig(run, episodes=1)),
        lambda: evaluate_policy(load_policy(run).policy, env_args, 1, workers=1),
        lambda: train(
            replace(
                tiny_config,
                dataset=path,
                out=tmp_path / "b",
                rollouts=RolloutConfig(rollout_every=5),
            )
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            roll_out()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_the_next_command_is_printed_for_a_known_task_and_quoted(
    lift_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "my run"
    options = (
        "--steps",
        "2",
        *TINY_ENCODER_OPTIONS,
    )
    _, out, _ = call(
        monkeypatch, capsys, "train", "--dataset", str(lift_file), "--out", str(run), *options
    )
    assert f"next: fibopolicy evaluate '{run}' --episodes 50" in out.splitlines()


def test_converted_mapped_and_resized_data_train_a_policy(
    write: Files, tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write({}, front_image=np.full((12, 3, 30, 40), 0.5, np.float32))
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["next_obs"]
            demo.move("obs/front_image", "camera/high")
    config = replace(
        tiny_config,
        dataset=path,
        out=tmp_path / "run",
        map=("camera/high=front",),
        image_size=(24, 36),
    )
    with caplog.at_level(logging.INFO):
        train(config)
    how = "channels first, float32 0 to 1, 30 x 40 resized to 24 x 36 pixels"
    assert f"{path}: converted: front ({how})" in caplog.messages
    assert load_policy(config.out).policy.shapes.images == {"front": (24, 36)}
    assert open_dataset(replace(config, image_size=24)).image_shapes == {"front": (24, 24, 3)}


def test_a_task_can_be_named_for_the_rollouts_of_data_without_one(
    lift_file: Path, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "unnamed.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
    rollouts = RolloutConfig(rollout_every=12, rollout_episodes=1, task="Lift-v0")
    config = replace(tiny_config, dataset=path, out=tmp_path / "run", rollouts=rollouts)
    train(config)
    rows = (config.out / "metrics.jsonl").read_text(encoding="utf-8")
    assert "rollout_success" in rows
    with pytest.raises(UserError, match=r"the data name no task.*or name a task with --task"):
        evaluate_run(EvaluateConfig(config.out, episodes=1))
    done = evaluate_run(EvaluateConfig(config.out, episodes=1, video=0, workers=1, task="Lift-v0"))
    assert len(done.rows) == 1
    with pytest.raises(UserError, match="unknown camera 'sky'"):
        evaluate_run(EvaluateConfig(config.out, task="Lift-v0", video_camera="sky"))
    with pytest.raises(UserError, match="unknown task 'Lfit-v0': did you mean"):
        train(replace(config, rollouts=replace(rollouts, task="Lfit-v0")), overwrite=True)
    with pytest.raises(UserError, match="set --rollout-every, or give --task to evaluate"):
        RolloutConfig(task="Lift-v0")


def test_nested_cameras_can_be_trained_on(
    write: Files, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    path = write()
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["next_obs"]
            demo.move("obs/front_image", "obs/images/front")
    train(replace(tiny_config, dataset=path, out=tmp_path / "run"))
    assert list(load_policy(tmp_path / "run").policy.shapes.images) == ["images/front"]
