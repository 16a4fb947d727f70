"""Run the work of probes in tasks of Ray, or in this process on a machine that needs no Ray."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from raysl import extraction, ray_cluster
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import FeatureStore
from raysl.probes import FeatureProbe, Labeled, LabeledProbe, Row, Subject
from raysl.ray_cluster import placement, this_machine

C = TypeVar("C")
Result = TypeVar("Result")
# A probe may hold the features three times: as they are read, in its own order, and in its own format.
_COPIES = 3


class TaskProbe(Generic[C]):
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

    Raises UserError if a task raised it, or the process of a task was killed as often as Ray retries it.
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
        # Only running tasks are canceled: Ray aborts the driver if a task ends at the moment of its cancellation.
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


@dataclass(frozen=True)
class StoredFeatures:
    """The stored features and the labels of a data set."""

    tables: Mapping[str, FeatureStore]  # features by feature spec; see `raysl.extraction.feature_spec`
    labels_n: NDArray[np.int64] | None  # see `Labeled.labels_n`; None if no probe needs labels
    fingerprint: str  # fingerprint of the data set

    def load(self, spec: str) -> Labeled:
        """Return the features of a feature spec, in memory."""
        assert self.labels_n is not None
        return Labeled(self.tables[spec].load(), self.labels_n, self.fingerprint)


def measure_layers(
    probe: LabeledProbe | FeatureProbe,
    layers: Sequence[str],
    train: StoredFeatures,
    test: StoredFeatures,
    low_priority: bool,
    in_process: bool = False,
) -> list[Row]:
    """Return the rows of a probe for each layer.

    Args:
        low_priority: trainers need the CPUs and GPUs, so a task has one thread of the lowest priority.
        in_process: compute in this process, with its threads, instead of tasks of Ray, as on a machine that needs none.

    Raises UserError if the features or the labels do not suit the probe, or stored features are damaged.
    """
    if not layers:
        return []
    sets = (train, test) if isinstance(probe, LabeledProbe) else (test,)
    specs = [extraction.feature_spec(layer, probe.dims) for layer in layers]
    pairs = list(zip(layers, specs, strict=True))
    if in_process or not (low_priority or this_machine.needs_ray()):
        threads = placement.assigned_cpus()
        found = (_measure(probe, layer, spec, train, test, threads, False) for layer, spec in pairs)
        return [row for rows in found for row in rows]
    ray_cluster.start()
    machines = placement.machines()
    threads = 1 if low_priority else _threads_per_task(machines.for_work, len(layers))
    calls = [(probe, layer, spec, train, test, threads, low_priority) for layer, spec in pairs]
    _, share = extraction.actor_resources(machines.totals())
    needed_bytes = max(sum(_COPIES * 4 * one.tables[spec].num_values for one in sets) for spec in specs)
    options: dict[str, Any] = {
        **({"num_cpus": 0.0} if low_priority else share),
        # Two tasks that do not fit into a machine together wait for each other.
        "memory": min(needed_bytes, _largest_memory(machines.for_work, share["num_cpus"])),
        "scheduling_strategy": "SPREAD",
    }
    if low_priority:
        options["max_calls"] = 1  # The next task of the process must not inherit the priority.
    return [row for rows in run_tasks(_measure, calls, options) for row in rows]


def _threads_per_task(nodes: Iterable[Mapping[str, float]], tasks: int) -> int:
    """Return the threads of each task if the tasks are spread over idle machines."""
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    return max(1, int(max(cpus) / math.ceil(tasks / len(cpus))))


def _largest_memory(nodes: Iterable[Mapping[str, float]], cpus: float) -> float:
    """Return the memory of the largest machine that has so many CPUs, in bytes."""
    working = [node for node in nodes if node.get("CPU", 0.0) >= max(cpus, 1e-3)]
    return max((node.get("memory", 0.0) for node in working), default=0.0)


def _measure(
    probe: LabeledProbe | FeatureProbe,
    layer: str,
    spec: str,
    train: StoredFeatures,
    test: StoredFeatures,
    threads: int,
    low_priority: bool,
) -> list[Row]:
    if low_priority:
        os.nice(19)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if isinstance(probe, LabeledProbe):
            found = probe.run(train.load(spec), test.load(spec))
        else:
            found = probe.measure(test.tables[spec].load())
        return [replace(row, layer=layer) for row in found]
    finally:
        # Ray may use this process for a task that has one CPU.
        torch.set_num_threads(before)
