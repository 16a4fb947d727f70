"""The step from assignments to centroids: pure functions on arrays, the same in the driver and in every actor.

Centroids travel in chunks, one for each actor. Where a cluster is empty the chunks still hold its old centroid; the
splits say which cluster gives it half of its rows, and whoever puts the chunks together carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
# (empty cluster, cluster that is split), in the order in which they are carried out.
Splits = tuple[tuple[int, int], ...]

# faiss, Clustering.cpp: both halves of a split cluster move by this share of their length.
_NUDGE = 1 / 1024


def bounds(k: int, chunks: int) -> list[tuple[int, int]]:
    """First cluster and cluster after the last of each chunk; with fewer clusters than chunks some are empty."""
    edges = [k * i // chunks for i in range(chunks + 1)]
    return list(pairwise(edges))


def add_rows(sums_kd: Doubles, rows_bd: Singles, nearest_b: Integers) -> None:
    """Adds each row to the sum of its cluster, in float64."""
    k = len(sums_kd)
    order = np.argsort(nearest_b, kind="stable")
    starts = np.searchsorted(nearest_b[order], np.arange(k + 1))
    present = np.flatnonzero(np.diff(starts))
    if len(rows_bd) > 16 * k:
        # One call for each cluster costs less than a float64 copy of all rows, where a cluster has many of them.
        for cluster in present:
            members = order[starts[cluster] : starts[cluster + 1]]
            sums_kd[cluster] += rows_bd[members].sum(axis=0, dtype=np.float64)
    else:
        sums_kd[present] += np.add.reduceat(rows_bd[order].astype(np.float64), starts[present], axis=0)


def objective(square: float, centroids_kd: Singles, sums_kd: Doubles, counts_k: Integers) -> float:
    """Sum over rows of the squared distance to their centroid, in float64, without looking at the rows again.

    Args:
        square: sum of the squares of all numbers in the rows.
    """
    lengths_k = np.einsum("kd,kd->k", centroids_kd, centroids_kd, dtype=np.float64)
    crossed = np.einsum("kd,kd->", centroids_kd, sums_kd, dtype=np.float64)
    return float(square - 2 * crossed + counts_k @ lengths_k)


def means(sums_kd: Doubles, counts_k: Integers, old_kd: Singles, spherical: bool) -> Singles:
    """float32 (k, d): the centroids of a chunk; an empty cluster keeps its old one."""
    new_kd = sums_kd / np.maximum(counts_k, 1)[:, None]
    if spherical:
        new_kd = unit(new_kd)
    new_kd[counts_k == 0] = old_kd[counts_k == 0]
    return new_kd.astype(np.float32)


def unit(rows_nd: Doubles) -> Doubles:
    """Rows at length 1; rows of zeros stay as they are."""
    lengths_n = np.sqrt(np.einsum("nd,nd->n", rows_nd, rows_nd))
    return rows_nd / np.where(lengths_n == 0, 1, lengths_n)[:, None]


def plan_splits(counts_k: Integers, generator: np.random.Generator) -> Splits:
    """A cluster to split for each empty one, chosen with a chance in proportion to its size less one.

    The rule of faiss (Clustering.cpp, split_clusters), which draws in another way. Each split halves the size that
    later draws see. An empty cluster stays empty when no cluster has two rows.
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


def assemble(chunks: Sequence[Singles], splits: Splits, spherical: bool) -> Singles:
    """float32 (k, d): all centroids, with the splits carried out."""
    centroids_kd = np.concatenate(chunks)
    sign_d = np.where(np.arange(centroids_kd.shape[1]) % 2 == 0, 1, -1)
    for empty, donor in splits:
        middle_d = centroids_kd[donor].astype(np.float64)
        halves_2d = np.stack([middle_d * (1 + sign_d * _NUDGE), middle_d * (1 - sign_d * _NUDGE)])
        centroids_kd[[empty, donor]] = unit(halves_2d) if spherical else halves_2d
    return centroids_kd
