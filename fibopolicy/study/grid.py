"""The grid of a study: its conditions, its runs, and the settings of each run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fibopolicy.envs.base import image_key
from fibopolicy.envs.registry import is_heavy
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.study.config import StudyConfig, StudyEncoder, StudyPolicy, StudyTask
from fibopolicy.training.config import ComputeConfig, TrainConfig


@dataclass(frozen=True)
class Condition:
    """One combination of the grid, without the training seed.

    Args:
        study_init: one of the study's inits; encoders are compared with the same.
    """

    task: StudyTask
    encoder: StudyEncoder
    policy: StudyPolicy
    study_init: str

    @property
    def init(self) -> str:
        """How the encoder gets its weights."""
        return self.encoder.init or self.study_init

    @property
    def name(self) -> str:
        """Folder name of the condition, for example `lift__vit_tiny__bc__scratch`."""
        parts = (self.task.short, self.encoder.name, self.policy.name, self.init)
        return "__".join(map(in_file_name, parts))


def in_file_name(name: str) -> str:
    """A name in which characters that are unsafe in file names are replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


@dataclass(frozen=True)
class Trial:
    """What makes a run a trial of the search.

    Args:
        rung: from 0.
        number: index of the setting in `StudySearch.settings`.
    """

    rung: int
    number: int


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation: a condition with a training seed.

    Args:
        trial: trial of the search; `None` for a run that counts.
    """

    condition: Condition
    seed: int
    trial: Trial | None = None

    @property
    def name(self) -> str:
        """Name on the command line, for example `lift__vit_tiny__bc__scratch/seed0`; of
        a trial `lift__vit_tiny__bc__scratch/tuning/rung0_trial3`.
        """
        if self.trial is None:
            return f"{self.condition.name}/seed{self.seed}"
        return f"{tuning_name(self.condition)}/rung{self.trial.rung}_trial{self.trial.number}"


def tuning_name(condition: Condition) -> str:
    """Name of the search of a condition, for example `lift__vit_tiny__bc__scratch/tuning`."""
    return f"{condition.name}/tuning"


def conditions(config: StudyConfig) -> tuple[Condition, ...]:
    """Every condition, task by task.

    Raises:
        UserError: two conditions have the same folder name.
    """
    found = tuple(
        Condition(task, encoder, policy, init)
        for task in config.tasks
        for policy in config.policies
        for init in config.inits
        for encoder in config.encoders
    )
    names = [condition.name for condition in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"study {config.name}: two conditions would be called {repeated[0]}; give their"
            " encoders or policies other names"
        )
    return found


def runs(config: StudyConfig) -> tuple[Run, ...]:
    """Every run, seed by seed: a study that stops early has complete grids."""
    return tuple(Run(condition, seed) for seed in config.seeds for condition in conditions(config))


def tuned_conditions(config: StudyConfig) -> tuple[Condition, ...]:
    """Every condition whose settings the search decides."""
    return tuple(one for one in conditions(config) if config.is_tuned(one.encoder))


def rung_trials(config: StudyConfig, condition: Condition, rung: int) -> tuple[Run, ...]:
    """A trial of every setting of the search in a rung, by number. Only some take part
    in a later rung.
    """
    assert config.search is not None
    numbers = range(len(config.search.settings))
    return tuple(Run(condition, config.search.seed, Trial(rung, number)) for number in numbers)


def possible_runs(config: StudyConfig) -> tuple[Run, ...]:
    """Every run, and every trial that may take part in the search."""
    rungs = range(len(config.search.rungs)) if config.search else ()
    found = [
        trial
        for condition in tuned_conditions(config)
        for rung in rungs
        for trial in rung_trials(config, condition, rung)
    ]
    return *runs(config), *found


def selectable(config: StudyConfig) -> list[str]:
    """The names of all searches, then of all runs that count; an array job executes one
    by its index.
    """
    names = [tuning_name(condition) for condition in tuned_conditions(config)]
    return names + [run.name for run in runs(config)]


def trial_setting(config: StudyConfig, run: Run) -> dict[str, Any]:
    """The optimizer settings of a trial: a setting of the search, for the share of the
    steps that its rung has.
    """
    assert config.search is not None
    assert run.trial is not None
    setting, share = (
        config.search.settings[run.trial.number],
        config.search.rungs[run.trial.rung][0],
    )
    steps = config.optimizer_config(run.condition.policy, setting).steps
    return {**setting, "steps": max(1, round(share * steps))}


def policy_config(config: StudyConfig, condition: Condition) -> PolicyConfig:
    """The policy of a condition."""
    options = dict(condition.encoder.options)
    if condition.init == "scratch":
        options.pop("pretrained", None)
    return PolicyConfig(
        policy=condition.policy.policy,
        encoder=condition.encoder.encoder,
        encoder_options=options,
        **config.policy_options(condition.policy),
    )


def train_config(
    config: StudyConfig,
    run: Run,
    dataset: Path,
    out: Path,
    setting: Mapping[str, Any] = MappingProxyType({}),
) -> TrainConfig:
    """The training of a run.

    Args:
        setting: optimizer settings that the search decides.

    Raises:
        UserError: options that do not fit together.
    """
    condition, cameras = run.condition, run.condition.task.cameras
    return TrainConfig(
        dataset=dataset,
        out=out,
        cameras=cameras and tuple(image_key(name.removesuffix("_image")) for name in cameras),
        filter_key=condition.task.filter_key,
        policy=policy_config(config, condition),
        optimizer=config.optimizer_config(condition.policy, setting),
        seed=run.seed,
        device=config.device,
        # Never "auto", which could choose differently on another machine.
        compute=ComputeConfig(precision="fp32"),
        encoder_weights=None if condition.init == "scratch" else condition.encoder.weights,
        freeze_encoder=condition.init == "frozen",
    )


def evaluate_config(
    config: StudyConfig, run: Run, folder: Path, init_states: Path
) -> EvaluateConfig:
    """The evaluation of a run: its last checkpoint on the stored initial states of its task."""
    task, episodes, seed, video = (
        run.condition.task,
        config.episodes,
        config.init_seed,
        config.videos,
    )
    if run.trial is not None:
        assert config.search is not None
        episodes, seed, video = config.search.rungs[run.trial.rung][1], config.search.init_seed, 0
    per_thread = 1 if is_heavy(task.task) else 4  # light simulators share a core
    return EvaluateConfig(
        folder,
        episodes=episodes,
        init_seed=seed,
        init_states=init_states,
        video=min(video, episodes),
        max_steps=task.max_steps,
        device=config.device,
        workers=max(1, min(per_thread * config.threads, episodes)),
        perturb=config.perturbations if run.trial is None else (),
    )
