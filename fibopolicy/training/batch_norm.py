"""Batch norm over the batch of all processes.

`torch.nn.SyncBatchNorm` does this on GPUs alone. Here gloo will do as well, so that two
processes on a CPU train a ResNet as one does, and a test can tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`(B, C, H, W)` -> `(B, C, H, W)`; in training, mean and variance are those of
    every process's B samples together.

    Takes the place of a batch norm and shares its parameters and buffers.
    """

    def __init__(self, of: nn.BatchNorm2d) -> None:
        super().__init__(of.num_features, of.eps, of.momentum, of.affine)
        self._parameters, self._buffers = of._parameters, of._buffers
        self.train(of.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        size = distributed.get_world_size()
        wide = x.float()
        mean = _sum(wide.mean((0, 2, 3))) / size  # (C,)
        centred = wide - mean[:, None, None]
        variance = _sum(centred.square().mean((0, 2, 3))) / size
        self._follow(mean.detach(), variance.detach(), size * x.numel() // x.shape[1])
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Running statistics as in torch; the variance that they follow is the unbiased one."""
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


def share_batch_norms(module: nn.Module) -> None:
    """Puts `SharedBatchNorm2d` in the place of every plain `BatchNorm2d` inside;
    others, as timm's, stay as they are.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, SharedBatchNorm2d(child))
        else:
            share_batch_norms(child)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient's, since each process's loss
    depends on all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        distributed.all_reduce(total)
        return total


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total
