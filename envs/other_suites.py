"""Tasks of simulators that fibopolicy does not run: whose a name is, and which task
names it can make.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Suite -> what the `env_name` of its files matches.
OTHER_SUITES: Mapping[str, re.Pattern[str]] = {
    "MimicGen": re.compile(r"\w+_[DO]\d"),
    "DexMimicGen": re.compile(
        r"TwoArm(Threading|ThreePieceAssembly|LiftTray|BoxCleanup|DrawerCleanup|Pouring|Coffee|CanSort\w*)"
    ),
    "LIBERO": re.compile(r"Libero_\w+", re.IGNORECASE),
    "RoboCasa": re.compile(
        r"PnP\w+To\w+|(Open|Close)(Single|Double)?(Door|Drawer)|Turn(On|Off)(Microwave|Stove|SinkFaucet)|TurnSinkSpout"
        r"|Coffee(SetupMug|ServeMug|PressButton)|NavigateKitchen"
    ),
    "Isaac Lab": re.compile(r"Isaac-.+"),
}
#: Suite -> entries of `env_kwargs` that only its files have.
_MARKS: Mapping[str, frozenset[str]] = {
    "LIBERO": frozenset({"bddl_file_name"}),
    "RoboCasa": frozenset({"layout_ids", "style_ids", "layout_and_style_ids", "obj_registries"}),
}
#: Tasks of robosuite 1.5, without importing it.
# fmt: off
ROBOSUITE_NAMES = frozenset({
    "Door", "Lift", "NutAssembly", "NutAssemblyRound", "NutAssemblySingle", "NutAssemblySquare", "PickPlace", "PickPlaceBread",  # noqa: E501
    "PickPlaceCan", "PickPlaceCereal", "PickPlaceMilk", "PickPlaceSingle", "Stack", "ToolHang", "TwoArmHandover", "TwoArmLift",  # noqa: E501
    "TwoArmPegInHole", "TwoArmTransport", "Wipe",
})
# fmt: on


def other_suite(name: str, kwargs: Mapping[str, Any] | None = None) -> str | None:
    """The suite, among those that fibopolicy does not run, that a task belongs to;
    `None` where it is none of theirs.

    Args:
        name: the task's name, with or without "robosuite/".
        kwargs: the `env_kwargs` of a dataset, where there are any.
    """
    if name in ROBOSUITE_NAMES:
        return None
    for suite, marks in _MARKS.items():
        if marks & (kwargs or {}).keys():
            return suite
    short = name.removeprefix("robosuite/")
    return next(
        (suite for suite, pattern in OTHER_SUITES.items() if pattern.fullmatch(short)), None
    )


def of_other_suite(name: str, suite: str) -> str:
    """One line that says whose task it is and what to do."""
    return (
        f"task {name!r} is {suite}'s, which fibopolicy does not run: training on its data works,"
        f" but to roll the policy out call its method act in {suite}'s simulator, or write"
        " <module>:<class> of a TaskEnv of yours as env_name into the env_args"
    )
