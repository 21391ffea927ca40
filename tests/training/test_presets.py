from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy import cli
from fibopolicy.errors import UserError
from fibopolicy.training.config import PRESETS, TrainConfig

DATA, RUN = Path("can.hdf5"), Path("runs/can")
COMMAND = ["train", "--dataset", str(DATA), "--out", str(RUN)]


def parsed(*arguments: str) -> TrainConfig:
    config: TrainConfig = cli.parse([*COMMAND, *arguments]).config
    return config


@pytest.mark.parametrize("name", PRESETS.names())
@pytest.mark.parametrize("form", ["--preset {}", "--preset={}"])
def test_the_command_line_gives_the_same_run_as_python(name: str, form: str) -> None:
    assert parsed(*form.format(name).split()) == PRESETS[name](DATA, RUN)


@pytest.mark.parametrize("order", [1, -1])
def test_other_options_override_a_preset_in_any_order(order: int) -> None:
    words = [["--preset", "released_robot"], ["--steps", "7", "--hidden", "64"]][::order]
    expected = PRESETS["released_robot"](DATA, RUN)
    changed = replace(
        expected,
        optimizer=replace(expected.optimizer, steps=7),
        policy=replace(expected.policy, hidden=64),
    )
    assert parsed(*words[0], *words[1]) == changed


def test_another_policy_uses_its_own_defaults() -> None:
    policy = parsed("--preset", "released_robot", "--policy", "bc").policy
    assert (
        policy.policy,
        policy.n_obs_steps,
        policy.horizon,
        policy.n_action_steps,
        policy.policy_options,
    ) == (
        "bc",
        1,
        8,
        4,
        {},
    )
    assert policy.encoder == "released_robot"
    assert (
        parsed(
            "--preset", "released_robot", "--temporal-ensemble-coeff", "0.01"
        ).policy.n_action_steps
        == 1
    )


def test_without_a_preset_nothing_changes_and_unknown_ones_are_named() -> None:
    assert parsed() == TrainConfig(DATA, RUN)
    with pytest.raises(UserError, match="did you mean 'released_robot'"):
        parsed("--preset", "released_robots")


def test_released_robot_is_the_authors_encoder_in_diffusion_policy() -> None:
    policy = PRESETS["released_robot"](DATA, RUN).policy
    assert (policy.policy, policy.encoder, policy.crop) == ("diffusion", "released_robot", 76)
    assert (
        policy.n_obs_steps,
        policy.horizon,
        policy.n_action_steps,
        policy.hidden,
        policy.layers,
    ) == (
        2,
        16,
        8,
        256,
        3,
    )
