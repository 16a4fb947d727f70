"""Work of a probe on Ray, off the trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from raysl import extraction, ray_cluster
from raysl.errors import UserError
from raysl.ray_cluster import placement

Result = TypeVar("Result")


def elsewhere(
    work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], options: Mapping[str, Any] | None = None
) -> list[Result]:
    """One task of Ray for each call; all results, in the order of the calls.

    Args:
        work: what a task does.
        calls: its arguments.
        options: of the tasks, as Ray takes them; by default a GPU each if there are any, else a share of the CPUs.

    Raises:
        UserError: that which a task raised, or a task was killed, again and again as Ray tries it.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    task = ray.remote(**(options or _shares(len(calls))))(work)
    running = [task.remote(*call) for call in calls]
    try:
        results: list[Result] = ray.get(running)
    except BaseException as error:  # an interrupt, too: on a cluster the tasks would go on
        # Only those that go on: Ray aborts the driver when a task is cancelled at the moment that it ends.
        for one in ray.wait(running, num_returns=len(running), timeout=0)[1]:
            ray.cancel(one)
        if isinstance(error, OutOfMemoryError | WorkerCrashedError):
            raise UserError(
                "The process of a probe was killed, most likely because it took more memory than its machine has. "
                "Use a larger machine or fewer images, or show probes fewer numbers of an early layer, as with "
                "--linear.dims 1024; rows that were found before are kept."
            ) from error
        raise ray_cluster.user_error(error) or error from None
    return results


def _shares(tasks: int) -> dict[str, float]:
    """A GPU for each task; without any, half of a machine divided by the tasks that there are."""
    found = placement.machines()
    _, resources = extraction.pool(found.totals())
    if "num_gpus" not in resources:
        most = max(node.get("CPU", 0.0) for node in found.for_work)
        resources = {"num_cpus": max(resources["num_cpus"], int(500 * most / tasks) / 1000)}
    return resources


def device() -> torch.device:
    """The GPU that Ray has assigned, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoders() -> int:
    """How many threads decode images: one for each CPU that Ray has given the task, one outside of tasks."""
    return placement.assigned_cpus()
