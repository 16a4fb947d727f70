"""Probes of frozen features on Ray, off the driver and the trainers: a task for each layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysl import extraction
from raysl.extraction import FeatureStore
from raysl.probes import FeatureProbe, Labelled, LabelledProbe, Row
from raysl.probes._task import elsewhere
from raysl.ray_cluster import placement

# A probe holds the features as they are read, in the order that it likes, and what it makes of them.
_COPIES = 3


@dataclass(frozen=True)
class Frozen:
    """The features of a data set where they lie, and its labels.

    Args:
        tables: by tap; see `raysl.extraction.feature_spec`.
        labels_n: as `Labelled.labels_n`; None where no probe needs them.
        fingerprint: of the data set.
    """

    tables: Mapping[str, FeatureStore]
    labels_n: npt.NDArray[np.int64] | None
    fingerprint: str

    def load(self, tap: str) -> Labelled:
        """The features of a tap, in memory."""
        assert self.labels_n is not None
        return Labelled(self.tables[tap].load(), self.labels_n, self.fingerprint)


def by_layer(
    probe: LabelledProbe | FeatureProbe, layers: Sequence[str], train: Frozen, test: Frozen, spare: bool
) -> list[Row]:
    """The rows of a probe, with their layers.

    Args:
        spare: whether trainers need the CPUs: then a task has one thread of the lowest priority.

    Raises:
        UserError: the features or the labels do not suit the probe, or features on disk are damaged.
    """
    if not layers:
        return []
    sets = (train, test) if isinstance(probe, LabelledProbe) else (test,)
    taps = [extraction.feature_spec(layer, probe.dims) for layer in layers]
    found = placement.machines()
    threads = 1 if spare else _threads(found.for_work, len(layers))
    calls = [
        (probe, layer, tap, train, test, threads, spare) for layer, tap in zip(layers, taps, strict=True)
    ]
    _, share = extraction.pool(found.totals())
    options: dict[str, Any] = {
        "num_cpus": 0.0 if spare else share["num_cpus"],
        # Two that do not fit into a machine together wait for each other.
        "memory": min(_bytes(taps, sets), _room(found.for_work, share["num_cpus"])),
        "scheduling_strategy": "SPREAD",
    }
    if spare:
        options["max_calls"] = 1  # what comes after shall not have this priority
    return [row for rows in elsewhere(_measure, calls, options) for row in rows]


def _threads(nodes: Iterable[Mapping[str, float]], tasks: int) -> int:
    """Threads of each of some tasks that are spread over machines and have these for themselves."""
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    return max(1, int(max(cpus) / math.ceil(tasks / len(cpus))))


def _room(nodes: Iterable[Mapping[str, float]], cpus: float) -> float:
    """Memory of the largest machine that has so many CPUs. A head without any takes no work, however large it is."""
    working = [node for node in nodes if node.get("CPU", 0.0) >= max(cpus, 1e-3)]
    return max((node.get("memory", 0.0) for node in working), default=0.0)


def _bytes(taps: Iterable[str], sets: Iterable[Frozen]) -> int:
    """Memory that the largest of some layers takes."""
    return max(sum(_COPIES * 4 * one.tables[tap].num_values for one in sets) for tap in taps)


def _measure(
    probe: LabelledProbe | FeatureProbe,
    layer: str,
    tap: str,
    train: Frozen,
    test: Frozen,
    threads: int,
    spare: bool,
) -> list[Row]:
    """The rows of one layer."""
    if spare:
        os.nice(19)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if isinstance(probe, LabelledProbe):
            found = probe.run(train.load(tap), test.load(tap))
        else:
            found = probe.measure(test.tables[tap].load())
        return [replace(row, layer=layer) for row in found]
    finally:
        # Ray may give this process to a task that has one CPU.
        torch.set_num_threads(before)
