"""A task of the user's own, by "module:class"."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import h5py
import pytest
from no_workers import no_workers

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.datasets.replay import replay
from fibopolicy.envs import from_env_args, make
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.evaluation.evaluate import default_workers
from fibopolicy.study import StudyTask
from fibopolicy.training import TrainConfig, train
from fibopolicy.training.config import RolloutConfig

SOURCE = """
import numpy as np
from fibopolicy.envs import TaskEnv
from fibopolicy.envs.tabletop.reach import Reach
from fibopolicy.policies import PolicyConfig

class High(Reach):
    def place(self, rng):
        self.mark("target", [*rng.uniform(-0.1, 0.1, 2), 0.14])

class Bare(TaskEnv):
    pass

class Nameless(Reach):
    @property
    def env_args(self):
        return {**super().env_args, "env_name": "fibopolicy/Reach-v0"}

class Fixed(High):
    task_id = property(lambda self: "fixed")

class Untold(High):
    env_args = None

class Unstored(High):
    @property
    def env_args(self):
        return {**super().env_args, "env_kwargs": {"size": np.float32(1)}}

class Floats(High):
    def observe(self):
        return {key: value / 1.0 for key, value in super().observe().items()}

class Idle(High):
    def expert_action(self):
        return np.zeros(4, dtype=np.float32)

class Blind(High):
    def observe(self):
        return {key: value for key, value in super().observe().items() if key != "hand_position"}

class NoHertz(High):
    def __init__(self, **options):
        super().__init__(**options)
        self.task_id = "else"

    def __getattribute__(self, name):
        if name == "control_hz":
            raise AttributeError(name)
        return super().__getattribute__(name)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_task.py").write_text(SOURCE)
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "custom_task", raising=False)


@pytest.mark.usefixtures("here")
def test_a_custom_task_is_collected_replayed_and_rolled_out_like_any_other() -> None:
    collect(Plan("custom_task:High", cameras=()), 2, "high.hdf5", workers=1)
    with DemoFile(Path("high.hdf5")) as file, from_env_args(file.env_args) as env:
        assert env.task_id == file.env_args["env_name"] == "custom_task:High"
        env.reset(seed=0)
        assert env.position("target")[2] == pytest.approx(0.14)  # type: ignore[attr-defined]
    assert all(demo.success for demo in replay(Path("high.hdf5"), workers=1).demos)
    rows = evaluate_policy(
        lambda obs: [0, 0, 1, -1], "custom_task:High", 2, workers=1, cameras=(), horizon=3
    )
    assert [row.task for row in rows] == ["custom_task:High"] * 2
    # it may be as heavy
    assert default_workers("custom_task:High", 1000) == default_workers("robosuite/Lift", 1000)
    assert StudyTask("custom_task:High").short == "custom_task-High"
    with pytest.raises(UserError, match="custom_task:Bare: its class lacks advance"):
        evaluate_policy(lambda obs: [0, 0, 1, -1], "custom_task:Bare", 2, workers=1)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom_task:Hihg", r"custom_task.py has no Hihg, did you mean High\?"),
        ("custom_tasks:High", "there is no module custom_tasks"),
        ("custom_task.py:High", "name the module, not its file: custom_task:High"),
        ("./custom_task:High", "name the module, not its file: custom_task:High"),
        ("calendar:High", "calendar.py has no High"),
        ("ends:High", "importing ends fails: SystemExit: 3"),
        ("custom_task:Fixed", "its task_id must be an attribute that can be set"),
        ("custom_task:Untold", "must be a dict with env_name, type and env_kwargs, got None"),
        ("custom_task:Unstored", "cannot be stored as JSON: Object of type float32"),
        ("custom_task:", "expected <module>:<name>"),
        ("custom_task:PolicyConfig", "expected a class derived from fibopolicy.envs.TaskEnv"),
        ("os:system", "expected a class derived from fibopolicy.envs.TaskEnv"),
        (
            "custom_task:Bare",
            "lacks advance, env_args, get_state, observe, set_state, success; see",
        ),
        ("custom_task:NoHertz", "lacks control_hz; see"),
        (
            "custom_task:Nameless",
            "its env_args name 'fibopolicy/Reach-v0' of type 2, which is another task",
        ),
    ],
)
def test_an_invalid_task_is_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(name)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Floats", r"observation wrist_image is float64 \(84, 84, 3\), expected uint8 \(H, W, 3\)"),
        ("Blind", "its observations lack hand_position"),
    ],
)
def test_observations_that_no_policy_could_read_are_rejected_before_recording(
    name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        collect(Plan(f"custom_task:{name}", cameras=("wrist",)), 1, "none.hdf5", workers=1)
    assert not list(Path().glob("none*"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("noise", "advice"), [(0.0, "it does not solve its task"), (0.2, "lower it")]
)
def test_only_a_failing_expert_with_noise_gets_a_hint_to_lower_it(
    noise: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fibopolicy.datasets.collect.GIVE_UP_AFTER", 10)
    with (
        no_workers(),
        pytest.raises(
            UserError, match=f"succeeded in 0 of 10 episodes with noise {noise}; {advice}"
        ),
    ):
        collect(Plan("custom_task:Idle", cameras=(), noise=noise), 10, "none.hdf5")


@pytest.mark.usefixtures("here")
def test_rollouts_in_an_unknown_task_are_rejected_before_training(lift_file: Path) -> None:
    shutil.copy(lift_file, "gone.hdf5")
    with h5py.File("gone.hdf5", "r+") as file:
        env_args = json.loads(file["data"].attrs["env_args"])
        file["data"].attrs["env_args"] = json.dumps({**env_args, "env_name": "gone:High"})
    config = TrainConfig(Path("gone.hdf5"), Path("run"), rollouts=RolloutConfig(rollout_every=1))
    with pytest.raises(UserError, match="task gone:High: there is no module gone"):
        train(config)
    assert not Path("run").exists()


@pytest.mark.usefixtures("here")
def test_an_option_that_the_task_does_not_take_is_named() -> None:
    with pytest.raises(UserError, match=r"custom_task:High: .*'sise'"):
        make("custom_task:High", sise=3)
