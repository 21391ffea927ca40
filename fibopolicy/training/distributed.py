"""One training in several processes, as torchrun starts them: `torchrun
--nproc-per-node 2 -m fibopolicy.train ...`.

Each process ("rank") takes its rows of every batch; gradients are averaged by torch's
`DistributedDataParallel`. Rank 0 alone writes and prints. A mistake of the user's ends
all ranks with one message; a rank that dies ends the others, which miss it at their
next exchange.
"""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.training.batch_norm import share_batch_norms
from fibopolicy.training.encoders import training_mode
from fibopolicy.utils.system import resolve_device

T = TypeVar("T")


class PolicyLoss(nn.Module):
    """A policy whose `forward` is its loss, since that is what
    `DistributedDataParallel` watches.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        return self.policy.loss(batch, rng)


@dataclass(frozen=True)
class World:
    """The processes of one training; by default this one alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _wrapped: list[DistributedDataParallel] = field(default_factory=list, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """As `resolve_device`; of several GPUs, each process of a machine takes its own."""
        device = resolve_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(
                f"device {name!r} is one GPU, but each of the {self.size} processes needs its own;"
                " name it cuda"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, too few for process"
                f" {self.local_rank + 1} on it; lower --nproc-per-node or use --device cpu"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def rows(self, count: int) -> slice:
        """This process's share of `count` rows, which its size divides."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrapped(self, module: PolicyLoss, batch: Mapping[str, Any]) -> nn.Module:
        """A module of the same `forward` whose gradients become the mean over all
        processes, and whose batch norms are shared.

        Args:
            batch: on which to see whether the loss reaches all parameters, or some have
                to be looked for at each step.
        """
        if self.size == 1:
            return module
        share_batch_norms(module)
        self._wrapped.append(
            DistributedDataParallel(module, find_unused_parameters=_leaves_some(module, batch))
        )
        return self._wrapped[-1]

    def part(self) -> None:
        """Ends the connection to the other processes.

        The modules' gradient exchange goes first. Were it the last to hold the
        connection, it would wait for the connection's threads while it holds Python's
        lock, and these wait for that lock to drop their last tensor: for ever, now and
        then.
        """
        for module in self._wrapped:
            del module.reducer, module.logger
        distributed.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def in_turn(self, task: Callable[[], T]) -> T:
        """What `task` returns; rank 0 does it before the others, which then find any cache made."""
        results = [self._agree(task if turn else None) for turn in (self.leads, not self.leads)]
        return next(result[0] for result in results if result)

    def lead(self, task: Callable[[], T]) -> T:
        """What `task` returned on rank 0, which alone does it."""
        result = self._agree(task if self.leads else None)
        if self.size == 1:
            return result[0]
        box = [result[0] if result else None]
        distributed.broadcast_object_list(box, src=0)
        told: Any = box[0]
        return told  # type: ignore[no-any-return]

    def _agree(self, task: Callable[[], T] | None) -> list[T]:
        """[what `task` returns], or [] without a task; a `UserError` of any process ends all."""
        result: list[T] = []
        error: UserError | None = None
        try:
            if task is not None:
                result.append(task())
        except UserError as mine:
            error = mine
        if self.size > 1:
            told: list[str | None] = [None] * self.size
            distributed.all_gather_object(told, str(error) if error else None)
            others = next((message for message in told if message is not None), None)
            error = error or (UserError(others) if others is not None else None)
        if error is not None:
            raise self.same(error)
        return result

    def same(self, error: UserError) -> BaseException:
        """What to raise for an error that every process has come upon: rank 0 alone tells it."""
        return error if self.leads else SystemExit(2)


def _leaves_some(module: PolicyLoss, batch: Mapping[str, Any]) -> bool:
    """Whether parameters get no gradient from the loss."""
    trial = copy.deepcopy(module)
    training_mode(trial.policy)
    trial(batch)[0].backward()
    return any(
        parameter.requires_grad and parameter.grad is None for parameter in trial.parameters()
    )


def leads() -> bool:
    """Whether this process is the one that prints, before and after it is part of a `World`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """The processes that torchrun's environment tells of, connected: by NCCL on GPUs,
    else by gloo.

    Raises:
        UserError: the environment is incomplete; another process has ended.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    world = World(_number("RANK"), size, _number("LOCAL_RANK"))
    if threading.current_thread() is threading.main_thread():
        # in the midst of an exchange no Python code would run to heed it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not world.leads:
        warnings.simplefilter("ignore")
    gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        try:
            yield world
        except (
            UserError,
            SystemExit,
        ):  # which the others have come upon as well, so that they part too
            world.part()
            raise
        world.part()
    except KeyboardInterrupt:
        raise KeyboardInterrupt if world.leads else SystemExit(130) from None
    except RuntimeError as error:
        if not _lost(error):
            raise
        lost = UserError(
            "another process of this training has ended, its own message tells why; --resume goes"
            " on from here"
        )
        raise world.same(lost) from error


def unsynchronised(module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Around all backward passes of a step but the last, after which alone gradients
    are exchanged.
    """
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[object] = module.no_sync()
    return context


def _lost(error: RuntimeError) -> bool:
    """Whether an exchange failed because the other side is gone."""
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


def _number(name: str, default: int | None = None) -> int:
    """Of an environment variable."""
    found = os.environ.get(name, None if default is None else str(default))
    if found is None or not found.isdigit():
        raise UserError(
            f"the environment tells of several processes, but {name} is {found}; start them with"
            " `torchrun --nproc-per-node N -m fibopolicy.train ...`, or unset WORLD_SIZE"
        )
    return int(found)
