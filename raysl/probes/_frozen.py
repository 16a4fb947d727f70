"""Run a probe of frozen features, one layer after the other in this process or each in a task of Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysl import extraction, ray_cluster
from raysl.extraction import FeatureStore
from raysl.probes import FeatureProbe, Labelled, LabelledProbe, Row
from raysl.probes._task import run_tasks
from raysl.ray_cluster import placement, this_machine

# A probe may hold the features three times: as they are read, in its own order, and in its own format.
_COPIES = 3


@dataclass(frozen=True)
class StoredFeatures:
    """The stored features and the labels of a data set."""

    tables: Mapping[str, FeatureStore]  # features by feature spec; see `raysl.extraction.feature_spec`
    labels_n: NDArray[np.int64] | None  # see `Labelled.labels_n`; None if no probe needs labels
    fingerprint: str  # fingerprint of the data set

    def load(self, spec: str) -> Labelled:
        """Return the features of a feature spec, in memory."""
        assert self.labels_n is not None
        return Labelled(self.tables[spec].load(), self.labels_n, self.fingerprint)


def measure_layers(
    probe: LabelledProbe | FeatureProbe,
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

    Raises:
        UserError: the features or the labels do not suit the probe, or stored features are damaged.
    """
    if not layers:
        return []
    sets = (train, test) if isinstance(probe, LabelledProbe) else (test,)
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
    probe: LabelledProbe | FeatureProbe,
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
        if isinstance(probe, LabelledProbe):
            found = probe.run(train.load(spec), test.load(spec))
        else:
            found = probe.measure(test.tables[spec].load())
        return [replace(row, layer=layer) for row in found]
    finally:
        # Ray may use this process for a task that has one CPU.
        torch.set_num_threads(before)
