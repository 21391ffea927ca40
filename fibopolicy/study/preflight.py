"""Checks before a study starts: every policy can be built, and its conditions differ
only in what the study names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan
from fibopolicy.datasets.conventions import proprioception
from fibopolicy.encoders.base import encoder_settings
from fibopolicy.errors import UserError, unknown
from fibopolicy.policies import Shapes, build_policy
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.statistics.power import episodes_needed
from fibopolicy.study.config import StudyConfig, StudyPolicy, StudyTask
from fibopolicy.study.grid import Condition, conditions, policy_config, runs, train_config
from fibopolicy.training.encoders import load_encoder_weights
from fibopolicy.utils.settings import flatten
from fibopolicy.utils.system import resolve_device

#: The settings of a run that each axis of the grid decides. A policy also decides the
#: settings of its `StudyPolicy`, and those whose default depends on it.
DECIDED_BY = {
    "encoder": (
        *("policy.encoder", "policy.encoder_options", "encoder_weights", "freeze_encoder"),
    ),
    "policy": (
        *("policy.policy", "policy.n_obs_steps", "policy.horizon", "policy.n_action_steps"),
        *("policy.hidden", "policy.layers", "policy.action_normalization"),
    ),
    "init": ("policy.encoder_options", "encoder_weights", "freeze_encoder"),
    "task": ("dataset", "cameras", "filter_key"),
    "seed": ("seed",),
    "place": ("out",),
}
#: Encoders count as equal in size up to this relative difference of their parameters.
SIZE_TOLERANCE = 0.01
#: Assumed correlation of the outcomes of two encoders on the same initial state. The
#: report has the observed one; a smaller one needs more initial states.
CORRELATION = 0.3


@dataclass(frozen=True)
class ModelSize:
    """The size of a condition's policy.

    Args:
        condition: the combination of the grid.
        parameters: parameters of the policy, frozen ones included.
        encoder: the encoders of all cameras.
    """

    condition: Condition
    parameters: int
    encoder: ObservationEncoder

    @property
    def encoder_parameters(self) -> int:
        return _count(self.encoder)


def model_sizes(config: StudyConfig) -> list[ModelSize]:
    """Build the policy of every condition for the observations of its task.

    Raises:
        UserError: an unknown policy, encoder or option; values that do not fit the
            images; a dataset or weights that cannot be read; weights of another
            network; a device that is not available.
    """
    resolve_device(config.device)
    shapes = {task.task: task_shapes(task) for task in config.tasks}
    return [_size(config, one, shapes[one.task.task]) for one in conditions(config)]


def _size(config: StudyConfig, condition: Condition, shapes: Shapes) -> ModelSize:
    settings = policy_config(config, condition)
    policy = build_policy(settings, shapes)
    if condition.init != "scratch" and condition.encoder.weights is not None:
        load_encoder_weights(policy, condition.encoder.weights)
    encoder = ObservationEncoder(settings, replace(shapes, vectors={}))
    return ModelSize(condition, _count(policy), encoder.eval())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def collection_plan(task: StudyTask) -> Plan:
    """The collection for a task without a dataset."""
    return Plan(task.task, task.cameras, task.image_size, task.quality, task.collect_seed)


def task_shapes(task: StudyTask) -> Shapes:
    """The observations and actions of a task: of its dataset, or of the environment
    that the study will collect from.
    """
    if task.dataset is not None:
        with DemoFile(task.dataset) as file:
            cameras = {key.removesuffix("_image"): key for key in file.image_keys}
            seen = [name.removesuffix("_image") for name in task.cameras or cameras]
            for name in seen:
                if name not in cameras:
                    raise unknown(f"camera of {task.dataset}:", name, cameras)
            file.select(task.filter_key)
            images = {
                key: (file.image_shape(key)[0], file.image_shape(key)[1])
                for name, key in cameras.items()
                if name in seen
            }
            vectors = {key: file.vector_dim(key) for key in proprioception(file.vector_keys)}
            return Shapes(images, vectors, file.action_dim)
    env = collection_plan(task).make_env()
    try:
        observation, _ = env.reset(seed=0)
        assert env.action_space.shape is not None
        frames = {key: value for key, value in observation.items() if value.ndim == 3}
        return Shapes(
            {key: (frame.shape[0], frame.shape[1]) for key, frame in frames.items()},
            {key: len(observation[key]) for key in proprioception(observation)},
            env.action_space.shape[0],
        )
    finally:
        env.close()


def check(config: StudyConfig, sizes: Sequence[ModelSize]) -> tuple[list[str], list[str]]:
    """Compare the conditions of a study.

    Returns:
        lines to log, and warnings.

    Raises:
        UserError: conditions differ in something that the study does not name.
    """
    lines = [
        *describe_differences(config),
        *describe_policies(config),
        *describe_search(config),
        *describe_encoders(config),
        *describe_sizes(config, sizes),
    ]
    return lines, [*check_power(config)]


def describe_differences(config: StudyConfig) -> list[str]:
    """The settings in which runs differ, by the axis of the grid that decides them."""
    settings = []
    for run in runs(config):
        task = run.condition.task
        dataset = task.dataset or Path(task.short)
        settings.append(flatten(asdict(train_config(config, run, dataset, Path(run.name)))))
    values: dict[str, set[str]] = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        values[key] = {repr(one.get(key)) for one in settings}
    differing = [key for key, found in values.items() if len(found) > 1]
    policies = [key for policy in config.policies for key in policy_settings(policy)]
    decided_by = {**DECIDED_BY, "policy": (*DECIDED_BY["policy"], *policies)}
    by_axis: dict[str, list[str]] = {}
    for key in differing:
        for axis, decided in decided_by.items():
            if any(f"{key}.".startswith(f"{name}.") for name in decided):
                by_axis.setdefault(axis, []).append(key)
                break
        else:
            raise UserError(
                f"study {config.name}: its conditions differ in {key}, which no axis of the grid"
                " decides; set it for all"
            )
    parts = "; ".join(f"{axis}: {', '.join(keys)}" for axis, keys in by_axis.items())
    return [
        f"runs differ in {parts}",
        (
            f"the other {len(values) - len(differing)} settings of policy, optimizer and data are"
            f" equal in all {len(settings)} runs"
        ),
    ]


def policy_settings(policy: StudyPolicy) -> dict[str, Any]:
    """The settings of a policy's runs that its `StudyPolicy` sets, e.g. "policy.horizon"."""
    found = {f"policy.{name}": value for name, value in policy.policy_config.items()}
    found |= {f"optimizer.{name}": value for name, value in policy.optimizer.items()}
    return found if policy.steps is None else {**found, "optimizer.steps": policy.steps}


def describe_policies(config: StudyConfig) -> Iterator[str]:
    """The settings that hold for the runs of one policy only."""
    for policy in config.policies:
        if settings := flatten(policy_settings(policy)):
            listed = ", ".join(f"{name} {value}" for name, value in settings.items())
            yield f"policy {policy.name} has {listed}"


def describe_search(config: StudyConfig) -> Iterator[str]:
    """The budget of the search, and the encoders that it leaves out."""
    if config.search is not None:
        yield f"the search tries for every encoder {config.search.describe()}"
    for encoder in config.encoders:
        if encoder.untuned:
            yield f"encoder {encoder.name} is untuned: {encoder.untuned}"


def describe_encoders(config: StudyConfig) -> Iterator[str]:
    """How each encoder differs from the baseline."""
    options = {e.name: encoder_settings(e.encoder, **e.options) for e in config.encoders}
    inits = {e.name: f", init {e.init}" if e.init else "" for e in config.encoders}
    base = options.pop(config.baseline)
    for name, found in options.items():
        if found.keys() == base.keys():
            changes = [f"{k} {found[k]} instead of {base[k]}" for k in base if found[k] != base[k]]
            changed = ", ".join(changes) or "no change at all"
            yield f"encoder {name} is {config.baseline} with {changed}{inits[name]}"
        else:
            hidden = ("pretrained", "num_views")
            listed = ", ".join(
                f"{key} {value}" for key, value in found.items() if key not in hidden
            )
            yield (
                f"encoder {name} is another network than {config.baseline}, with other pooling"
                f" ({listed or 'no options'}){inits[name]}"
            )


def describe_sizes(config: StudyConfig, sizes: Sequence[ModelSize]) -> Iterator[str]:
    """Per task, whether the encoders have as many parameters as the baseline; per
    policy if policies crop or join the cameras differently.
    """
    for task in config.tasks:
        policies_by_line: dict[str, list[str]] = {}
        for policy in config.policies:
            found = {
                size.condition.encoder.name: size.encoder_parameters
                for size in sizes
                if (size.condition.task, size.condition.policy) == (task, policy)
            }
            base = found[config.baseline]
            others = [
                f"{name} {number:,} ({number / base:.2f}x)"
                for name, number in found.items()
                if abs(number - base) > SIZE_TOLERANCE * base
            ]
            line = f"encoders have {base:,} parameters"
            if others:
                line += f", but {', '.join(others)}"
            policies_by_line.setdefault(line, []).append(policy.name)
        for line, policies in policies_by_line.items():
            where = [task.short, *policies] if len(policies_by_line) > 1 else [task.short]
            yield f"{', '.join(where)}: {line}"


def check_power(config: StudyConfig) -> Iterator[str]:
    """A warning if the episodes are too few to detect a difference of the margin."""
    if len(config.encoders) < 2 or config.margin is None:
        return
    rate, seeds = config.expected_rate, len(config.seeds)
    low = max(rate - config.margin, 0.0)
    needed = episodes_needed(rate, low, correlation=CORRELATION)
    available = config.episodes * seeds
    if needed is not None and available >= needed:
        return
    runs_each = f"{seeds} seed{'s' * (seeds != 1)}"
    enough = "more than 20,000 episodes"
    if needed is not None:
        enough = f"{needed} episodes, {-(-needed // seeds)} for each of {runs_each}"
    yield (
        f"{available} episodes per condition ({config.episodes} initial states x {runs_each}) are"
        f" few for a margin of {config.margin:g}: to distinguish {rate:.2f} from {low:.2f} with"
        f" 80 % power takes {enough}, and more if seeds differ"
    )
