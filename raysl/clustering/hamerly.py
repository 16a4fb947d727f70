"""Exact nearest centroids with few distances, once the clusters are nearly stable.

A row keeps a lower bound of its distance to all centroids but its own. When centroids move, the bound decreases by the
largest movement (Hamerly, "Making k-means even faster", SDM 2010). While the distance to its own centroid is below the
bound, no other centroid needs to be compared. With many clusters the bound soon becomes useless, because a few
centroids move far in every pass while most hardly move. So these few are compared with every row, and the bound
decreases by the largest movement of the others. benchmarks/kmeans.py measures the savings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Squared distances (b, m) in float32, and numbers (b, m), of the m nearest centroids.
Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]

# Shares of the centroids that may be compared with every row.
_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
# A pass that would save a smaller share of the distances computes all of them.
_MIN_SAVED = 0.25
# Bounds start when fewer rows than this share change their cluster. Before, centroids move too far.
_MOVED = 0.03
# Error of FAISS's squared distances, |x|^2 + |c|^2 - 2xc in float32, relative to the squared norms.
_ROUNDING = 4e-6


@dataclass(frozen=True)
class HamerlyBounds:
    """Results of a pass that the next pass needs."""

    centroids_kd: NDArray[np.float32]  # centroids of the pass
    assigned_n: NDArray[np.int32]  # int32 (n,), nearest centroid
    own_n: NDArray[np.float32]  # float32 (n,), distance to it
    # float32 (n,), lower bound of the distance to all others; None if only the nearest was searched.
    other_n: NDArray[np.float32] | None
    moved: int | None  # rows in another cluster than in the pass before; None if unknown


class Assigner:
    """Assign all rows once, block by block.

    Args:
        before: results of the previous pass over the same rows, if any.
        index: makes the search among some centroids.
    """

    def __init__(
        self,
        before: HamerlyBounds | None,
        centroids_kd: NDArray[np.float32],
        num_rows: int,
        index: Callable[[NDArray[np.float32]], Search],
    ) -> None:
        self.before = before
        self.centroids_kd = centroids_kd
        self.search = index(centroids_kd)
        self.square = float(np.einsum("kd,kd->k", centroids_kd, centroids_kd).max())
        self.assigned_n = np.empty(num_rows, np.int32)
        self.own_n = np.empty(num_rows, np.float32)
        moved = None if before is None else before.moved
        is_stable = moved is not None and moved <= _MOVED * num_rows
        self.other_n = np.empty(num_rows, np.float32) if is_stable else None
        self.far_m, self.decrease = self._far()
        self.search_far = index(centroids_kd[self.far_m]) if len(self.far_m) else None
        self.computed = 0

    def _far(self) -> tuple[NDArray[np.int64], float]:
        """Return the centroids to compare with every row, and the largest movement of the others.

        The movement is infinite if bounds would save too little.
        """
        before, k = self.before, len(self.centroids_kd)
        nothing = np.empty(0, np.int64), np.inf
        if before is None or before.other_n is None or self.other_n is None or not len(self.assigned_n):
            return nothing
        difference_kd = self.centroids_kd.astype(np.float64) - before.centroids_kd
        moved_k = np.sqrt(np.einsum("kd,kd->k", difference_kd, difference_kd))
        slack_n = before.other_n - before.own_n - moved_k[before.assigned_n]
        order_k = np.argsort(-moved_k, kind="stable")
        costs = []
        for share in _SHARES:
            count = int(share * k)
            decrease = float(moved_k[order_k[count]])
            costs.append((count / k + float((slack_n < decrease).mean()), count, decrease))
        cost, count, decrease = min(costs)
        return (order_k[:count], decrease) if cost <= 1 - _MIN_SAVED else nothing

    def assign(self, first: int, rows_bd: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the nearest centroid of every row of a block, int64 (b,); `first` is the number of its first row."""
        part = slice(first, first + len(rows_bd))
        rounding = _ROUNDING * (float(np.einsum("bd,bd->b", rows_bd, rows_bd).max()) + self.square)
        if np.isinf(self.decrease):
            nearest_b, own_b, other_b = self._all(rows_bd, rounding)
        else:
            nearest_b, own_b, other_b = self._some(part, rows_bd, rounding)
        self.assigned_n[part], self.own_n[part] = nearest_b, own_b
        if self.other_n is not None:
            self.other_n[part] = other_b
        return nearest_b

    def _all(
        self, rows_bd: NDArray[np.float32], rounding: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Compute all distances. Return the nearest centroids, their distances, and lower bounds for all others."""
        two = self.other_n is not None and len(self.centroids_kd) > 1
        squared_bm, nearest_bm = self.search(rows_bd, 2 if two else 1)
        self.computed += len(rows_bd) * len(self.centroids_kd)
        own_b = np.sqrt(np.maximum(squared_bm[:, 0], 0))
        other_b = np.sqrt(np.maximum(squared_bm[:, 1] - rounding, 0)) if two else np.full_like(own_b, np.inf)
        return nearest_bm[:, 0], own_b, other_b

    def _some(
        self, part: slice, rows_bd: NDArray[np.float32], rounding: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Return the same as `_all`, from the distances to the previous and the far centroids where these suffice."""
        assert self.before is not None
        assert self.before.other_n is not None
        nearest_b = self.before.assigned_n[part].astype(np.int64)
        difference_bd = rows_bd - self.centroids_kd[nearest_b]
        own_b = np.sqrt(np.einsum("bd,bd->b", difference_bd, difference_bd))
        other_b = self.before.other_n[part] - np.float32(self.decrease)
        if self.search_far is not None:
            nearest_b, own_b, other_b = self._with_far(rows_bd, nearest_b, own_b, other_b, rounding)
        # The squared distance is as exact as that of FAISS.
        open_b = np.flatnonzero(own_b**2 + rounding >= np.maximum(other_b, 0) ** 2)
        self.computed += len(rows_bd) * (1 + len(self.far_m))
        if len(open_b):
            nearest_b[open_b], own_b[open_b], other_b[open_b] = self._all(rows_bd[open_b], rounding)
        return nearest_b, own_b, other_b

    def _with_far(
        self,
        rows_bd: NDArray[np.float32],
        nearest_b: NDArray[np.int64],
        own_b: NDArray[np.float32],
        other_b: NDArray[np.float32],
        rounding: float,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Add the distances to the far centroids. `other_b` bounds all others except these and the own."""
        assert self.search_far is not None
        squared_b2, place_b2 = self.search_far(rows_bd, min(2, len(self.far_m)))
        far_b2 = self.far_m[place_b2]
        # The own centroid may be among the far ones; the rival is the nearest other.
        is_own_b = far_b2[:, 0] == nearest_b
        if squared_b2.shape[1] == 1:
            squared_b2 = np.column_stack([squared_b2, np.full(len(rows_bd), np.inf, np.float32)])
            far_b2 = np.column_stack([far_b2, far_b2])
        rival_b = np.where(is_own_b, far_b2[:, 1], far_b2[:, 0])
        rival2_b = np.where(is_own_b, squared_b2[:, 1], squared_b2[:, 0])
        wins_b = rival2_b < own_b**2
        # The remaining far centroids are no nearer than the second; the loser is known.
        beside_b = np.sqrt(np.maximum(np.where(wins_b, squared_b2[:, 1], rival2_b) - rounding, 0))
        beside_b = np.where(wins_b, np.minimum(beside_b, own_b), beside_b)
        winner_b = np.where(wins_b, np.sqrt(np.maximum(rival2_b, 0)), own_b)
        return np.where(wins_b, rival_b, nearest_b), winner_b, np.minimum(other_b, beside_b)

    def bounds(self) -> HamerlyBounds:
        """Return the results for the next pass, after all blocks."""
        moved = None if self.before is None else int((self.assigned_n != self.before.assigned_n).sum())
        return HamerlyBounds(self.centroids_kd, self.assigned_n, self.own_n, self.other_n, moved)
