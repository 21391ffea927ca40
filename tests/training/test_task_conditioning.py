"""One policy for several tasks, conditioned on the task."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from command import call

from fibopolicy import load
from fibopolicy.datasets import DemoWriter
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.evaluation.profile import profile_act
from fibopolicy.policies import PolicyConfig, Shapes, build_policy
from fibopolicy.robomimic.export import export
from fibopolicy.training import OptimizerConfig, TrainConfig, optim
from fibopolicy.training.config import RolloutConfig
from fibopolicy.training.data import open_dataset
from fibopolicy.training.trainer import train

HERE = {"hand": np.array([0.1, 0.2, 0.3], np.float32)}


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Demonstrations that only their instruction tells apart: where to move the hand."""
    path = tmp_path_factory.mktemp("data") / "robot.hdf5"
    where = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    with DemoWriter(path, {}) as writer:
        for instruction, target in (("to the left", -0.5), ("to the right", 0.5)):
            actions = np.full((20, 2), target, np.float32)
            actions[0] = -1.0, 1.0  # so that the range of the actions is that of a robot
            attrs = {"language_instruction": instruction}
            writer.add({"hand": where}, actions, None, None, None, attrs=attrs)
    return TrainConfig(
        path,
        Path("replace-me"),
        cameras=(),
        vectors=("hand",),
        task_embedding="learned",
        policy=PolicyConfig(hidden=32, horizon=1, n_action_steps=1),
        optimizer=OptimizerConfig(steps=80, batch_size=16, lr=3e-3, warmup_steps=5, ema=0.9),
    )


def test_only_a_policy_that_knows_the_task_can_do_both(
    instructed: TrainConfig, tmp_path: Path
) -> None:
    config = replace(instructed, out=tmp_path / "run")
    train(config)
    for task, target in (("to the left", -0.5), ("to the right", 0.5)):
        np.testing.assert_allclose(load(config.out, task=task).act(HERE), [target] * 2, atol=0.1)
    with pytest.raises(UserError, match="did you mean 'to the left'"):
        load(config.out, task="to the lift")
    with pytest.raises(UserError, match=r"does not know which one.*to the left, to the right"):
        load(config.out)
    assert profile_act(config.out, turns=2).calls == 2

    blind = replace(config, task_embedding=None, out=tmp_path / "blind")
    train(blind)
    with pytest.raises(UserError, match="is not conditioned on a task"):
        load(blind.out, task="to the left")
    document = json.loads((blind.out / "config.json").read_text())
    assert "task_env_args" not in document
    assert not document["shapes"].keys() & {"tasks", "task_dim"}


def test_a_stored_embedding_stands_for_each_task_and_comes_with_the_weights(
    instructed: TrainConfig, tmp_path: Path
) -> None:
    embeddings = tmp_path / "sentences.npz"
    config = replace(instructed, out=tmp_path / "run", task_embedding=str(embeddings))
    with pytest.raises(UserError, match=r"sentences\.npz: is not an \.npz file with a vector"):
        open_dataset(config)
    for vectors, message in (
        ({"to the left": np.ones(5), "to the rigt": np.ones(5)}, "did you mean 'to the rigt'"),
        ({"to the left": np.ones(5), "to the right": np.ones(4)}, "all of one size, got shapes"),
        ({"to the left": np.ones(5), "to the right": np.full(5, np.nan)}, "expected a finite"),
    ):
        np.savez(embeddings, **vectors)
        with pytest.raises(UserError, match=message):
            open_dataset(config)

    random = np.random.default_rng(1)
    vectors = {name: random.normal(size=5) for name in ("to the left", "to the right", "unused")}
    np.savez(embeddings, **vectors)
    trained = train(config).policy
    embeddings.unlink()
    assert trained.shapes.tasks == ("to the left", "to the right")
    actions = load(config.out, task="to the right").act(HERE)
    np.testing.assert_allclose(actions, [0.5] * 2, atol=0.1)


def test_an_interrupted_run_resumes_to_the_same_weights(
    instructed: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(instructed, out=tmp_path / "whole", checkpoint_every=10)
    train(config)
    learning_rate = optim.learning_rate

    def interrupt(step: int, settings: OptimizerConfig) -> float:
        if step == 35:
            raise KeyboardInterrupt
        return learning_rate(step, settings)

    resumed = replace(config, out=tmp_path / "resumed")
    with monkeypatch.context() as patched:
        patched.setattr(optim, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(resumed)
    train(resumed, resume=True)
    whole, again = ((run.out / "ema.safetensors").read_bytes() for run in (config, resumed))
    assert whole == again
    with pytest.raises(UserError, match=r"another configuration: shapes\.tasks"):
        train(replace(resumed, task_embedding=None), resume=True)


def test_a_demo_that_names_no_task_is_refused(instructed: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "unnamed.hdf5"
    path.write_bytes(Path(instructed.files[0][0]).read_bytes())
    with h5py.File(path, "a") as file:
        del file["data/demo_1"].attrs["language_instruction"]
    config = replace(instructed, dataset=path)
    with pytest.raises(UserError, match=r"unnamed\.hdf5: demo_1 names no task"):
        open_dataset(config)
    assert len(open_dataset(replace(config, task_embedding=None))) == 40


@pytest.mark.parametrize("name", ["bc", "diffusion", "flow", "bc_gmm", "bc_rnn_gmm"])
def test_every_policy_acts_by_the_task(name: str) -> None:
    torch.manual_seed(0)
    config = PolicyConfig(policy=name, hidden=32)
    shapes = Shapes({}, {"hand": 3}, 2, tasks=("a", "b", "c"), task_dim=3)
    policy = build_policy(config, shapes).eval()
    obs = {"hand": torch.ones(2, config.n_obs_steps, 3)}

    def actions(*tasks: int) -> torch.Tensor:
        result: torch.Tensor = policy.act({**obs, "task_index": torch.tensor(tasks)})[0]
        return result

    mixed = actions(0, 2)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)
    policy.task_encoder.select("c")
    torch.testing.assert_close(policy.act(obs)[0][1], mixed[1])


def test_a_conditioned_policy_is_not_exported_to_robomimic(
    instructed: TrainConfig, tmp_path: Path
) -> None:
    policy = PolicyConfig(policy="bc_gmm", hidden=8)
    optimizer = replace(instructed.optimizer, steps=1)
    config = replace(instructed, out=tmp_path / "run", policy=policy, optimizer=optimizer)
    train(config)
    with pytest.raises(UserError, match="is conditioned on the task"):
        export(config.out, tmp_path / "policy.pth")


def test_a_policy_for_several_simulated_tasks_is_evaluated_on_each(
    instructed: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / f"{task}.hdf5" for task in ("push", "lift")]
    for path in files:
        collect(Plan(path.stem, cameras=()), 2, path, workers=1)
    run = tmp_path / "run"
    config = replace(
        instructed,
        dataset=tuple(files),
        vectors=None,
        out=run,
        optimizer=replace(instructed.optimizer, steps=4),
        rollouts=RolloutConfig(rollout_every=4, rollout_episodes=1),
    )
    train(config)
    evaluated = {row.task for row in read_rows(run / "rollouts/episodes.jsonl")}
    assert evaluated == {"fibopolicy/Lift-v0", "fibopolicy/Push-v0"}

    short = ("--episodes", "2", "--max-steps", "5", "--workers", "1", "--video", "0")
    code, out, error = call(monkeypatch, capsys, "evaluate", str(run), *short)
    assert code == 0, error
    assert re.search(
        r"fibopolicy/Push-v0 +0/2 .*\nall episodes +0/4 +0\.0 %  \[0\.0, 49\.0\] %\n"
        r"mean of 2 tasks: 0\.0 %",
        out,
    )
    rows = read_rows(run / "episodes.jsonl")
    assert [(row.task, row.index) for row in rows] == [
        (f"fibopolicy/{task}-v0", index) for task in ("Lift", "Push") for index in (0, 1)
    ]
    for path in ("init_seed0_fast_fibopolicy_Lift-v0.npz", "report_fibopolicy_Push-v0.html"):
        assert (run / path).is_file()
    code, out, _ = call(monkeypatch, capsys, "results", str(run))
    assert (code, out.count("0/2")) == (0, 2)

    for task, message in (
        ("fibopolicy/Lift-v1", "did you mean 'fibopolicy/Lift-v0'"),
        ("stack", r"unknown task 'fibopolicy/Stack-v0'.*known: fibopolicy/Lift-v0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_run(EvaluateConfig(run, 2, task=task, max_steps=5, workers=1, video=0))
