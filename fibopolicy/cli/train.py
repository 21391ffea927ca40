"""The verb that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fibopolicy.errors import quoted
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import TrainConfig, preset


@dataclass(frozen=True)
class Train:
    """Train a policy on demonstrations.

    Example: fibopolicy train --dataset lift.hdf5 --out runs/lift --encoder vit_tiny
    --encoder-options depth 4 pool mean

    In several processes, one per GPU: torchrun --nproc-per-node 2 -m fibopolicy train
    --dataset lift.hdf5 --out runs/lift
    """

    config: Annotated[tyro.conf.OmitArgPrefixes[TrainConfig], tyro.conf.arg(name="")]
    preset: str | None = None
    """Start from a published run instead of the defaults: released_robot, Fibottention's authors' encoder with Diffusion
    Policy. Other options override it."""  # noqa: E501
    resume: bool = False
    """Go on with a run that was stopped; it ends with the same weights as one that was not."""
    overwrite: bool = False
    """Replace an existing run."""

    def run(self) -> None:
        from fibopolicy.envs.registry import is_known
        from fibopolicy.policies.run_directory import read_config
        from fibopolicy.training.distributed import is_main_process
        from fibopolicy.training.trainer import train

        done = train(self.config, resume=self.resume, overwrite=self.overwrite)
        if not is_main_process():  # one of several processes that trained together
            return
        print(f"{self.config.out}: trained to step {done.summary.steps}\n{done.summary.table()}")
        if is_known(read_config(self.config.out)["env_args"]):
            print(f"next: fibopolicy evaluate {quoted(self.config.out)} --episodes 50")


def with_preset(arguments: Sequence[str]) -> list[str]:
    """A command line whose `train --preset NAME`, if it has that, is preceded by all
    options of the preset; the last counts.

    Raises:
        UserError: no such preset.
    """
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [
        value if word == "--preset" else word.removeprefix("--preset=")
        for word, value in pairs
        if _is_preset(word)
    ]
    if arguments[:1] != ["train"] or not any(named) or named[-1].startswith("-"):
        return list(arguments)
    here = Path()  # the data and the run are named by the command line
    chosen = preset(named[-1], here, here)
    if any(word == "--head" or word.startswith("--head=") for word in arguments):
        # which only its own head knows
        chosen = replace(chosen, policy=replace(chosen.policy, head_options={}))
    return ["train", *_options(chosen), *arguments[1:]]


def _is_preset(word: str) -> bool:
    return word == "--preset" or word.startswith("--preset=")


def _options(config: Any) -> Iterator[str]:
    """The words on the command line that make a config, but for what has no default."""
    # What a head settles by itself is left to the head, which may be another.
    own = PolicyConfig(head=config.head) if isinstance(config, PolicyConfig) else None
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if own is not None and field.name != "head":
            default = getattr(own, field.name)
        if is_dataclass(value):
            yield from _options(value)
        elif default is not MISSING and value != default:
            yield f"--{field.name.replace('_', '-')}"
            many = (
                [word for pair in value.items() for word in pair]
                if isinstance(value, Mapping)
                else value
            )
            yield from map(str, many if isinstance(many, list | tuple) else [many])
