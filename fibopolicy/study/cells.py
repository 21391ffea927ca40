"""The grid of a study: its cells, and what trains and measures each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.envs.registry import is_heavy
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.study.config import StudyConfig, StudyEncoder, StudyHead, StudyTask
from fibopolicy.training.config import ComputeConfig, TrainConfig


@dataclass(frozen=True)
class Cell:
    """One point of the grid, training seeds apart."""

    task: StudyTask
    encoder: StudyEncoder
    head: StudyHead
    regime: str

    @property
    def name(self) -> str:
        """Of its folder: `lift__vit_tiny__bc__scratch`."""
        return "__".join(
            map(in_file_name, (self.task.short, self.encoder.name, self.head.name, self.regime))
        )


def in_file_name(part: str) -> str:
    """A name as it stands in names of files and folders."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", part)


@dataclass(frozen=True)
class Run:
    """What is trained and evaluated once: a cell with a training seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """As on the command line: `lift__vit_tiny__bc__scratch/seed0`."""
        return f"{self.cell.name}/seed{self.seed}"


def cells(config: StudyConfig) -> tuple[Cell, ...]:
    """Every cell, task by task.

    Raises:
        UserError: two cells would share a folder.
    """
    found = tuple(
        Cell(task, encoder, head, regime)
        for task in config.tasks
        for head in config.heads
        for regime in config.regimes
        for encoder in config.encoders
    )
    names = [cell.name for cell in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"study {config.name}: two cells would be called {repeated[0]}; give their encoders or"
            " heads other names"
        )
    return found


def runs(config: StudyConfig) -> tuple[Run, ...]:
    """Every run, seed by seed, so that a study that is stopped early has whole grids of
    its first seeds.
    """
    return tuple(Run(cell, seed) for seed in config.seeds for cell in cells(config))


def train_config(
    config: StudyConfig, cell: Cell, seed: int, dataset: Path, out: Path
) -> TrainConfig:
    """What trains a run.

    Raises:
        UserError: options that do not fit together.
    """
    return TrainConfig(
        dataset=dataset,
        out=out,
        cameras=(
            None
            if cell.task.cameras is None
            else tuple(f"{c.removesuffix('_image')}_image" for c in cell.task.cameras)
        ),
        filter_key=cell.task.filter_key,
        policy=policy_config(config, cell),
        optimizer=config.optimizer_config(cell.head),
        seed=seed,
        device=config.device,
        # Never by a trial of speed, which could decide otherwise in another run.
        compute=ComputeConfig(precision="fp32"),
        encoder_weights=None if cell.regime == "scratch" else cell.encoder.weights,
        freeze_encoder=cell.regime == "frozen",
    )


def policy_config(config: StudyConfig, cell: Cell) -> PolicyConfig:
    """The policy of a cell; what the study leaves open is the head's own."""
    options = {
        k: v
        for k, v in cell.encoder.options.items()
        if k != "pretrained" or cell.regime != "scratch"
    }
    return PolicyConfig(
        head=cell.head.head,
        encoder=cell.encoder.encoder,
        encoder_options=options,
        **config.policy_options(cell.head),
    )


def evaluate_config(config: StudyConfig, cell: Cell, run: Path, starts: Path) -> EvaluateConfig:
    """What measures a run: the last checkpoint, on the stored start states of its task."""
    return EvaluateConfig(
        run,
        episodes=config.episodes,
        seed=config.starts_seed,
        starts=starts,
        video=min(config.videos, config.episodes),
        horizon=cell.task.horizon,
        device="cpu" if config.device is None else config.device,
        workers=simulators(config, cell),
    )


def simulators(config: StudyConfig, cell: Cell) -> int:
    """Processes that simulate for one run: a light built-in task leaves room for
    several beside the policy.
    """
    per_thread = 1 if is_heavy(cell.task.task) else 4
    return max(1, min(per_thread * config.threads, config.episodes))
