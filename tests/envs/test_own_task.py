"""A task of the user's own, by "module:class"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.datasets.replay import replay
from fibopolicy.envs import from_env_args, make
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate
from fibopolicy.study import StudyTask

SOURCE = """
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
    (tmp_path / "own_task.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_task", raising=False)


@pytest.mark.usefixtures("here")
def test_it_is_collected_replayed_and_rolled_out_like_any_other() -> None:
    collect(Plan("own_task:High", cameras=()), 2, "high.hdf5", workers=1)
    with DemoFile(Path("high.hdf5")) as file, from_env_args(file.env_args) as env:
        assert env.task_id == file.env_args["env_name"] == "own_task:High"
        env.reset(seed=0)
        assert env.position("target")[2] == pytest.approx(0.14)  # type: ignore[attr-defined]
    assert all(demo.success for demo in replay(Path("high.hdf5"), workers=1).demos)
    rows = evaluate(lambda obs: [0, 0, 1, -1], "own_task:High", 2, workers=1, cameras=(), horizon=3)
    assert [row.task for row in rows] == ["own_task:High"] * 2
    assert StudyTask("own_task:High").short == "own_task-High"
    with pytest.raises(UserError, match="own_task:Bare: its class lacks advance"):
        evaluate(lambda obs: [0, 0, 1, -1], "own_task:Bare", 2, workers=1)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_task:Hihg", r"own_task:Hihg: cannot be imported \(AttributeError"),
        ("own_tasks:High", "there is no module own_tasks"),
        ("own_task.py:High", "name the module, not its file: own_task:High"),
        ("own_task:", "expected <module>:<name>"),
        ("own_task:PolicyConfig", "expected a class derived from fibopolicy.envs.TaskEnv"),
        ("os:system", "expected a class derived from fibopolicy.envs.TaskEnv"),
        ("own_task:Bare", "lacks advance, env_args, get_state, observe, set_state, success; see"),
        ("own_task:NoHertz", "lacks control_hz; see"),
        ("own_task:Nameless", "env_name 'fibopolicy/Reach-v0', which names another; give self.task_id there"),
    ],
)
def test_what_is_no_task_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        make(name)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("here")
def test_an_option_that_it_does_not_take_is_told() -> None:
    with pytest.raises(UserError, match=r"own_task:High: .*'sise'"):
        make("own_task:High", sise=3)
