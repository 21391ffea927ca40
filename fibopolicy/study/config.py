"""One study as a value: tasks x encoders x heads x regimes x training seeds, and what
all of them share.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fibopolicy.envs import resolve
from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import OptimizerConfig
from fibopolicy.utils.files import expanded
from fibopolicy.utils.imports import is_import_path

Option = int | float | bool | str

#: How an encoder gets its weights.
REGIMES = ("scratch", "fine-tune", "frozen")
#: What may be set for all runs of a study or for those of one head; and the options
#: among these with a place of their own.
_CONFIGURED = {
    "policy": (
        PolicyConfig,
        {"head": "its heads", "encoder": "its encoders", "encoder_options": "its encoders"},
    ),
    "optimizer": (OptimizerConfig, {"steps": "its steps"}),
}


@dataclass(frozen=True)
class StudyTask:
    """A task and its demonstrations.

    Args:
        task: its id, or short: "Lift-v0"; or "module:class" of your own.
        dataset: a robomimic HDF5 file, in a study's file relative to that; `None`
            collects `demos` episodes of the task's scripted expert into the study.
        demos: how many to collect.
        cameras: that the policy sees, e.g. "wrist"; all of the task's or the file's by
            default.
        image_size, quality: of what is collected; a file has its own.
        collect_seed: of the collection.
        filter_key: the demonstrations to train on; "train" by default, where the file
            has it.
        horizon: control steps until an evaluated episode is given up; the task's by
            default.
    """

    task: str
    dataset: Path | None = None
    demos: int = 400
    cameras: tuple[str, ...] | None = None
    image_size: int = 84
    quality: str = "fast"
    collect_seed: int = 0
    filter_key: str | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", resolve(self.task))
        if self.dataset is not None:
            object.__setattr__(self, "dataset", expanded(self.dataset).absolute())
        if self.cameras is not None:
            object.__setattr__(self, "cameras", _several(self.cameras, f"cameras of {self.task}:"))
        if self.horizon is not None and self.horizon < 1:
            raise UserError(
                f"{self.task}: horizon must be at least 1 control step, got {self.horizon}"
            )
        if self.demos < 1 or self.image_size < 1:
            raise UserError(
                f"{self.task}: demos and image_size must be at least 1, got {self.demos} and"
                f" {self.image_size}"
            )

    @property
    def short(self) -> str:
        """The task's name in names of cells and files: "lift" of "fibopolicy/Lift-v0",
        "robosuite-Lift", "my_reach-Far".
        """
        if is_import_path(self.task):
            return self.task.replace(":", "-")
        suite, _, name = self.task.partition("/")
        bare = re.sub(r"-v\d+$", "", name)
        return bare.lower() if suite == "fibopolicy" else f"{suite}-{bare}"


@dataclass(frozen=True)
class StudyEncoder:
    """An encoder under a name of its own.

    Args:
        encoder: what `build_encoder` takes: a registered name, "timm:<name>", or
            "module:function".
        options: its options.
        weights: what it starts from in the regimes "fine-tune" and "frozen": a run
            directory, or a file of an encoder's weights, in a study's file relative to
            that. A timm model may have its published weights instead, with the option
            `pretrained`, which "scratch" ignores.
        name: what the study calls it; the encoder's by default. Two entries of one
            encoder need two names.
    """

    encoder: str
    options: Mapping[str, Option] = field(default_factory=dict)
    weights: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.encoder)
        if self.weights is not None:
            object.__setattr__(self, "weights", expanded(self.weights).absolute())
        object.__setattr__(self, "options", dict(self.options))


def _check_options(given: StudyConfig | StudyHead, where: str) -> None:
    """Raise `UserError` for an option of policy or optimiser that does not exist or
    that has a place of its own.
    """
    for kind, (config, placed) in _CONFIGURED.items():
        known = [item.name for item in dataclasses.fields(config) if item.name not in placed]
        for option in getattr(given, kind):
            if option in placed:
                raise UserError(
                    f"{where}: {kind} option {option} follows from the study, from"
                    f" {placed[option]}; set it there"
                )
            if option not in known:
                raise unknown(f"{kind} option of {where}:", option, known)


@dataclass(frozen=True)
class StudyHead:
    """A policy head with settings of its own, under a name of its own.

    Args:
        head: what `PolicyConfig.head` takes.
        policy: options of `PolicyConfig` for its runs, e.g. `{"horizon": 8,
            "head_options": {"min_std": 0.05}}`. Each replaces the study's,
            `head_options` as a whole.
        optimizer: options of `OptimizerConfig` beside `steps`, likewise.
        steps: gradient steps of its runs; the study's by default.
        name: what the study calls it; the head's by default. Two entries of one head
            need two names.
    """

    head: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.head)
        for kind in _CONFIGURED:
            object.__setattr__(self, kind, dict(getattr(self, kind)))
        _check_options(self, f"head {self.name}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"head {self.name}: steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides a study's rows.

    Each task is a `StudyTask` or its id, each encoder a `StudyEncoder` or its name,
    each head a `StudyHead` or its name.

    Args:
        name: of the study.
        tasks, encoders, heads, regimes, seeds: the grid; each combination is trained
            and evaluated once.
        control: the encoder that the others are compared with; the first whose name has
            no pattern in it ("vit_*"), else the first of all.
        steps: gradient steps of every run whose head names none.
        optimizer: options of `OptimizerConfig` beside `steps`, for every run.
        policy: options of `PolicyConfig` beside the encoder and the head, for every
            run, e.g. `{"views": "joint"}`.
        episodes: start states that every run is measured on.
        starts_seed: of the set of start states.
        margin: how much lower a success rate may be and still count as not inferior.
        expected_rate: the success rate to expect, for the number of start states that
            the margin needs.
        videos: start states that are filmed for each run, from the first.
        threads: of torch in each run. Another number gives other last bits, and so
            other weights and rows, which is why it belongs to the study and not to the
            machine.
        device: "cpu", "cuda", ...; by default a GPU where there is one.
    """

    name: str
    tasks: tuple[StudyTask, ...]
    encoders: tuple[StudyEncoder, ...]
    heads: tuple[StudyHead, ...] = (StudyHead("bc"),)
    regimes: tuple[str, ...] = ("scratch",)
    seeds: tuple[int, ...] = (0, 1, 2)
    control: str = ""
    steps: int = 1000
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 100
    starts_seed: int = 0
    margin: float = 0.05
    expected_rate: float = 0.85
    videos: int = 6
    threads: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        tasks = tuple(
            StudyTask(t) if isinstance(t, str) else t
            for t in _several(self.tasks, "tasks of a study:")
        )
        encoders = tuple(
            StudyEncoder(e) if isinstance(e, str) else e
            for e in _several(self.encoders, "encoders of a study:")
        )
        heads = tuple(
            StudyHead(h) if isinstance(h, str) else h
            for h in _several(self.heads, "heads of a study:")
        )
        settings: dict[str, Any] = {"tasks": tasks, "encoders": encoders, "heads": heads}
        settings |= {
            name: _several(getattr(self, name), f"{name} of a study:")
            for name in ("regimes", "seeds")
        }
        settings |= {kind: dict(getattr(self, kind)) for kind in _CONFIGURED}
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        self._check_grid()
        _check_options(self, f"study {self.name}")
        for name in ("steps", "episodes", "threads"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"study {self.name}: {name} must be at least 1, got {getattr(self, name)}"
                )
        self._check_values()
        if not 0 < self.margin < 1 or not 0 < self.expected_rate < 1:
            raise UserError(
                f"study {self.name}: margin and expected_rate are shares of the episodes, between 0"
                f" and 1, got {self.margin} and {self.expected_rate}"
            )
        if self.videos < 0 or self.starts_seed < 0:
            raise UserError(
                f"study {self.name}: videos and starts_seed must be at least 0, got {self.videos}"
                f" and {self.starts_seed}"
            )

    def _check_grid(self) -> None:
        names = {
            "tasks": [task.short for task in self.tasks],
            "encoders": [encoder.name for encoder in self.encoders],
            "heads": [head.name for head in self.heads],
            **{kind: list(getattr(self, kind)) for kind in ("regimes", "seeds")},
        }
        for kind, found in names.items():
            if repeated := sorted({str(name) for name in found if found.count(name) > 1}):
                raise UserError(
                    f"study {self.name}: {', '.join(repeated)} stands twice among its {kind}; name"
                    " each once"
                )
        for regime in self.regimes:
            if regime not in REGIMES:
                raise unknown("regime", regime, REGIMES)
            for encoder in self.encoders:
                if (
                    regime != "scratch"
                    and encoder.weights is None
                    and not encoder.options.get("pretrained")
                ):
                    raise UserError(
                        f"study {self.name}: regime {regime!r} needs weights to start from, and"
                        f" encoder {encoder.name} has none; give its StudyEncoder weights=, or a"
                        " timm model the option pretrained"
                    )
        if any(not isinstance(seed, int) or seed < 0 for seed in self.seeds):
            raise UserError(f"study {self.name}: seeds are integers from 0, got {self.seeds}")
        if not self.control:
            plain = [name for name in names["encoders"] if str(name).startswith("vit_")]
            object.__setattr__(self, "control", (plain or names["encoders"])[0])
        if self.control not in names["encoders"]:
            raise unknown("encoder as the control", self.control, map(str, names["encoders"]))

    def _check_values(self) -> None:
        """Build every head's settings, since what one head takes may be out of range
        for another.
        """
        for head in self.heads:
            try:
                self.optimizer_config(head)
                PolicyConfig(head=head.head, **self.policy_options(head))
            except (UserError, TypeError) as error:
                told = {**self.optimizer, **head.optimizer, **self.policy_options(head)}
                given = f" (given {told})" if isinstance(error, TypeError) else ""
                raise UserError(f"study {self.name}, head {head.name}: {error}{given}") from error

    def policy_options(self, head: StudyHead) -> dict[str, Any]:
        """Options of `PolicyConfig` for the runs of a head, its own over the study's."""
        return {**self.policy, **head.policy}

    def optimizer_config(self, head: StudyHead) -> OptimizerConfig:
        """What the runs of a head are optimised with.

        Raises:
            UserError: a value is out of range.
        """
        steps = self.steps if head.steps is None else head.steps
        return OptimizerConfig(steps=steps, **{**self.optimizer, **head.optimizer})


def _several(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(
            f"{name} expected a sequence, got {value!r}; for one alone write ({value!r},)"
        )
    if not (found := tuple(value)):
        raise UserError(f"{name} expected at least one, got none")
    return found


def to_json(config: StudyConfig) -> dict[str, Any]:
    """The configuration as plain JSON; `from_json` reads it back."""
    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return document


def from_json(document: Mapping[str, Any]) -> StudyConfig:
    """Read back what `to_json` wrote; what it does not know, such as versions, is left
    out.

    Raises:
        UserError: a value is out of range.
    """
    known = {item.name for item in dataclasses.fields(StudyConfig)}
    values = {name: value for name, value in document.items() if name in known}
    values["tasks"] = tuple(StudyTask(**task) for task in document["tasks"])
    values["encoders"] = tuple(StudyEncoder(**encoder) for encoder in document["encoders"])
    # Heads were names alone before they could have settings.
    values["heads"] = tuple(
        head if isinstance(head, str) else StudyHead(**head) for head in document["heads"]
    )
    return StudyConfig(**values)
