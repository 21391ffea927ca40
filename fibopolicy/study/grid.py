"""The grid of a study: its conditions, its runs, and the settings of each run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.envs.registry import is_heavy
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.study.config import StudyConfig, StudyEncoder, StudyPolicy, StudyTask
from fibopolicy.training.config import ComputeConfig, TrainConfig


@dataclass(frozen=True)
class Condition:
    """One combination of the grid, without the training seed."""

    task: StudyTask
    encoder: StudyEncoder
    policy: StudyPolicy
    init: str

    @property
    def name(self) -> str:
        """Folder name of the condition, for example `lift__vit_tiny__bc__scratch`."""
        parts = (self.task.short, self.encoder.name, self.policy.name, self.init)
        return "__".join(map(in_file_name, parts))


def in_file_name(name: str) -> str:
    """A name in which characters that are unsafe in file names are replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: a condition with a training seed."""

    condition: Condition
    seed: int

    @property
    def name(self) -> str:
        """Name on the command line, for example `lift__vit_tiny__bc__scratch/seed0`."""
        return f"{self.condition.name}/seed{self.seed}"


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


def train_config(config: StudyConfig, run: Run, dataset: Path, out: Path) -> TrainConfig:
    """The training of a run.

    Raises:
        UserError: options that do not fit together.
    """
    condition, cameras = run.condition, run.condition.task.cameras
    return TrainConfig(
        dataset=dataset,
        out=out,
        cameras=cameras and tuple(f"{name.removesuffix('_image')}_image" for name in cameras),
        filter_key=condition.task.filter_key,
        policy=policy_config(config, condition),
        optimizer=config.optimizer_config(condition.policy),
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
    task = run.condition.task
    per_thread = 1 if is_heavy(task.task) else 4  # light simulators share a core
    return EvaluateConfig(
        folder,
        episodes=config.episodes,
        init_seed=config.init_seed,
        init_states=init_states,
        video=min(config.videos, config.episodes),
        max_steps=task.max_steps,
        device=config.device or "cpu",
        workers=max(1, min(per_thread * config.threads, config.episodes)),
    )
