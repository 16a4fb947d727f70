"""Run the work of probes in tasks of Ray, or in this process on a machine that needs no Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from raysl import extraction, ray_cluster
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.probes import Row, Subject
from raysl.ray_cluster import placement, this_machine

C = TypeVar("C")
Result = TypeVar("Result")


class InTask(Generic[C]):
    """Base of an `EncoderProbe` of which one call of `run_tasks` computes all rows.

    Attributes:
        needs: type of the encoders that it measures; others have no rows.
    """

    needs: ClassVar[type[Any]] = object

    def __init__(self, config: C) -> None:
        self.config = config

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError, before anything is computed, if the data do not suit the probe."""

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows of all layers, inside of the task. Raises UserError as `EncoderProbe.examine`."""
        raise NotImplementedError

    def examine(self, subject: Subject) -> Iterator[Row]:
        """See `EncoderProbe.examine`."""
        self.check_data(subject.train, subject.test)
        if isinstance(subject.encoder, self.needs):
            yield from run_tasks(type(self).rows, [(self, subject)])[0]


def run_tasks(
    work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], options: Mapping[str, Any] | None = None
) -> list[Result]:
    """Run one Ray task for each call and return the results in the order of the calls.

    Args:
        options: options of the tasks for `ray.remote`; None for a GPU each if there are any, or else a share of the
            CPUs, and for all calls in this process where no Ray runs and the machine needs none.

    Raises:
        UserError: a task raised it, or the process of a task was killed as often as Ray retries it.
    """
    # Beside a run on Ray, a task leaves this process free.
    ray_runs = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if options is None and not (ray_runs or this_machine.needs_ray()):
        return [work(*call) for call in calls]
    import ray
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    ray_cluster.start()
    # Inside a trial of Ray Tune, a task without a strategy would be placed in the small group of the trial.
    task = ray.remote(**{"scheduling_strategy": "DEFAULT", **(options or _default_resources(len(calls)))})(
        work
    )
    running = [task.remote(*call) for call in calls]
    try:
        results: list[Result] = ray.get(running)
    except BaseException as error:  # After an interrupt, too, the tasks would go on in the cluster.
        # Only running tasks are cancelled: Ray aborts the driver if a task ends at the moment of its cancellation.
        for task_reference in ray.wait(running, num_returns=len(running), timeout=0)[1]:
            ray.cancel(task_reference)
        if isinstance(error, OutOfMemoryError | WorkerCrashedError):
            raise UserError(
                "The process of a probe was killed, most likely because it needed more memory than its machine has. "
                "Use a larger machine, fewer images, or fewer features of an early layer, such as --linear.dims 1024. "
                "Results of earlier probes are kept."
            ) from error
        raise ray_cluster.user_error(error) or error from None
    return results


def _default_resources(tasks: int) -> dict[str, float]:
    """Return a GPU for each task; without GPUs, half of a machine divided by the number of tasks."""
    machines = placement.machines()
    _, resources = extraction.actor_resources(machines.totals())
    if "num_gpus" not in resources:
        most = max(node.get("CPU", 0.0) for node in machines.for_work)
        resources = {"num_cpus": max(resources["num_cpus"], int(500 * most / tasks) / 1000)}
    return resources
