"""The command that trains."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fibopolicy.errors import quoted
from fibopolicy.policies.base import POLICIES, PolicyConfig
from fibopolicy.training.config import PRESETS, TrainConfig

#: Its fields are options without the prefix `config`.
ConfigOptions = Annotated[tyro.conf.OmitArgPrefixes[TrainConfig], tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Train:
    """Train a policy on demonstrations.

    Example: fibopolicy train --dataset lift.hdf5 --out runs/lift --encoder
    vit_tiny --encoder-options depth 4 pool mean

    In several processes, one per GPU: torchrun --nproc-per-node 2 -m
    fibopolicy train --dataset lift.hdf5 --out runs/lift
    """

    config: ConfigOptions
    preset: str | None = None
    """Take the defaults from a published run: released_robot, the encoder of
    Fibottention's authors with Diffusion Policy."""
    resume: bool = False
    """Continue an interrupted run; it ends with the same weights as an uninterrupted one."""
    overwrite: bool = False
    """Replace an existing run."""

    def run(self) -> None:
        from fibopolicy.envs.registry import is_known
        from fibopolicy.policies.run_directory import RunDirectory
        from fibopolicy.training.distributed import is_main_process
        from fibopolicy.training.trainer import train

        done = train(self.config, resume=self.resume, overwrite=self.overwrite)
        if not is_main_process():  # one of several processes that trained together
            return
        print(f"{self.config.out}: trained to step {done.summary.steps}\n{done.summary.table()}")
        if is_known(RunDirectory(self.config.out).read_config()["env_args"]):
            print(f"next: fibopolicy evaluate {quoted(self.config.out)} --episodes 50")


def with_preset(arguments: Sequence[str]) -> type[Train]:
    """`Train`, whose defaults are those of the published run that `--preset` names.

    tyro needs the defaults before it parses, so the preset is read from the arguments
    first. Fields are set behind the frozen dataclasses' back, because their constructors
    would fill in or refuse the unset ones.

    Raises:
        UserError: no such preset.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--policy", nargs="?")
    known, _ = parser.parse_known_args(arguments)
    if arguments[:1] != ["train"] or known.preset is None:
        return Train
    config = PRESETS[known.preset](Path(), Path())
    policy = copy.copy(config.policy)
    # Settings that the policy decides stay unset, since `--policy` may name another
    # one.
    for name, value in asdict(POLICIES[policy.policy].defaults).items():
        if getattr(policy, name) == value:
            object.__setattr__(policy, name, getattr(PolicyConfig, name))
    if known.policy is not None:
        object.__setattr__(policy, "policy_options", {})
    for name, value in (("dataset", tyro.MISSING), ("out", tyro.MISSING), ("policy", policy)):
        object.__setattr__(config, name, value)
    return make_dataclass("Train", [("config", ConfigOptions, config)], bases=(Train,), frozen=True)
