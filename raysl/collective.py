"""The few collectives that raysl needs, correct on one process without a process group too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This worker's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the workers, without gradient. Every worker must call it."""
    if world() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the workers, without gradient. Every worker must call it."""
    if world() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def gather(rows: Tensor) -> Tensor:
    """Rows of all workers in rank order, without gradient.

    Args:
        rows: (b, ...), with the same b on every worker.

    Returns:
        (world * b, ...).
    """
    if world() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows of all workers in rank order, through which gradients go back to the worker that each row came from.

    The gradient of a worker's rows is the sum over the losses of all workers. DistributedDataParallel then takes the
    mean over the workers, so the weights' gradient is that of the mean of the losses, on any number of workers.
    Every worker must call it, and go backward through it.

    Args:
        rows: float (b, ...), with the same b on every worker.

    Returns:
        (world * b, ...).
    """
    if world() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class _Gather(torch.autograd.Function):
    """`torch.distributed.nn.functional.all_gather` is deprecated, and what replaces it is not public."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0]).chunk(world())[rank()]
