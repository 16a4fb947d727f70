"""Features on disk, and a reference k-means in one process and float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysl import rng
from raysl.clustering import update
from raysl.clustering.options import KMeansConfig


def blobs(num_rows: int, dim: int = 6, centers: int = 8, seed: int = 0) -> NDArray[np.float32]:
    """Return normal clouds around some centers, float32 (num_rows, dim)."""
    generator = np.random.default_rng(seed)
    middle = generator.normal(size=(centers, dim)) * 3
    return (middle[generator.integers(0, centers, num_rows)] + generator.normal(size=(num_rows, dim))).astype(
        np.float32
    )


def write(folder: Path, rows_nd: NDArray[Any], files: int = 2, rows_per_group: int = 30) -> str:
    """Write Parquet files of features, in which row i has index i; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows_nd)), files)):
        values = pa.array(rows_nd[part].ravel())
        column = pa.FixedSizeListArray.from_arrays(values, rows_nd.shape[1])
        table = pa.table({"index": part, "pooled": column})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=rows_per_group)
    return str(folder)


def lloyd(
    rows_nd: NDArray[np.float32], start_kd: NDArray[np.float32], config: KMeansConfig, iterations: int
) -> tuple[list[float], NDArray[np.float64]]:
    """Return the objective of each iteration and the last centroids, in float64. Empty clusters split as in raysl."""
    x, c = rows_nd.astype(np.float64), start_kd.astype(np.float64)
    objectives = []
    for iteration in range(iterations):
        squared = ((x[:, None] - c[None]) ** 2).sum(axis=2)
        nearest = squared.argmin(axis=1)
        objectives.append(float(squared.min(axis=1).sum()))
        counts = np.bincount(nearest, minlength=len(c))
        c = np.stack([x[nearest == k].mean(axis=0) if counts[k] else c[k] for k in range(len(c))])
        c = update.unit(c) if config.spherical else c
        generator = rng.generator(config.seed, "kmeans", "splits", 0, iteration)
        splits = update.plan_splits(counts, generator)
        c = update.assemble([c.astype(np.float32)], splits, config.spherical).astype(np.float64)
    return objectives, c


def curve(summary: dict[str, Any], start: int = 0) -> Sequence[float]:
    """Return the objectives of a start."""
    return [entry["objective"] for entry in summary["curves"][start]]
