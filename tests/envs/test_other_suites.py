from __future__ import annotations

from typing import Any

import pytest

from fibopolicy.envs import from_env_args, make, resolve
from fibopolicy.envs.registry import ROBOSUITE_NAMES, is_known, other_suite, unavailable
from fibopolicy.errors import UserError


def env_args(name: str, kind: int = 1, **settings: Any) -> dict[str, Any]:
    return {"env_name": name, "type": kind, "env_kwargs": settings}


@pytest.mark.parametrize(
    ("task", "suite"),
    [
        (env_args("Coffee_D0"), "MimicGen"),
        (env_args("Square_D0"), "MimicGen"),
        (env_args("MugCleanup_O1"), "MimicGen"),
        (env_args("TwoArmPouring"), "DexMimicGen"),
        (env_args("PnPCounterToCab"), "RoboCasa"),
        (env_args("TurnOnMicrowave"), "RoboCasa"),
        (env_args("OpenDrawer"), "RoboCasa"),
        (env_args("ArrangeVegetables", layout_and_style_ids=[[1, 1]]), "RoboCasa"),
        (env_args("Isaac-Stack-Cube-Franka-IK-Rel-Mimic-v0", 2), "Isaac Lab"),
    ],
)
def test_a_task_of_another_suite_is_named_with_a_way_forward(
    task: dict[str, Any], suite: str
) -> None:
    assert not is_known(task)
    with pytest.raises(UserError) as caught:
        from_env_args(task)
    message = str(caught.value)
    assert message.startswith(f"task {task['env_name']!r} is {suite}'s")
    assert "call its `act` in" in message
    assert "did you mean" not in message
    assert "\n" not in message


@pytest.mark.parametrize("ask", [resolve, make, lambda name: make(f"robosuite/{name}")])
def test_a_name_of_another_suite_gets_no_suggestion(ask: Any) -> None:
    with pytest.raises(UserError, match="Coffee_D0' is MimicGen's"):
        ask("Coffee_D0")


def test_simulatable_tasks_are_known_without_a_simulator() -> None:
    assert all(other_suite(name) is None for name in ROBOSUITE_NAMES)
    for task in (
        env_args("Lift"),
        env_args("fibopolicy/Lift-v0", 2),
        env_args("metaworld/reach-v3", 2),
        env_args("mine:Task", 2),
    ):
        assert unavailable(task) is None
        assert is_known(task)
    assert not is_known(env_args("NoSuchTask"))  # which robosuite itself refuses
    assert not is_known({})
    assert "type 4" in str(unavailable(env_args("RealKitchen", 4)))


def test_the_task_names_are_those_of_the_installed_robosuite() -> None:
    base = pytest.importorskip("robosuite.environments.base", reason="robosuite is not installed")
    names = {name for name in base.REGISTERED_ENVS if not name.startswith(("Libero", "BDDL"))}
    assert names == ROBOSUITE_NAMES
