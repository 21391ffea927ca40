"""A policy that robomimic trained acts here as in robomimic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from robomimic_rollout import is_0_5, needs_0_5, observed, rollout_policy

from fibopolicy import load
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.evaluate import evaluate_run as evaluate
from fibopolicy.policies.base import PolicyConfig, Shapes
from fibopolicy.policies.run_directory import load_policy, resolve_run
from fibopolicy.robomimic.checkpoint import read_checkpoint
from fibopolicy.robomimic.export import export
from fibopolicy.robomimic.imported import ImportedPolicy
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.encoders import camera_encoders
from fibopolicy.training.trainer import train

Save = Callable[..., Path]
SEEN = Shapes({"front_image": (24, 24)}, {"hand": 3, "cube": 4}, 5)
TINY = {
    "encoder": "fibottention_vit_tiny",
    "encoder_options": {"width": 12, "depth": 1, "num_heads": 2},
    "feature_dimension": 8,
}


def ours(config: Any) -> None:
    config.observation.encoder.rgb.core_class = "FibopolicyEncoder"
    config.observation.encoder.rgb.core_kwargs = TINY


def gaussian(config: Any) -> None:
    config.algo.gaussian.enabled = True


def mixture(config: Any) -> None:
    config.algo.gmm.enabled = True


def one_mode(config: Any) -> None:
    config.algo.gmm.enabled, config.algo.gmm.num_modes = True, 1


def rnn(config: Any) -> None:
    config.algo.rnn.enabled, config.algo.rnn.horizon, config.algo.rnn.hidden_dim = True, 3, 8


def gru(config: Any) -> None:
    rnn(config)
    config.algo.rnn.rnn_type = "GRU"


def open_loop(config: Any) -> None:
    rnn(config)
    config.algo.rnn.open_loop = True


def transformer(config: Any) -> None:
    config.algo.transformer.update(
        enabled=True, context_length=4, embed_dim=16, num_layers=1, num_heads=2
    )
    config.train.frame_stack = 4


def future(config: Any) -> None:
    config.algo.transformer.update(supervise_all_steps=True, pred_future_acs=True)


def both(*edits: Callable[[Any], object]) -> Callable[[Any], None]:
    def edit(config: Any) -> None:
        for one in edits:
            one(config)

    return edit


def frames(
    rows: int, steps: int, generator: np.random.Generator
) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Observations of `rows` episodes at `steps` instants."""
    return [
        {
            "front_image": generator.integers(0, 256, (rows, 24, 24, 3), dtype=np.uint8),
            "hand": generator.normal(size=(rows, 3)).astype(np.float32),
            "cube": generator.normal(size=(rows, 4)).astype(np.float32),
        }
        for _ in range(steps)
    ]


def window(seen: list[dict[str, Any]], t: int, n_obs_steps: int) -> dict[str, torch.Tensor]:
    picked = [seen[max(0, i)] for i in range(t - n_obs_steps + 1, t + 1)]
    return {key: torch.from_numpy(np.stack([o[key] for o in picked], axis=1)) for key in picked[0]}


@pytest.mark.parametrize(
    ("edit", "normalised", "tolerance"),
    [
        (lambda config: None, True, 1e-6),
        (gaussian, True, 1e-6),
        (one_mode, True, 1e-3),  # drawn with a deviation of 1e-4
        (rnn, True, 1e-6),
        (gru, True, 1e-6),
        (open_loop, True, 1e-6),
        (both(rnn, one_mode), True, 1e-3),
        (transformer, False, 1e-6),  # robomimic cannot normalise stacked observations
        (both(transformer, one_mode), False, 1e-3),
        pytest.param(both(transformer, future), False, 1e-6, marks=needs_0_5),
    ],
    ids=[
        "bc",
        "gaussian",
        "gmm",
        "rnn",
        "gru",
        "rnn_open_loop",
        "rnn_gmm",
        "transformer",
        "transformer_gmm",
        "transformer_future",
    ],
)
def test_actions_are_those_of_robomimics_own_rollout(
    edit: Any, normalised: bool, tolerance: float, save: Save
) -> None:
    mean, std = ("offset", "scale") if is_0_5() else ("mean", "std")
    statistics = {
        key: {
            mean: np.full((1, *shape), 0.2 * (key in SEEN.vectors), dtype=np.float32),
            std: np.full((1, *shape), 1.7, dtype=np.float32),
        }
        for key, shape in {"front_image": (3, 24, 24), "hand": (3,), "cube": (4,)}.items()
    }
    path = save(both(ours, edit), SEEN, statistics if normalised else None)
    policy = ImportedPolicy(read_checkpoint(path))
    n_obs_steps, theirs = policy.config.n_obs_steps, rollout_policy(path)
    if is_0_5() and normalised:
        # Its training normalises images in [0, 1], (3, H, W); its rollouts normalise
        # images in [0, 255], (H, W, 3), and fail on what its training stored.
        image = theirs.obs_normalization_stats["front_image"]
        for name, value in image.items():
            image[name] = value[..., 0, 0]  # (1, 3)
    seen = frames(2, 8, np.random.default_rng(0))
    mine, state = [], None
    for t in range(8):
        actions, state = policy.act(window(seen, t, n_obs_steps), state)
        mine.append(actions[:, 0])
    for row in range(2):  # theirs runs one episode after the other
        theirs.start_episode()
        for t in range(8):
            steps = window(seen, t, n_obs_steps)
            obs = observed(steps, row, SEEN.images, stacked=n_obs_steps > 1)
            np.testing.assert_allclose(mine[t][row].numpy(), theirs(obs), atol=tolerance)


def taken(state: Any, row: int) -> Any:
    if isinstance(state, torch.Tensor):
        return state[row : row + 1]
    return (
        {k: taken(v, row) for k, v in state.items()}
        if isinstance(state, dict)
        else tuple(taken(v, row) for v in state)
    )


def joined(*states: Any) -> Any:
    first = states[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(states)
    if isinstance(first, dict):
        return {key: joined(*(state[key] for state in states)) for key in first}
    return tuple(joined(*parts) for parts in zip(*states, strict=True))


@pytest.mark.parametrize(
    "edit",
    [
        both(rnn, lambda c: c.algo.gmm.update(enabled=True)),
        lambda c: c.algo.vae.update(enabled=True),
    ],
    ids=["rnn_gmm", "vae"],
)
def test_an_episode_does_not_depend_on_other_episodes(edit: Any, save: Save) -> None:
    policy = ImportedPolicy(read_checkpoint(save(both(ours, edit), SEEN)))
    seen = frames(3, 7, np.random.default_rng(1))

    def act(rows: list[int], t: int, state: Any) -> Any:
        return policy.act({key: value[rows] for key, value in window(seen, t, 1).items()}, state)

    alone, state = [], None
    for t in range(5):
        actions, state = act([1], t, state)
        alone.append(actions[0])
    together, states = [], None
    _, late = act([2], 0, None)
    # episode 0 is replaced by episode 2, which is at another step, after two steps
    for t in range(5):
        if t == 2:
            states = joined(late, taken(states, 1))
        rows = [0, 1] if t < 2 else [2, 1]
        torch.rand(5)
        actions, states = act(rows, t, states)
        together.append(actions[1])
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))


def test_published_weights_are_not_fetched_for_a_checkpoint(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(shapes=SEEN)  # ResNet-18, robomimic's default
    contents = torch.load(path, weights_only=True)
    config = json.loads(contents["config"])
    config["observation"]["encoder"]["rgb"]["core_kwargs"]["backbone_kwargs"] = {"pretrained": True}
    torch.save({**contents, "config": json.dumps(config)}, path)
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("tried to download")
    )
    assert ImportedPolicy(read_checkpoint(path)).shapes.images == {"front_image": (24, 24)}


@pytest.mark.parametrize("algo", ["bcq", "cql", "iql", "td3_bc"])
def test_other_algorithms_without_memory_act(algo: str, save: Save) -> None:
    policy = ImportedPolicy(read_checkpoint(save(algo=algo)))
    obs = {"hand": torch.rand(2, 1, 3), "cube": torch.rand(2, 1, 4)}
    first, state = policy.act(obs)
    again, _ = policy.act({key: value[1:] for key, value in obs.items()})
    assert first.shape == (2, 1, 5)
    assert state["rng"]["step"].tolist() == [1, 1]
    torch.testing.assert_close(first[1:], again)


def test_lifts_object_has_the_signs_of_the_training_before_robosuite_1_5(save: Save) -> None:
    checkpoint = read_checkpoint(save(shapes=Shapes({}, {"object": 10}, 7)))
    vector = torch.rand(1, 1, 10)
    turned = torch.cat([vector[..., :7], -vector[..., 7:]], dim=-1)
    for version, expected in (("1.5.2", vector), ("1.4.1", turned), (None, turned)):
        old = replace(checkpoint, env_metadata={**checkpoint.env_metadata, "env_version": version})
        policy, reference = ImportedPolicy(old), ImportedPolicy(checkpoint)
        torch.testing.assert_close(
            policy.act({"object": vector})[0], reference.act({"object": expected})[0]
        )
    with pytest.raises(UserError, match="another robot, task or simulator version"):
        ImportedPolicy(checkpoint).act({"object": vector[..., :9]})


def test_a_checkpoint_gets_a_run_directory_beside_it(save: Save, tmp_path: Path) -> None:
    path = save(ours, SEEN)
    run = resolve_run(path)
    assert run == tmp_path / "model_epoch_20_evaluation"
    assert resolve_run(path) == run
    assert resolve_run(run) == run
    loaded = load_policy(run)
    assert loaded.step == 20 * 100
    assert loaded.env_args["env_kwargs"]["horizon"] == 123
    document = json.loads((run / "config.json").read_text())
    assert document["policy"]["encoder"] == "fibottention_vit_tiny"
    save(both(ours, gaussian), SEEN)
    with pytest.raises(UserError, match=r"evaluation of another model_epoch_20\.pth"):
        resolve_run(path)


@pytest.mark.parametrize("edit", [rnn, both(rnn, mixture), transformer])
def test_a_checkpoint_acts_on_a_robot(edit: Any, save: Save) -> None:
    runner = load(save(both(ours, edit), SEEN), device="cpu")
    seen, state = frames(1, 5, np.random.default_rng(0)), None
    for t, obs in enumerate(seen):
        action = runner.act({key: value[0] for key, value in obs.items()})
        expected, state = runner.policy.act(window(seen, t, runner.n_obs_steps), state)
        np.testing.assert_array_equal(action, expected[0, 0].numpy())


def test_the_encoders_of_a_checkpoint_are_found_if_they_are_ours(save: Save) -> None:
    with_our_core = ImportedPolicy(read_checkpoint(save(ours, SEEN)))
    assert list(camera_encoders(with_our_core)) == ["front_image"]
    assert camera_encoders(ImportedPolicy(read_checkpoint(save(shapes=SEEN)))) == {}


@pytest.mark.slow
def test_a_checkpoint_of_the_command_is_evaluated_in_robosuite(
    demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("robosuite")
    document = {
        "algo_name": "bc",
        "experiment": {
            "name": "lift",
            "epoch_every_n_steps": 2,
            "save": {"every_n_epochs": 1},
            "rollout": {"horizon": 6},
        },
        "train": {"batch_size": 2, "num_epochs": 1, "cuda": False, "seq_length": 3},
        "algo": {
            "gmm": {"enabled": True},
            "rnn": {"enabled": True, "horizon": 3, "hidden_dim": 16},
            "actor_layer_dims": [16],
        },
        "observation": {
            "modalities": {
                "obs": {"low_dim": ["robot0_eef_pos", "object"], "rgb": ["agentview_image"]}
            },
            "encoder": {"rgb": {"core_class": "FibopolicyEncoder", "core_kwargs": TINY}},
        },
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(document))
    line = f"robomimic train --config {config} --dataset {demos} --out {tmp_path}"
    assert call(monkeypatch, capsys, *line.split())[0] == 0
    (checkpoint,) = (tmp_path / "lift").glob("*/models/*.pth")
    line = f"evaluate {checkpoint} --episodes 1 --video 0 --quality fast --workers 1"
    code, _, error = call(monkeypatch, capsys, *line.split())
    assert code == 0, error
    rows = (
        (checkpoint.parent / "model_epoch_1_evaluation" / "episodes.jsonl").read_text().splitlines()
    )
    assert [json.loads(row)["steps"] for row in rows] == [6]


def test_an_exported_run_rolls_out_as_the_run_does(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    policy = PolicyConfig(
        policy="bc_rnn_gmm",
        policy_options={"hidden_dim": 16},
        encoder_options=TINY["encoder_options"],
        hidden=16,
    )
    run = tmp_path / "run"
    train(
        replace(
            tiny_config,
            out=run,
            policy=policy,
            optimizer=OptimizerConfig(steps=2, batch_size=4, warmup_steps=1),
        )
    )
    done = [
        evaluate(EvaluateConfig(run=directory, episodes=2, video=0, max_steps=12, workers=1))
        for directory in (run, resolve_run(export(run, tmp_path / "exported.pth")))
    ]
    of_run, of_checkpoint = (
        [(row.init_state, row.steps, row.total_reward) for row in evaluation.rows]
        for evaluation in done
    )
    assert of_run == of_checkpoint
