"""Forward and backward pass as a CUDA graph.

A small network launches thousands of kernels per step, and each launch takes the
processor longer than the GPU takes to compute. A CUDA graph records the launches once
and starts all of them with one call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fibopolicy.attention.functional import choose_backend
from fibopolicy.encoders.resnet import ResNet18
from fibopolicy.encoders.vit import Attention, ViT
from fibopolicy.errors import UserError, one_line
from fibopolicy.policies.bc import BCPolicy
from fibopolicy.policies.diffusion import DiffusionPolicy, FlowPolicy
from fibopolicy.training.config import ComputeConfig
from fibopolicy.training.data import leaves, mapped
from fibopolicy.training.encoders import encoders_of

#: Policies and encoders whose loss launches the same kernels for every batch and waits
#: for none. Subclasses may do otherwise.
POLICIES, ENCODERS = (BCPolicy, DiffusionPolicy, FlowPolicy), (ViT, ResNet18)
#: Calls before the recording. In them, kernels are compiled and chosen.
WARM_UP = 3


def can_record(
    policy: nn.Module, compute: ComputeConfig, device: torch.device, processes: int
) -> bool:
    """Whether the forward and backward pass of a run can be one CUDA graph."""
    return (
        compute.cuda_graph
        and not (compute.compile or compute.gradient_checkpointing)
        and (device.type, processes, compute.accumulate) == ("cuda", 1, 1)
        and type(policy) in POLICIES
        and all(type(encoder) in ENCODERS for encoder in encoders_of(policy))
        and not any(_waits(module, compute) for module in policy.modules())
        and torch.cuda.get_device_capability(device) >= (8, 0)  # as our attention kernels need
    )


def _waits(module: nn.Module, compute: ComputeConfig) -> bool:
    """Whether a module is attention by the backend that copies its pairs from ordinary
    memory.
    """
    if not isinstance(module, Attention) or module.pattern is None:
        return False
    weight, pattern = module.qkv.weight, module.pattern
    dtype = torch.bfloat16 if compute.precision == "bf16" else weight.dtype
    x = weight.new_empty((0, weight.shape[1] // module.num_heads), dtype=dtype)
    x.requires_grad_(weight.requires_grad)
    shape = (module.num_heads, pattern.sequence_length)
    return choose_backend(x, *shape, pattern, module.masking) == "csr"


class Recorded:
    """A function of a batch that computes gradients, recorded in a CUDA graph.

    Args:
        function: maps a nested batch of tensors, then anything that is the same in
            every call, to a tensor. It replaces the gradients of earlier calls.
        generator: generator of its random numbers; seeded before each call, as torch's
            global generator is.
        forget: frees the gradients of the last call, which would take memory beside
            those of the recording.

    Attributes:
        calls: number of calls up to now; the first `WARM_UP` are not recorded.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        generator: torch.Generator,
        forget: Callable[[], None],
    ) -> None:
        self._function, self._generator, self._forget = function, generator, forget
        self.calls = 0
        self._batch: dict[str, Any] = {}
        self._result: Tensor
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Mapping[str, Any], *same: Any) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._function(batch, *same)
        if self._graph is None:
            self._batch = mapped(batch, torch.clone)
            self._graph = self._record(same)
        for recorded, new in zip(leaves(self._batch), leaves(batch), strict=True):
            recorded.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._result.clone()

    def _record(self, same: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # By default torch records all graphs on one stream, on the device that was current
        # when it was first used.
        stream = torch.cuda.Stream(self._generator.device)  # type: ignore[no-untyped-call]
        self._forget()
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # destroying an older graph could end the recording
        try:
            # `torch.cuda.graph` leaves its stream only if the recording succeeds.
            # "thread_local", because the thread of a `BatchLoader` pins memory
            # meanwhile.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._result = self._function(self._batch, *same)
        except RuntimeError as error:
            # Ending the failed recording raises a second error.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, RuntimeError):
                raise cause from None
            raise UserError(
                f"a training step cannot be recorded in a CUDA graph ({one_line(cause)[:300]});"
                " pass --no-cuda-graph"
            ) from cause
        finally:
            if collects:
                gc.enable()
        return graph
