"""On a small machine, a run is trained, probed, and made into features by this process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import raysl
from raysl.dataset import DataSet
from raysl.ray_cluster import this_machine
from tests.data import make_dataset

FIELDS: dict[str, Any] = {"epochs": 1, "view": {"image_size": 16}, "method": "predict-rotation"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 64)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that needs no Ray, where the start of Ray fails the test."""
    monkeypatch.setattr(this_machine, "needs_ray", lambda: False)
    monkeypatch.setattr("raysl.ray_cluster.start", lambda *_: pytest.fail("Ray starts"))
    # Other tests of this process may have started one.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_run_its_probes_and_its_features_need_no_ray(dataset: DataSet, tmp_path: Path) -> None:
    run = raysl.pretrain(dataset, tmp_path / "run", **FIELDS)
    assert run.config().workers == 1
    test = make_dataset(tmp_path / "test", 32, seed=1)
    protocol = {"shares": (0.5,), "epochs": 1}
    rows = raysl.probe(run, dataset, test, ("knn", "semisup"), semisup=protocol)
    assert {row["probe"] for row in rows} == {"knn", "semisup"}
    whole = raysl.features(run, dataset, tmp_path / "whole")
    reduced = raysl.features(run, dataset, tmp_path / "reduced", pca=3)
    assert (whole.num_rows, reduced.dim) == (64, 3)
    assert np.isfinite(reduced.load()).all()
