"""A clustering equals Lloyd's in one process, on any number of actors and through any interruption."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysl import rng
from raysl.errors import UserError
from raysl.kmeans import KMeansConfig, assign, driver, fit
from raysl.kmeans.crew import Crew, share
from raysl.kmeans.driver import HEADER, Clustering
from tests.kmeans.blobs import blobs, curve, lloyd, write

pytestmark = pytest.mark.ray
X = blobs(301)
ONE = KMeansConfig(k=12, iterations=6, tolerance=0, actors=2)


def quiet(line: str) -> None:
    """Takes a line of progress."""


def starting(config: KMeansConfig, rows_nd: Any) -> Any:
    """The rows that `init.random_rows` takes."""
    generator = rng.generator(config.seed, "kmeans", "rows", 0)
    return rows_nd[generator.choice(len(rows_nd), config.k, replace=False)]


def table(clustering: Clustering) -> Any:
    return pq.read_table(clustering.assignments)


@pytest.mark.parametrize("actors", [1, 2, 3, 4])
def test_equal_to_lloyd_in_one_process(ray_session: None, tmp_path: Path, actors: int) -> None:
    config = KMeansConfig(k=12, iterations=6, tolerance=0, actors=actors)
    done = fit(write(tmp_path / "f", X), config, str(tmp_path / "out"), quiet)
    objectives, centroids_kd = lloyd(X, starting(config, X), config, 6)
    np.testing.assert_allclose(curve(done.card()), objectives, rtol=1e-5)
    np.testing.assert_allclose(done.centroids(), centroids_kd, rtol=1e-4, atol=1e-5)
    distances = np.linalg.norm(X[:, None].astype(np.float64) - centroids_kd[None], axis=2)
    found = table(done)
    assert found.column("index").to_pylist() == list(range(301))
    assert found.column("cluster").to_pylist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.column("distance").to_numpy(), distances.min(axis=1), rtol=1e-4)
    assert found.schema.metadata[b"K"] == b"12"
    np.testing.assert_allclose(done.card()["objective_value"], (distances.min(axis=1) ** 2).sum(), rtol=1e-5)
