"""Work of a probe on Ray, off the trainers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from raysl import cluster, features
from raysl.cluster import places

Result = TypeVar("Result")


def elsewhere(work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]) -> list[Result]:
    """One task of Ray for each call, with a GPU each if there are any; all results, in the order of the calls.

    Raises:
        UserError: that which a task raised.
    """
    import ray

    _, resources = features.pool(places.machines().totals())
    task = ray.remote(work).options(**resources)
    running = [task.remote(*call) for call in calls]
    try:
        results: list[Result] = ray.get(running)
    except BaseException as error:  # an interrupt, too: on a cluster the tasks would go on
        for one in running:
            ray.cancel(one)
        raise cluster.user_error(error) or error from None
    return results


def device() -> torch.device:
    """The GPU that Ray has assigned, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoders() -> int:
    """How many threads decode images: beside an accelerator its share of the CPUs, else one for the one CPU."""
    return max(1, (os.cpu_count() or 1) // torch.cuda.device_count()) if torch.cuda.is_available() else 1
