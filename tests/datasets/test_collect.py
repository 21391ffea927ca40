from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import h5py
import numpy as np
import pytest
from no_workers import no_workers

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import GENERATOR, Plan, collect, perturbed, run_expert
from fibopolicy.datasets.render import render
from fibopolicy.datasets.shards import add_episode, resume_folder, simulator_versions
from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.envs import make
from fibopolicy.envs.base import SimState
from fibopolicy.envs.tabletop.reach import Reach
from fibopolicy.errors import UserError

PLAN = Plan("fibopolicy/Reach-v0", cameras=("workspace",), image_size=16)


def contents(path: Path) -> dict[str, object]:
    with h5py.File(path) as file:
        found: dict[str, object] = {}
        file.visititems(
            lambda name, item: (
                found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
            )
        )
        return found


@pytest.mark.slow
def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2):
        collect(PLAN, 25, tmp_path / f"{workers}.hdf5", workers=workers)
    assert contents(tmp_path / "1.hdf5") == contents(tmp_path / "2.hdf5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.hdf5", "2.hdf5"]


def test_cameras_may_differ_in_size_and_rendering_keeps_their_sizes(tmp_path: Path) -> None:
    sizes = {"workspace": (24, 40), "wrist": 16}
    collect(Plan("Reach-v0", image_size=sizes), 1, tmp_path / "a.hdf5", workers=1)
    render(tmp_path / "a.hdf5", tmp_path / "b.hdf5", workers=1)
    with DemoFile(tmp_path / "a.hdf5") as made, DemoFile(tmp_path / "b.hdf5") as again:
        for file in (made, again):
            assert file.image_shape("workspace_image") == (24, 40, 3)
            assert file.image_shape("wrist_image") == (16, 16, 3)
        frames = [file.read("demo_0", "obs/workspace_image", 0, 1) for file in (made, again)]
    np.testing.assert_array_equal(*frames)


def test_the_expert_s_actions_are_recorded_and_executed_with_noise(
    lift_file: Path,
) -> None:
    with DemoFile(lift_file) as file:
        clean, executed = file.read("demo_0", "actions"), file.read("demo_0", "executed_actions")
        assert np.abs(executed).max() <= 1
        assert 0.05 < np.abs(clean - executed)[:, :3].mean() < 0.4
        np.testing.assert_array_equal(clean[:, 3], executed[:, 3])
        layout = np.random.default_rng(file.attrs("demo_0")["seed"])  # no stream of its own
        assert not np.array_equal(executed[0], perturbed(clean[0], Reach.expert_noise, layout))
        assert file.read("demo_0", "rewards")[-1] == 1
        assert json.loads(json.dumps(file.env_args))["env_name"] == "fibopolicy/Lift-v0"


def test_an_unfinished_collection_is_kept_and_not_mixed_with_another(tmp_path: Path) -> None:
    out, shards = tmp_path / "demos.hdf5", tmp_path / "demos.hdf5.shards"
    shards.mkdir()
    (shards / "plan.json").write_text(json.dumps(asdict(Plan("fibopolicy/Reach-v0", seed=7))))
    (shards / "shard_00000.npz").write_text("of seed 7")
    with pytest.raises(UserError, match="holds unfinished work"):
        collect(PLAN, 2, out, workers=1)
    with pytest.raises(UserError, match="with other settings"):
        collect(PLAN, 2, out, workers=1, resume=True)
    assert (shards / "shard_00000.npz").exists()
    collect(PLAN, 2, out, workers=1, overwrite=True)
    assert not shards.exists()


def test_a_shard_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    shards = tmp_path / "demos.hdf5.shards"
    shards.mkdir()
    (shards / "precious").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not shards"):
        collect(PLAN, 2, tmp_path / "demos.hdf5", workers=1, overwrite=True)
    assert (shards / "precious").exists()


@pytest.mark.slow
def test_a_killed_collection_resumes_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "demos.hdf5"
    command = [
        sys.executable,
        "-m",
        "fibopolicy",
        "collect",
        "Reach-v0",
        "--episodes",
        "3000",
        "--out",
        str(out),
    ]
    command += ["--image-size", "16", "--workers", "1"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("demos.hdf5.shards/shard_*.npz")):
        assert killed.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    found = json.loads((tmp_path / "demos.hdf5.shards/plan.json").read_text())
    plan = Plan(**{field.name: found[field.name] for field in fields(Plan)})
    collect(plan, 20, out, workers=1, resume=True)
    with no_workers():
        collect(plan, 20, tmp_path / "whole.hdf5")
    assert contents(out) == contents(tmp_path / "whole.hdf5")


def test_shards_of_another_simulator_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume() -> None:
        with resume_folder(tmp_path, {"seed": 0}, resume=True, overwrite=False):
            (tmp_path / "shard_00000.npz").touch()

    resume()
    resume()
    other = {**simulator_versions(), "mujoco": "9"}
    monkeypatch.setattr("fibopolicy.datasets.shards.simulator_versions", lambda: other)
    with pytest.raises(UserError, match=r"mujoco = .* there, 9 now"):
        resume()


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (Plan("Reach-v0", noise=5), {}, "noise must be between"),
        (Plan("Reach-v0", seed=-1), {}, "seed must be between"),
        (Plan("Reach-v0"), {"workers": 0}, "workers must be at least 1"),
        (Plan("Reach-v0"), {"resume": True, "overwrite": True}, "either --resume or --overwrite"),
        (Plan("Reach-v0", image_size=50000), {}, "image_size must be between"),
    ],
)
def test_impossible_collections_are_rejected(
    plan: Plan, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        collect(plan, 1, tmp_path / "x.hdf5", **options)
    assert not list(tmp_path.iterdir())


def test_each_demo_keeps_the_model_of_its_own_scene(tmp_path: Path) -> None:
    """A door cannot move about: where it stands is written in the model, not in the state."""
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    env = make("robosuite/Door", cameras=())
    plan = Plan("robosuite/Door", cameras=(), noise=0.0)
    with DemoWriter(tmp_path / "door.hdf5", env.env_args) as writer:
        names = [
            add_episode(writer, run_expert(env, plan, index), {"generator": GENERATOR})
            for index in range(2)
        ]
    with h5py.File(tmp_path / "door.hdf5") as file:
        models = [file[f"data/{name}"].attrs["model_file"] for name in names]
        assert models[0] != models[1]
        for name, model in zip(names, models, strict=True):
            demo = file[f"data/{name}"]
            assert demo.attrs["generator"] == "scripted expert"
            seen = env.set_state(SimState(model, demo["states"][0]))
            np.testing.assert_allclose(seen["handle_pos"], demo["obs/handle_pos"][0], atol=1e-6)
    env.close()


def test_the_default_noise_depends_on_the_simulator() -> None:
    assert make("fibopolicy/Reach-v0", cameras=()).expert_noise == 0.2
    action = np.array([0.5, -1, 1], dtype=np.float32)
    rng = np.random.default_rng(0)
    many = np.array([perturbed(action, 0.1, rng) for _ in range(500)])
    assert np.abs(many).max() <= 1
    assert many[:, 0].std() == pytest.approx(0.1, rel=0.15)
    assert (many[:, 2] == 1).all()


def test_a_task_without_an_expert_is_rejected_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Reach, "expert_action")
    with pytest.raises(UserError, match="fibopolicy/Reach-v0 has no scripted expert"):
        collect(PLAN, 2, tmp_path / "demos.hdf5", workers=1)
    assert not list(tmp_path.iterdir())


def test_demos_carry_the_instruction_of_a_task_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reach, "instruction", "touch the target", raising=False)
    collect(PLAN, 1, tmp_path / "a.hdf5", workers=1)
    with DemoFile(tmp_path / "a.hdf5") as file:
        assert file.attrs("demo_0")["language_instruction"] == "touch the target"
