"""Collective operations between workers. They also work in one process without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this worker's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the workers, without gradient. Every worker must call it."""
    return total(value) / world() if world() > 1 else value.detach()


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the workers, without gradient. Every worker must call it."""
    if world() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all workers in rank order, without gradient. Every worker must call it.

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
    """Return the rows of all workers in rank order. Gradients flow back to the worker of each row.

    The gradient of a worker's rows is the sum over the losses of all workers. DistributedDataParallel then averages
    over the workers, so the gradient of the weights is that of the mean loss, for any number of workers. Every worker
    must call it and its backward pass.

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
    """Gather with gradient. torch's own function is deprecated and its replacement is not public."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0]).chunk(world())[rank()]
