"""The configuration of a study: tasks x encoders x policies x inits x training seeds,
and the settings that all runs share.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fibopolicy.envs import resolve
from fibopolicy.envs.perturbations import parse
from fibopolicy.errors import UserError, one_line, unknown
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.report.tables import counted, listed
from fibopolicy.statistics.sequential import LookPlan
from fibopolicy.training.config import OptimizerConfig
from fibopolicy.utils.files import expanded
from fibopolicy.utils.imports import is_import_path

Option = int | float | bool | str

#: How an encoder gets its weights.
INITS = ("scratch", "finetune", "frozen")
#: The options that a study or one of its policies may set, and those among them that
#: another part of the study sets.
_OPTIONS = {
    "policy_config": (
        PolicyConfig,
        {"policy": "its policies", "encoder": "its encoders", "encoder_options": "its encoders"},
    ),
    "optimizer": (OptimizerConfig, {"steps": "its steps"}),
}


def _several(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(
            f"{name} expected a sequence, got {value!r}; for a single value write ({value!r},)"
        )
    if not (found := tuple(value)):
        raise UserError(f"{name} expected at least one, got none")
    return found


def _set_options(config: Any, where: str) -> None:
    """Copy the options of policy and optimizer, and check that they exist."""
    for kind, (options_class, derived) in _OPTIONS.items():
        options = dict(getattr(config, kind))
        object.__setattr__(config, kind, options)
        known = {item.name for item in dataclasses.fields(options_class)} - derived.keys()
        for option in options:
            if option in derived:
                raise UserError(
                    f"{where}: {kind} option {option} follows from the study, from"
                    f" {derived[option]}; set it there"
                )
            if option not in known:
                raise unknown(f"{kind} option of {where}:", option, known)


@dataclass(frozen=True)
class StudyTask:
    """A task and its demonstrations.

    Args:
        task: id such as "Lift-v0", or "module:class" for a custom task.
        dataset: robomimic HDF5 file; a relative path starts at the study's file. `None`
            collects `demos` episodes of the task's scripted expert into the study.
        demos: episodes to collect.
        cameras: cameras that the policy sees, e.g. "wrist"; by default all of the task
            or of the file.
        image_size, quality: rendering of the collected frames.
        collect_seed: seed of the collection.
        filter_key: demonstrations to train on; "train" by default, if the file has it.
        max_steps: control steps after which an evaluated episode ends; by default the
            task's.
    """

    task: str
    dataset: Path | None = None
    demos: int = 400
    cameras: tuple[str, ...] | None = None
    image_size: int = 84
    quality: str = "fast"
    collect_seed: int = 0
    filter_key: str | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", resolve(self.task))
        if self.dataset is not None:
            object.__setattr__(self, "dataset", expanded(self.dataset).absolute())
        if self.cameras is not None:
            object.__setattr__(self, "cameras", _several(self.cameras, f"cameras of {self.task}:"))
        for name in ("demos", "image_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{self.task}: {name} must be at least 1, got {value}")

    @property
    def short(self) -> str:
        """The task in names of conditions and files: "lift" for "fibopolicy/Lift-v0",
        "robosuite-Lift" for "robosuite/Lift", "my_reach-Far" for "my_reach:Far".
        """
        if is_import_path(self.task):
            return self.task.replace(":", "-")
        suite, _, name = self.task.partition("/")
        bare = re.sub(r"-v\d+$", "", name)
        return bare.lower() if suite == "fibopolicy" else f"{suite}-{bare}"


@dataclass(frozen=True)
class StudyEncoder:
    """An encoder with options.

    Args:
        encoder: registered name, "timm:<name>", or "module:function".
        options: options of `build_encoder`.
        weights: run directory or file of encoder weights that the inits "finetune" and
            "frozen" start from; a relative path starts at the study's file. A timm
            model or EfficientNet-Lite may use its published weights instead, by the
            option `pretrained`, which "scratch" ignores.
        name: name within the study; by default the encoder's. Two entries of the same
            encoder need two names.
        init: the encoder's own init, in a study whose inits are "scratch": so that it
            is compared with encoders that are trained from scratch. Empty for none.
        untuned: why the study's search leaves this encoder out; it then has the study's
            settings, and the report marks it. Empty for an encoder that is tuned.
    """

    encoder: str
    options: Mapping[str, Option] = field(default_factory=dict)
    weights: Path | None = None
    name: str = ""
    init: str = ""
    untuned: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.encoder)
        object.__setattr__(self, "options", dict(self.options))
        if self.weights is not None:
            object.__setattr__(self, "weights", expanded(self.weights).absolute())


@dataclass(frozen=True)
class StudyPolicy:
    """A policy with settings that hold for its runs only.

    Args:
        policy: name that `PolicyConfig.policy` takes.
        policy_config: options of `PolicyConfig`, e.g. `{"horizon": 8, "policy_options":
            {"min_std": 0.05}}`. Each overrides the study's, `policy_options` as a
            whole.
        optimizer: options of `OptimizerConfig` except `steps`. Each overrides the
            study's.
        steps: gradient steps; by default the study's.
        name: name within the study; by default the policy's. Two entries of the same
            policy need two names.
    """

    policy: str
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.policy)
        _set_options(self, f"policy {self.name}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"policy {self.name}: steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class StudySearch:
    """Optimizer settings that are tried for every encoder, with the same budget, before
    the runs that count.

    Each condition is trained with each setting: these are its trials. Trials have their
    own training seed and initial states, which no result uses. In the first rung, every
    setting is trained for a share of its steps and evaluated on a few initial states.
    The better half of the settings enters the next rung, with more steps. The best
    setting of the last rung is chosen.

    A trial of a later rung starts from scratch, because the learning rate falls to zero over
    the trial's own steps: a shorter trial is a complete, shorter training.

    Args:
        settings: options of `OptimizerConfig` to try: a grid, e.g. `{"lr": (1e-3,
            2e-3), "weight_decay": (0.01, 0.1)}`, or a list, e.g. `[{"lr": 1e-3}, {"lr":
            2e-3, "steps": 2000}]`. They override those of the study and of its
            policies. Stored as a list.
        rungs: the budget. For each rung the share of the steps, in (0, 1], and the
            number of initial states, neither less than in the rung before. With one
            rung every setting gets the same.
        seed: training seed of all trials.
        init_seed: seed of the set of initial states of all trials.
    """

    settings: tuple[Mapping[str, Any], ...]
    rungs: tuple[tuple[float, int], ...] = ((1.0, 20),)
    seed: int = 1000
    init_seed: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _settings_to_try(self.settings))
        object.__setattr__(self, "rungs", _rungs(self.rungs))
        for name in ("seed", "init_seed"):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise UserError(f"search: {name} must be an integer from 0, got {value!r}")
        if self.sizes[-1] < 2:
            most = sum(size > 1 for size in self.sizes)
            raise UserError(
                f"search: {len(self.rungs)} rungs halve {len(self.settings)} settings to one"
                f" before the last; name at most {most}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of trials in each rung."""
        found = [len(self.settings)]
        for _ in self.rungs[1:]:
            found.append(-(-found[-1] // 2))
        return tuple(found)

    @property
    def episodes(self) -> int:
        """Number of initial states that trials need."""
        return self.rungs[-1][1]

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the options that the search decides."""
        return tuple(dict.fromkeys(name for setting in self.settings for name in setting))

    def describe(self) -> str:
        """The settings and the budget, for example `6 settings of lr and weight_decay:
        6 trials of 12.5 % of the steps on 10 initial states, 3 of 25 % on 20`.
        """
        (share, episodes), *others = self.rungs
        text = (
            f"{self.sizes[0]} settings of {listed(self.searched)}: {self.sizes[0]} trials of"
            f" {100 * share:.3g} % of the steps on {counted(episodes, 'initial state')}"
        )
        for size, (share, episodes) in zip(self.sizes[1:], others, strict=True):
            text += f", {size} of {100 * share:.3g} % on {episodes}"
        return text


def _settings_to_try(given: Any) -> tuple[dict[str, Any], ...]:
    """The settings of a grid or a list, each as options of `OptimizerConfig`."""
    known = {item.name for item in dataclasses.fields(OptimizerConfig)}
    if isinstance(given, Mapping):
        for name, values in given.items():
            parts = values if isinstance(values, list | tuple) else (values,)
            if any(isinstance(part, Mapping) for part in parts):
                raise UserError(
                    f"search: settings for {name} alone would give encoders unequal budgets; name"
                    " one grid or list, which every encoder gets"
                )
        axes = {name: _several(values, f"search: {name}") for name, values in given.items()}
        found = [dict(zip(axes, one, strict=True)) for one in itertools.product(*axes.values())]
    else:
        found = list(_several(given, "search: settings"))
    for setting in found:
        if not isinstance(setting, Mapping):
            raise UserError(
                "search: settings expected a grid {option: values} or a list of {option: value},"
                f" got {setting!r}"
            )
        for name in setting:
            if name not in known:
                raise unknown("optimizer option of the search:", name, known)
    if len(found) < 2:
        raise UserError(f"search: expected at least two settings to try, got {len(found)}")
    for number, setting in enumerate(found):
        if setting in found[:number]:
            raise UserError(f"search: setting {setting} appears twice; name each once")
    return tuple(map(dict, found))


def _rungs(given: Any) -> tuple[tuple[float, int], ...]:
    try:
        found = tuple((float(share), int(episodes)) for share, episodes in given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"search: rungs expected pairs (share of the steps, initial states), got {given!r}"
        ) from error
    if not found:
        raise UserError("search: expected at least one rung, got none")
    before: tuple[float, int] = (0.0, 1)
    for share, episodes in found:
        if not before[0] < share <= 1 or episodes < before[1]:
            raise UserError(
                f"search: rung ({share:g}, {episodes}) must have a share of the steps above"
                f" {before[0]:g}, at most 1, and at least {before[1]} initial states"
            )
        before = (share, episodes)
    return found


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides the results of a study.

    A task may be given by its id, an encoder and a policy by their names.

    Args:
        name: name of the study.
        tasks, encoders, policies, inits, seeds: the grid. Each combination is trained
            and evaluated once.
        baseline: encoder that the others are compared with; by default the first named
            "vit_*", or else the first.
        steps: gradient steps of every run whose policy sets none.
        optimizer: options of `OptimizerConfig` except `steps`, for every run.
        policy_config: options of `PolicyConfig` except policy and encoder, for every
            run, e.g. `{"views": "joint"}`.
        episodes: initial states that every run is evaluated on.
        init_seed: seed of the set of initial states.
        margin: how much lower a success rate may be and still count as not inferior, in
            (0, 1); `None` tests for differences only.
        expected_rate: expected success rate, in (0, 1), to compute how many episodes
            the margin needs.
        videos: number of initial states that are filmed for each run.
        threads: torch threads of each run. Another number changes the last bits of the
            weights, so it belongs to the study and not to the machine.
        device: "cpu", "cuda", ...; by default a GPU if there is one.
        search: settings that are tried for every encoder, to choose from; by default
            none.
        tuned_for: name of the encoder for which the settings of a study without a
            search, or of its untuned encoders, were chosen; the report names it. Empty
            if that is not stated.
        looks: numbers of training seeds, rising to all of them, e.g. (2, 3, 5), after
            which verdicts are read. The study stops as soon as all are decided. The
            looks share the level of significance, see `LookPlan`.
        perturbations: NAME:LEVEL, or NAME for all levels, that every run is also
            evaluated with, on the same initial states; see
            `fibopolicy.envs.perturbations`.
    """

    name: str
    tasks: tuple[StudyTask, ...]
    encoders: tuple[StudyEncoder, ...]
    policies: tuple[StudyPolicy, ...] = (StudyPolicy("bc"),)
    inits: tuple[str, ...] = ("scratch",)
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""
    steps: int = 1000
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 100
    init_seed: int = 0
    margin: float | None = 0.05
    expected_rate: float = 0.85
    videos: int = 6
    threads: int = 1
    device: str | None = None
    search: StudySearch | None = None
    tuned_for: str = ""
    looks: tuple[int, ...] = ()
    perturbations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"tasks": StudyTask, "encoders": StudyEncoder, "policies": StudyPolicy}
        for axis in ("tasks", "encoders", "policies", "inits", "seeds"):
            values = _several(getattr(self, axis), f"{axis} of a study:")
            if kind := kinds.get(axis):
                values = tuple(kind(v) if isinstance(v, str) else v for v in values)
            object.__setattr__(self, axis, values)
        where = f"study {self.name}"
        _set_options(self, where)
        self._check_grid(where)
        least = {"steps": 1, "episodes": 1, "threads": 1, "videos": 0, "init_seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(
                    f"{where}: {name} must be at least {low}, got {getattr(self, name)}"
                )
        for name in ("margin", "expected_rate"):
            value = getattr(self, name)
            if not (value is None and name == "margin") and not 0 < value < 1:
                raise UserError(f"{where}: {name} must lie between 0 and 1, got {value}")
        for policy in self.policies:  # the range of a value depends on the policy
            self._check_policy(policy, where)
        self._check_search(where)
        given = self.perturbations
        texts = _several(given, f"{where}: perturbations") if given else ()
        each = dict.fromkeys(str(one) for text in texts for one in parse(str(text)))
        object.__setattr__(self, "perturbations", tuple(each))
        object.__setattr__(self, "looks", tuple(self.looks))
        rises = all(a < b for a, b in itertools.pairwise((1, *self.looks)))
        if self.looks and not (rises and self.looks[-1] == len(self.seeds)):
            raise UserError(
                f"{where}: looks must rise from at least 2 to the number of its seeds,"
                f" {len(self.seeds)}, got {', '.join(map(str, self.looks))}"
            )

    def _check_grid(self, where: str) -> None:
        axes: dict[str, list[Any]] = {
            "tasks": [task.short for task in self.tasks],
            "encoders": [encoder.name for encoder in self.encoders],
            "policies": [policy.name for policy in self.policies],
            "inits": [*self.inits],
            "seeds": [*self.seeds],
        }
        for axis, found in axes.items():
            if repeated := sorted({str(name) for name in found if found.count(name) > 1}):
                raise UserError(
                    f"{where}: {', '.join(repeated)} appears twice among its {axis}; name each once"
                )
        for init in self.inits:
            if init not in INITS:
                raise unknown("init", init, INITS)
        for encoder in self.encoders:
            if encoder.init and encoder.init not in INITS:
                raise unknown(f"init of encoder {encoder.name}:", encoder.init, INITS)
            if encoder.init and self.inits != ("scratch",):
                raise UserError(
                    f"{where}: encoder {encoder.name} has its own init, {encoder.init}, which needs"
                    f" a study with the init scratch alone, but its inits are {self.inits}"
                )
            pretrained = encoder.weights is not None or encoder.options.get("pretrained")
            for init in (encoder.init,) if encoder.init else self.inits:
                if init != "scratch" and not pretrained:
                    raise UserError(
                        f"{where}: init {init!r} needs weights to start from, and encoder"
                        f" {encoder.name} has none; set weights= of its StudyEncoder, or for a"
                        " timm model or EfficientNet-Lite the option pretrained"
                    )
        if any(not isinstance(seed, int) or seed < 0 for seed in self.seeds):
            raise UserError(f"{where}: seeds are integers from 0, got {self.seeds}")
        names = [encoder.name for encoder in self.encoders]
        if not self.baseline:
            plain = [name for name in names if name.startswith("vit_")]
            object.__setattr__(self, "baseline", (plain or names)[0])
        if self.baseline not in names:
            raise unknown("encoder as the baseline", self.baseline, names)
        if self.tuned_for and self.tuned_for not in names:
            raise unknown("encoder as tuned_for", self.tuned_for, names)

    def _check_policy(self, policy: StudyPolicy, where: str) -> None:
        options = self.policy_options(policy)
        try:
            self.optimizer_config(policy)
            for setting in self.search.settings if self.search else ():
                self.optimizer_config(policy, setting)
            PolicyConfig(policy=policy.policy, **options)
        except UserError as error:
            raise UserError(f"{where}, policy {policy.name}: {error}") from error
        except TypeError as error:
            given = {**self.optimizer, **policy.optimizer, **options}
            raise UserError(f"{where}, policy {policy.name}: {error} (given {given})") from error

    def _check_search(self, where: str) -> None:
        untuned = [encoder.name for encoder in self.encoders if encoder.untuned]
        if self.search is None:
            if untuned:
                raise UserError(
                    f"{where}: encoder {untuned[0]} is left out of a search that the study does"
                    " not have; name a search, or leave untuned out"
                )
            return
        if len(untuned) == len(self.encoders):
            raise UserError(f"{where}: its search leaves every encoder out; name no search")
        if self.search.seed in self.seeds:
            raise UserError(
                f"{where}: the training seed of its search, {self.search.seed}, is among the"
                f" study's seeds {self.seeds}; choose another seed for the search"
            )
        if self.search.init_seed == self.init_seed:
            raise UserError(
                f"{where}: the initial states of its search overlap those of the result, both"
                f" are the set of seed {self.init_seed}; choose another init_seed for the search"
            )

    @property
    def look_plan(self) -> LookPlan | None:
        """How the looks share the level of significance; `None` without looks."""
        return LookPlan(tuple(k / len(self.seeds) for k in self.looks)) if self.looks else None

    def is_tuned(self, encoder: StudyEncoder) -> bool:
        """Whether the search decides the settings of an encoder's runs."""
        return self.search is not None and not encoder.untuned

    def policy_options(self, policy: StudyPolicy) -> dict[str, Any]:
        """Options of `PolicyConfig` for the runs of a policy, which override the study's."""
        return {**self.policy_config, **policy.policy_config}

    def optimizer_config(
        self, policy: StudyPolicy, setting: Mapping[str, Any] = MappingProxyType({})
    ) -> OptimizerConfig:
        """Optimizer settings for the runs of a policy.

        Args:
            setting: options that override those of study and policy.

        Raises:
            UserError: a value is out of range.
        """
        steps = self.steps if policy.steps is None else policy.steps
        options = {"steps": steps, **self.optimizer, **policy.optimizer, **setting}
        return OptimizerConfig(**options)


def to_json(config: StudyConfig) -> dict[str, Any]:
    """The configuration as plain JSON, for `from_json`."""
    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return document


def from_json(document: Mapping[str, Any]) -> StudyConfig:
    """The inverse of `to_json`. Ignores further keys of the document, such as versions.

    Raises:
        UserError: a value is out of range.
        KeyError, TypeError: not the document of a study.
    """
    known = {item.name for item in dataclasses.fields(StudyConfig)}
    values = {name: value for name, value in document.items() if name in known}
    for axis, kind in (("tasks", StudyTask), ("encoders", StudyEncoder), ("policies", StudyPolicy)):
        values[axis] = tuple(kind(**entry) for entry in document[axis])
    if values.get("search"):
        values["search"] = StudySearch(**values["search"])
    return StudyConfig(**values)


def load_study(source: str) -> tuple[StudyConfig, Path]:
    """Call the function of a Python file that returns a study.

    The folder of the file is importable during and after the call, so that
    "module:function" encoders can be imported from it. During the call it is the
    working directory, so that relative paths start there.

    Args:
        source: "my_study.py", whose function is `study`, or "my_study.py:function".

    Returns:
        the study, and the folder of its file.

    Raises:
        UserError: there is no such file or function, it fails, or it does not return a
            `StudyConfig`.
    """
    name, _, function = source.partition(":")
    function = function or "study"
    path = expanded(name)
    if path.suffix != ".py":
        raise UserError(
            f"{source}: expected a Python file with a function that returns a StudyConfig:"
            " my_study.py[:function]"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    path = path.absolute()
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"fibopolicy_study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    with chdir(folder), _wrap_errors(f"{path}: cannot be run"):
        spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        callables = {name: value for name, value in vars(module).items() if callable(value)}
        defined = [name for name, value in callables.items() if value.__module__ == spec.name]
        raise unknown(f"function of {path}:", function, defined)
    with chdir(folder), _wrap_errors(f"{path}: {function}() failed"):
        config = make()
    if not isinstance(config, StudyConfig):
        raise UserError(
            f"{path}: {function}() must return a StudyConfig, got {type(config).__name__}"
        )
    return config, folder


@contextmanager
def _wrap_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{prefix}: {one_line(error)}") from error
