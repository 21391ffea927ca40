"""What is checked before a study starts: that its cells differ in what it names and in
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fibopolicy.encoders.base import encoder_settings
from fibopolicy.errors import UserError
from fibopolicy.statistics.power import episodes_needed
from fibopolicy.study.built import Built
from fibopolicy.study.cells import cells, train_config
from fibopolicy.study.config import StudyConfig, StudyHead

#: What each part of the grid sets in a run's configuration. A head also brings settings
#: of its own, where the study has none, and what its `StudyHead` sets.
NAMED = {
    "encoder": ("policy.encoder", "policy.encoder_options", "encoder_weights"),
    "head": (
        "policy.head",
        *(
            f"policy.{name}"
            for name in (
                "n_obs_steps",
                "horizon",
                "n_action_steps",
                "hidden",
                "layers",
                "action_normalization",
            )
        ),
    ),
    "regime": ("policy.encoder_options", "encoder_weights", "freeze_encoder"),
    "task": ("dataset", "cameras", "filter_key"),
    "seed": ("seed",),
    "place": ("out",),
}
#: Encoders whose numbers of parameters differ by no more than this share count as
#: matched.
MATCHED = 0.01
#: How alike the outcomes of two encoders on the same start state are assumed to be
#: before there are any; the report has what they were. A smaller one needs more start
#: states.
CORRELATION = 0.3


def check(config: StudyConfig, built: Sequence[Built]) -> tuple[list[str], list[str]]:
    """What to tell, and what to warn of.

    Raises:
        UserError: cells differ in something that the study does not name.
    """
    return [*differences(config), *heads(config), *encoders(config), *sizes(config, built)], [
        *power(config)
    ]


def differences(config: StudyConfig) -> list[str]:
    """In what the configurations of the runs differ, with the part of the grid that is
    behind it.
    """
    every = [
        flat(
            asdict(
                train_config(
                    config,
                    cell,
                    seed,
                    cell.task.dataset or Path(cell.task.short),
                    Path(cell.name) / str(seed),
                )
            )
        )
        for cell in cells(config)
        for seed in config.seeds
    ]
    keys = dict.fromkeys(key for document in every for key in document)
    values = {key: {repr(document.get(key)) for document in every} for key in keys}
    differing = [key for key, found in values.items() if len(found) > 1]
    names = NAMED | {
        "head": (*NAMED["head"], *(key for head in config.heads for key in own_settings(head)))
    }
    parts: dict[str, list[str]] = {}
    for key in differing:
        part = next(
            (
                part
                for part, named in names.items()
                if any(key == n or key.startswith(f"{n}.") for n in named)
            ),
            None,
        )
        if part is None:
            raise UserError(
                f"study {config.name}: its cells differ in {key}, which no part of the grid names;"
                " set it for all"
            )
        parts.setdefault(part, []).append(key)
    told = "; ".join(f"{part}: {', '.join(found)}" for part, found in parts.items())
    alike = len(keys) - len(differing)
    return [
        f"runs differ in {told}",
        (
            f"the other {alike} settings of policy, optimiser and data are equal in all"
            f" {len(every)} runs"
        ),
    ]


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def own_settings(head: StudyHead) -> dict[str, Any]:
    """What a head's runs have of their own, under the names of a run's configuration:
    `policy.horizon`, `optimizer.steps`.
    """
    steps = {} if head.steps is None else {"optimizer.steps": head.steps}
    kinds = {"policy": head.policy, "optimizer": head.optimizer}
    return {
        f"{kind}.{name}": value for kind, given in kinds.items() for name, value in given.items()
    } | steps


def heads(config: StudyConfig) -> list[str]:
    """What the study sets for the runs of one head alone."""
    told = []
    for head in config.heads:
        if settings := flat(own_settings(head)):
            told.append(
                f"head {head.name} has"
                f" {', '.join(f'{name} {value}' for name, value in settings.items())}"
            )
    return told


def encoders(config: StudyConfig) -> list[str]:
    """How each encoder's own settings differ from the control's."""
    control = next(encoder for encoder in config.encoders if encoder.name == config.control)
    ours = encoder_settings(control.encoder, **control.options)
    told = []
    for encoder in config.encoders:
        if encoder is control:
            continue
        theirs = encoder_settings(encoder.encoder, **encoder.options)
        if theirs.keys() == ours.keys():
            changes = [
                f"{key} {theirs[key]} instead of {ours[key]}"
                for key in ours
                if theirs[key] != ours[key]
            ]
            told.append(
                f"encoder {encoder.name} is {control.name} with"
                f" {', '.join(changes) or 'no change at all'}"
            )
        else:
            own = ", ".join(
                f"{key} {value}"
                for key, value in theirs.items()
                if key not in ("pretrained", "num_views")
            )
            told.append(
                f"encoder {encoder.name} is another network than {control.name}, with pooling of"
                f" its own ({own or 'no options'})"
            )
    return told


def sizes(config: StudyConfig, built: Sequence[Built]) -> list[str]:
    """Whether the encoders of a task have as many parameters as the control, head by
    head where heads see it differently.
    """
    told = []
    for task in config.tasks:
        lines: dict[str, list[str]] = {}
        for head in config.heads:
            of_task = {
                b.cell.encoder.name: b.encoder_parameters
                for b in built
                if (b.cell.task, b.cell.head) == (task, head)
            }
            ours = of_task[config.control]
            others = {
                name: number
                for name, number in of_task.items()
                if abs(number - ours) > MATCHED * ours
            }
            line = f"encoders have {ours:,} parameters"
            if others:
                line += ", but " + ", ".join(
                    f"{name} {number:,} ({number / ours:.2f}x)" for name, number in others.items()
                )
            lines.setdefault(line, []).append(head.name)
        for line, names in lines.items():
            where = [task.short, *names] if len(lines) > 1 else [task.short]
            told.append(f"{', '.join(where)}: {line}")
    return told


def power(config: StudyConfig) -> list[str]:
    """A warning where the start states are too few to tell a difference as large as the margin."""
    if len(config.encoders) < 2:
        return []
    rate = config.expected_rate
    low = max(rate - config.margin, 0.0)
    needed = episodes_needed(rate, low, correlation=CORRELATION)
    have = config.episodes * len(config.seeds)
    if needed is not None and have >= needed:
        return []
    enough = "more than 20,000" if needed is None else f"{needed}"
    seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) != 1)}"
    each = (
        ""
        if needed is None
        else f"; {-(-needed // len(config.seeds))} episodes for each of {seeds} would do"
    )
    return [
        f"{have} episodes a cell ({config.episodes} start states x {seeds}) are few for a margin of"
        f" {config.margin:g}: to tell {rate:.2f} from {low:.2f} with 80 % power takes"
        f" {enough}{each}, and more where seeds differ"
    ]
