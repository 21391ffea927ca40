"""The recipe from the download to the table, on a small file as robomimic hosts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from command import TINY_ENCODER_OPTIONS, call
from hub_server import serving, use_hub

RECIPE = Path(__file__).parents[2] / "scripts" / "recipes" / "robomimic_ph"
#: Stands in for the command: asks the test to run it, through pipes that all processes of
#: the recipe inherit.
COMMAND = """#!/usr/bin/env bash
printf '%s\\0' "$@" '' >&"$ASK"
read -r code <&"$ANSWERS"
cat printed
exit "$code"
"""


def hosted_lift(path: Path) -> bytes:
    """A demo of Lift as robomimic 0.5's scripts write them with robosuite 1.5: its
    `env_args`, and models with the paths of the recorder's machine.
    """
    robosuite = pytest.importorskip("robosuite", reason="robosuite is not installed")
    kwargs = {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": robosuite.load_composite_controller_config(robot="Panda"),
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "lite_physics": False,
        "reward_shaping": False,
    }
    env = robosuite.make("Lift", **kwargs)
    assets = str(Path(robosuite.__file__).parent)
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = 3
        args = {"env_name": "Lift", "env_version": "1.5.1", "type": 1, "env_kwargs": kwargs}
        data.attrs["env_args"] = json.dumps(args, indent=4)
        env.reset()
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"] = 3
        model = env.sim.model.get_xml()
        demo.attrs["model_file"] = model.replace(assets, "/home/somebody/robosuite/robosuite")
        demo.attrs["ep_meta"] = json.dumps(env.get_ep_meta())
        demo["actions"] = actions = random.uniform(-1, 1, (3, 7))
        states, seen = [], []
        for action in actions:
            states.append(env.sim.get_state().flatten())
            seen.append(env.step(action)[0]["robot0_eef_pos"])
        demo["states"], demo["obs/robot0_eef_pos"] = np.array(states), np.array(seen)
        demo["next_obs/robot0_eef_pos"] = np.array(seen)
        demo["rewards"], demo["dones"] = np.zeros(3), np.zeros(3, int)
        file["mask/train"] = np.array([b"demo_0"])
    env.close()
    return path.read_bytes()


@pytest.mark.slow
def test_the_recipe_runs_from_the_download_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands run in this process, which has all imports."""
    recipe, tools = tmp_path / "scripts" / "recipes" / RECIPE.name, tmp_path / ".venv" / "bin"
    recipe.parent.mkdir(parents=True)
    shutil.copy(RECIPE, recipe)
    tools.mkdir(parents=True)
    (tools / "fibopolicy").write_text(COMMAND)
    (tools / "fibopolicy").chmod(0o755)
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    with serving() as hub:
        file = "datasets/robomimic/robomimic_datasets/v1.5/lift/ph/low_dim_v15.hdf5"
        hub.files[file] = hosted_lift(tmp_path / "hosted.hdf5")
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        env = {
            **os.environ,
            "ASK": str(ask),
            "ANSWERS": str(answers),
            "OUT": str(tmp_path / "out"),
            "SEEDS": "0",
            "EPISODES": "1",
            "MAX_STEPS": "2",
            "IMAGE_SIZE": "24",
        }
        line = [recipe, "lift", "--steps", "1", *TINY_ENCODER_OPTIONS, "--device", "cpu"]
        with (
            subprocess.Popen(line, env=env, pass_fds=(ask, answers)) as script,
            os.fdopen(answer, "w", buffering=1) as told,
            os.fdopen(asked, "rb", buffering=0) as questions,
        ):
            os.close(ask)
            os.close(answers)
            words = b""
            while chunk := questions.read(1 << 16):  # nothing once the script has ended
                words += chunk
                if words.endswith(b"\0\0"):
                    arguments = words[:-2].decode().split("\0")
                    code, out, errors = call(monkeypatch, capsys, *arguments)
                    (tmp_path / "printed").write_text(out)
                    print(code, file=told)
                    words = b""
                    assert code == 0, errors
    assert script.returncode == 0
    run = tmp_path / "out" / "seed0"
    assert "0/1 " in (run / "success_1.txt").read_text()
    rows = (run / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in rows] == [0]
    with h5py.File(tmp_path / "out" / "demos.hdf5") as rendered:
        assert rendered["data/demo_0/obs/agentview_image"].shape == (3, 24, 24, 3)
        assert rendered["data/demo_0/obs/robot0_eye_in_hand_image"].shape == (3, 24, 24, 3)
        assert rendered["data"].attrs["licence"] == "MIT"
    assert (tmp_path / "out" / "rates.json").is_file()


def test_an_unknown_task_of_the_recipe_is_named() -> None:
    done = subprocess.run([RECIPE, "lfit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown task lfit: expected lift, can" in done.stderr
