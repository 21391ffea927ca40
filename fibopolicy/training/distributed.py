"""One training in several processes: `torchrun --nproc-per-node 2 -m fibopolicy train
...`.

Each process ("rank") takes its rows of every batch; torch's `DistributedDataParallel`
averages the gradients. Only rank 0, the main process, writes and prints. A `UserError`
ends all ranks with one message. If a rank dies, the others fail at their next exchange.
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fibopolicy.errors import UserError
from fibopolicy.policies import Policy
from fibopolicy.policies.base import Metrics
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.training.encoders import training_mode
from fibopolicy.utils.system import resolve_device

T = TypeVar("T")


class PolicyLoss(nn.Module):
    """A policy whose `forward` is its loss, as `DistributedDataParallel` needs it."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, Metrics]:
        return self.policy.loss(batch, rng)


@dataclass(frozen=True)
class World:
    """The processes of one training; by default only this one.

    Attributes:
        rank: rank of this process, from 0.
        size: number of processes.
        local_rank: rank of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _wrapped: list[DistributedDataParallel] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """Like `resolve_device`; each process on a machine with GPUs gets a different GPU.

        A GPU becomes torch's current device, on which streams and events are created.
        """
        device = resolve_device(name)
        if device.type != "cuda":
            return device
        if self.size == 1:
            if device.index is not None:
                torch.cuda.set_device(device)
            return device
        if device.index is not None:
            raise UserError(
                f"device {name!r} is one GPU, but each of the {self.size} processes needs its own;"
                " use --device cuda"
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
        """This process's share of `count` rows, a multiple of the number of processes."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def sync_batch_norms(self, policy: nn.Module) -> None:
        """Share the statistics of batch norm over all processes, in place, on GPUs.

        Subclasses of torch's `BatchNorm2d`, such as timm's, keep those of their
        process.

        Raises:
            UserError: batch norm is trained on CPUs, where torch cannot synchronise it.
        """
        training_mode(policy)
        for name, child in list(policy.named_modules()):
            if self.size == 1 or not isinstance(child, _BatchNorm) or not child.training:
                continue
            if next(policy.parameters()).device.type != "cuda":
                raise UserError(
                    f"{name}: batch norm cannot be synchronised over processes on a CPU; train in"
                    " one process or on GPUs, or pass --freeze-encoder"
                )
            if type(child) is nn.BatchNorm2d:
                parent, _, attribute = name.rpartition(".")
                shared = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                setattr(policy.get_submodule(parent), attribute, shared)

    def wrap(self, module: nn.Module, batch: Mapping[str, Any]) -> nn.Module:
        """A module with the same `forward` whose gradients are averaged over all
        processes.

        Args:
            batch: any batch; shows whether the loss reaches all parameters.
        """
        unused = _has_unused_parameters(module, batch)
        wrapped = DistributedDataParallel(module, find_unused_parameters=unused)
        self._wrapped.append(wrapped)
        return wrapped

    def main_process_first(self, task: Callable[[], T]) -> T:
        """Run `task` in every process, first in the main one, which fills any cache."""
        for main in (True, False):
            with self._together():
                if main == self.is_main:
                    result = task()
        return result

    def main_process_only(self, task: Callable[[], None]) -> None:
        """Run `task` in the main process; the others wait."""
        with self._together():
            if self.is_main:
                task()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for all processes at the end; a `UserError` in one of them ends all."""
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        if self.size > 1:
            messages: list[str | None] = [None] * self.size
            distributed.all_gather_object(messages, str(error) if error else None)
            first = next((message for message in messages if message is not None), None)
            error = error or (UserError(first) if first is not None else None)
        if error is not None:
            raise self.once(error)

    def once(self, error: UserError) -> BaseException:
        """What to raise for an error of all processes, so that only the main one prints it."""
        return error if self.is_main else SystemExit(2)

    def close(self) -> None:
        """End the connection to the other processes.

        The gradient exchange is deleted first. As the last owner of the connection, it
        would wait for the connection's threads while it holds Python's global lock,
        which these threads need to free their last tensor. This could deadlock.
        """
        for module in self._wrapped:
            del module.reducer, module.logger
        distributed.destroy_process_group()


def _has_unused_parameters(module: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether some parameters get no gradient from the loss."""
    trial = copy.deepcopy(module)  # in training mode, as `World.sync_batch_norms` leaves it
    trial(batch)[0].backward()
    return any(p.requires_grad and p.grad is None for p in trial.parameters())


def no_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Context of one backward pass of a step; gradients are exchanged after the last."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[object] = module.no_sync()
    return context


def is_main_process() -> bool:
    """Whether this process prints, also before and after it is part of a `World`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def init_distributed(device: str | None) -> Iterator[World]:
    """Connect the processes that torchrun has started, by NCCL on GPUs and by gloo on
    CPUs.

    Raises:
        UserError: torchrun's environment is incomplete, or another process has ended.
    """
    size = _environment_number("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    world = World(_environment_number("RANK"), size, _environment_number("LOCAL_RANK"))
    if threading.current_thread() is threading.main_thread():
        # A Python handler would not run during an exchange.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not world.is_main:
        warnings.simplefilter("ignore")
    gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        try:
            yield world
        except (UserError, SystemExit):  # raised in all processes, so that all close
            world.close()
            raise
        world.close()
    except KeyboardInterrupt:
        raise KeyboardInterrupt if world.is_main else SystemExit(130) from None
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        lost = "another process of this run has ended, see its message; continue with --resume"
        raise world.once(UserError(lost)) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


def _environment_number(name: str, default: int | None = None) -> int:
    found = os.environ.get(name, None if default is None else str(default))
    if found is None or not found.isdigit():
        raise UserError(
            f"WORLD_SIZE asks for several processes, but {name} is {found}; start them with"
            " `torchrun --nproc-per-node N -m fibopolicy train ...`, or unset WORLD_SIZE"
        )
    return int(found)
