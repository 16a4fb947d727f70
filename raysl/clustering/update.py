"""The step from assignments to centroids: pure functions on arrays, the same in the driver and in every actor.

Centroids are sent in chunks. For an empty cluster a chunk holds the old centroid; the splits name the cluster that
gives it half of its rows, and `assemble` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# (empty cluster, cluster to split), in order.
Splits = tuple[tuple[int, int], ...]

# FAISS, Clustering.cpp: both halves of a split cluster move by this share of their values.
_NUDGE = 1 / 1024


def chunk_ranges(k: int, chunks: int) -> list[tuple[int, int]]:
    """Return the first cluster of each chunk and the cluster after its last. Some chunks are empty if k < chunks."""
    edges = [k * i // chunks for i in range(chunks + 1)]
    return list(pairwise(edges))


def add_rows(
    sums_kd: NDArray[np.float64], rows_bd: NDArray[np.float32], nearest_b: NDArray[np.int64]
) -> None:
    """Add each row to the sum of its cluster, in float64."""
    k = len(sums_kd)
    order = np.argsort(nearest_b, kind="stable")
    starts = np.searchsorted(nearest_b[order], np.arange(k + 1))
    present = np.flatnonzero(np.diff(starts))
    if len(rows_bd) > 16 * k:
        # With many rows per cluster, one call for each cluster costs less than a float64 copy of all rows.
        for cluster in present:
            members = order[starts[cluster] : starts[cluster + 1]]
            sums_kd[cluster] += rows_bd[members].sum(axis=0, dtype=np.float64)
    else:
        sums_kd[present] += np.add.reduceat(rows_bd[order].astype(np.float64), starts[present], axis=0)


def objective(
    square: float,
    centroids_kd: NDArray[np.float32],
    sums_kd: NDArray[np.float64],
    counts_k: NDArray[np.int64],
) -> float:
    """Return the sum of the squared distances of rows to their centroids, in float64, without reading the rows.

    Args:
        square: sum of the squares of all numbers in the rows.
    """
    lengths_k = np.einsum("kd,kd->k", centroids_kd, centroids_kd, dtype=np.float64)
    crossed = np.einsum("kd,kd->", centroids_kd, sums_kd, dtype=np.float64)
    return float(square - 2 * crossed + counts_k @ lengths_k)


def total(sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the sums over all actors, added in the order of the actors."""
    return np.sum(sums, axis=0) if len(sums) > 1 else sums[0]


def means(
    sums_kd: NDArray[np.float64], counts_k: NDArray[np.int64], old_kd: NDArray[np.float32], spherical: bool
) -> NDArray[np.float32]:
    """Return the centroids of a chunk, float32 (k, d). An empty cluster keeps its old centroid."""
    new_kd = sums_kd / np.maximum(counts_k, 1)[:, None]
    if spherical:
        new_kd = unit(new_kd)
    new_kd[counts_k == 0] = old_kd[counts_k == 0]
    return new_kd.astype(np.float32)


def unit(rows_nd: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows scaled to norm 1. Rows of zeros stay unchanged."""
    lengths_n = np.sqrt(np.einsum("nd,nd->n", rows_nd, rows_nd))
    return rows_nd / np.where(lengths_n == 0, 1, lengths_n)[:, None]


def plan_splits(counts_k: NDArray[np.int64], generator: np.random.Generator) -> Splits:
    """Choose a cluster to split for each empty one, with a probability proportional to its size minus one.

    The rule of FAISS (Clustering.cpp, split_clusters) with another order of draws. Each split halves the size for later
    draws. An empty cluster stays empty if no cluster has two rows.
    """
    sizes_k = counts_k.astype(np.float64)
    splits = []
    for empty in np.flatnonzero(counts_k == 0):
        chances_k = np.maximum(sizes_k - 1, 0)
        if chances_k.sum() == 0:
            break
        donor = int(np.searchsorted(np.cumsum(chances_k), generator.random() * chances_k.sum(), side="right"))
        splits.append((int(empty), donor))
        sizes_k[empty] = sizes_k[donor] // 2
        sizes_k[donor] -= sizes_k[empty]
    return tuple(splits)


def assemble(chunks: Sequence[NDArray[np.float32]], splits: Splits, spherical: bool) -> NDArray[np.float32]:
    """Return all centroids after the splits, float32 (k, d)."""
    centroids_kd = np.concatenate(chunks)
    sign_d = np.where(np.arange(centroids_kd.shape[1]) % 2 == 0, 1, -1)
    for empty, donor in splits:
        middle_d = centroids_kd[donor].astype(np.float64)
        halves_2d = np.stack([middle_d * (1 + sign_d * _NUDGE), middle_d * (1 - sign_d * _NUDGE)])
        centroids_kd[[empty, donor]] = unit(halves_2d) if spherical else halves_2d
    return centroids_kd
