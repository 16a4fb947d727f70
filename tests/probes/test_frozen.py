"""Probes of features run in Ray tasks and give the same rows as in the driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raysl.errors import UserError
from raysl.probes import Labeled, Row
from raysl.probes import _task as frozen
from raysl.probes._task import StoredFeatures, measure_layers
from raysl.probes.collapse import Collapse
from raysl.probes.collapse import Config as CollapseConfig
from raysl.probes.knn import Config as KnnConfig
from raysl.probes.knn import Knn
from raysl.ray_cluster import placement
from raysl.ray_cluster.placement import Machines
from raysl.storage import Folder
from raysl.storage.feature_files import FeatureForm, part_file, write_part
from raysl.storage.feature_store import FeatureStore

LAYERS = {"res2": 12, "pooled": 6}


class Traced:
    """A probe that reports its process."""

    primary_metric = "pid"
    dims = 0

    def measure(self, features_nd: NDArray[np.float32]) -> Iterator[Row]:
        """Yields the process, its niceness and its threads."""
        yield Row("pid", os.getpid())
        yield Row("nice", os.getpriority(os.PRIO_PROCESS, 0))
        yield Row("threads", torch.get_num_threads())


def make(folder: Path, images: int, seed: int) -> StoredFeatures:
    """Drawn features of two layers, in two parts."""
    image_rng = np.random.default_rng(seed)
    parts, tables = ((0, images // 2), (images // 2, images)), {}
    for layer, dim in LAYERS.items():
        place = Folder(str(folder / layer))
        for first, end in parts:
            values_nd = image_rng.normal(size=(end - first, dim)).astype(np.float32)
            write_part(place, (first, end), layer, values_nd, FeatureForm())
        tables[layer] = FeatureStore.open(str(place))
    return StoredFeatures(tables, image_rng.integers(0, 4, images), f"set {seed}")


def traced(sets: tuple[StoredFeatures, StoredFeatures], low_priority: bool) -> dict[str, float]:
    return {row.name: row.value for row in measure_layers(Traced(), ["pooled"], *sets, low_priority)}


@pytest.fixture
def sets(tmp_path: Path) -> tuple[StoredFeatures, StoredFeatures]:
    return make(tmp_path / "train", 60, 0), make(tmp_path / "test", 20, 1)


@pytest.mark.ray
def test_rows_equal_those_of_the_driver(
    ray_session: None, sets: tuple[StoredFeatures, StoredFeatures]
) -> None:
    knn, collapse = Knn(KnnConfig(ks=(3, 1))), Collapse(CollapseConfig())
    found = [measure_layers(one, list(LAYERS), *sets, False) for one in (knn, collapse)]
    for layer in LAYERS:
        train, test = (
            Labeled(one.tables[layer].load(), np.asarray(one.labels_n), one.fingerprint) for one in sets
        )
        for rows, wanted in zip(
            found, (knn.run(train, test), collapse.measure(test.features_nd)), strict=True
        ):
            of_layer = [row for row in rows if row.layer == layer]
            for row, other in zip(of_layer, wanted, strict=True):
                assert replace(row, value=0.0) == Row(other.name, 0.0, layer)
                assert row.value == pytest.approx(other.value, rel=1e-5)
    assert measure_layers(knn, [], *sets, False) == []


@pytest.mark.ray
def test_low_priority_is_that_of_a_task_and_does_not_outlast_it(
    ray_session: None, sets: tuple[StoredFeatures, StoredFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with monkeypatch.context() as small_machine:
        small_machine.delenv("RAY_ADDRESS")
        low = traced(sets, low_priority=True)
    after = traced(sets, low_priority=False)
    assert os.getpid() not in (low["pid"], after["pid"])
    assert (low["nice"], low["threads"]) == (19, 1)
    assert (after["nice"], after["threads"]) == (usual, 2)


def test_damaged_features_are_named(sets: tuple[StoredFeatures, StoredFeatures]) -> None:
    for one in sets:
        one.tables["pooled"].folder.write(part_file((0, len(np.asarray(one.labels_n)) // 2)), b"not parquet")
    with pytest.raises(UserError, match="damaged"):
        measure_layers(Knn(KnnConfig()), ["pooled"], *sets, False)


@pytest.mark.parametrize("low_priority", [True, False])
def test_a_task_asks_for_no_more_memory_than_a_machine_that_takes_work_has(
    sets: tuple[StoredFeatures, StoredFeatures], low_priority: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, float]] = []

    def run_tasks(work: object, calls: object, options: dict[str, float]) -> list[list[Row]]:
        asked.append(options)
        return []

    found = Machines(({"CPU": 0.0, "memory": 9e9}, {"CPU": 2.0, "memory": 100.0}))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("raysl.ray_cluster.start", lambda: None)
    monkeypatch.setattr(placement, "machines", lambda: found)
    monkeypatch.setattr(frozen, "run_tasks", run_tasks)
    assert traced(sets, low_priority) == {}
    assert asked[0]["memory"] == 100
