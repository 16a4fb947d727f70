"""Exact nearest centroids without most of the distances, once the clusters settle.

A row remembers a lower bound of its distance to all centroids but its own. When centroids have moved, the bound falls
by as much as the farthest of them has (Hamerly, "Making k-means even faster", SDM 2010); while the distance to its own
stays below it, no other has to be looked at. With many clusters that bound is soon worthless, because a few centroids
move far in every pass while most hardly move at all. So here those few are compared with every row, and the bound falls
by the farthest of the others. benchmarks/kmeans.py measures what is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysl.clustering.update import Integers, Singles

# Squared distances (b, m) in float32 and numbers (b, m) of the m nearest of some centroids.
Search = Callable[[Singles, int], tuple[Singles, Integers]]

# Shares of the centroids that may be compared with every row.
_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
# A pass that would save less than this share of the distances looks at all of them.
_LEAST_SAVED = 0.25
# Bounds are begun when fewer rows than this change their cluster: before, centroids move too far for them.
_SETTLING = 0.03
# Of faiss's squared distances, by the squares of the lengths: |x|^2 + |c|^2 - 2xc in float32.
_ROUNDING = 4e-6


@dataclass(frozen=True)
class Settled:
    """What is remembered of a pass.

    Args:
        centroids_kd: that rows were compared with.
        assigned_n: int32 (n,), the nearest.
        own_n: float32 (n,), the distance to it.
        other_n: float32 (n,), no other centroid is nearer than this; None when only the nearest was looked for.
        moved: rows that had another cluster in the pass before; None where that is not known.
    """

    centroids_kd: Singles
    assigned_n: npt.NDArray[np.int32]
    own_n: Singles
    other_n: Singles | None
    moved: int | None


class Nearest:
    """Assigns all rows once, block by block."""

    def __init__(
        self, before: Settled | None, centroids_kd: Singles, num_rows: int, index: Callable[[Singles], Search]
    ) -> None:
        """Decides which distances are needed.

        Args:
            before: the pass before over the same rows, if there was one.
            centroids_kd: to compare with.
            num_rows: of all blocks together.
            index: makes the search among some centroids.
        """
        self.before = before
        self.centroids_kd = centroids_kd
        self.search = index(centroids_kd)
        self.length = float(np.einsum("kd,kd->k", centroids_kd, centroids_kd).max())
        self.assigned_n = np.empty(num_rows, np.int32)
        self.own_n = np.empty(num_rows, np.float32)
        moved = None if before is None else before.moved
        settling = moved is not None and moved <= _SETTLING * num_rows
        self.other_n = np.empty(num_rows, np.float32) if settling else None
        self.far_m, self.fall = self._far()
        self.search_far = index(centroids_kd[self.far_m]) if len(self.far_m) else None
        self.looked_at = 0

    def _far(self) -> tuple[Integers, float]:
        """The centroids that are compared with every row, and how far the others have moved at most; infinity when
        bounds would save too little."""
        before, k = self.before, len(self.centroids_kd)
        nothing = np.empty(0, np.int64), np.inf
        if before is None or before.other_n is None or self.other_n is None or not len(self.assigned_n):
            return nothing
        difference_kd = self.centroids_kd.astype(np.float64) - before.centroids_kd
        drift_k = np.sqrt(np.einsum("kd,kd->k", difference_kd, difference_kd))
        slack_n = before.other_n - before.own_n - drift_k[before.assigned_n]
        farthest_k = np.argsort(-drift_k, kind="stable")
        costs = []
        for share in _SHARES:
            count = int(share * k)
            fall = float(drift_k[farthest_k[count]])
            costs.append((count / k + float((slack_n < fall).mean()), count, fall))
        cost, count, fall = min(costs)
        return (farthest_k[:count], fall) if cost <= 1 - _LEAST_SAVED else nothing

    def of(self, place: int, rows_bd: Singles) -> Integers:
        """int64 (b,): the nearest centroid of every row.

        Args:
            place: of the first row among all.
            rows_bd: float32.
        """
        part = slice(place, place + len(rows_bd))
        rounding = _ROUNDING * (float(np.einsum("bd,bd->b", rows_bd, rows_bd).max()) + self.length)
        if np.isinf(self.fall):
            nearest_b, own_b, other_b = self._all(rows_bd, rounding)
        else:
            nearest_b, own_b, other_b = self._some(part, rows_bd, rounding)
        self.assigned_n[part], self.own_n[part] = nearest_b, own_b
        if self.other_n is not None:
            self.other_n[part] = other_b
        return nearest_b

    def _all(self, rows_bd: Singles, rounding: float) -> tuple[Integers, Singles, Singles]:
        """Nearest, its distance, and a lower bound of all others, from the distances to all centroids."""
        two = self.other_n is not None and len(self.centroids_kd) > 1
        squared_bm, nearest_bm = self.search(rows_bd, 2 if two else 1)
        self.looked_at += len(rows_bd) * len(self.centroids_kd)
        own_b = np.sqrt(np.maximum(squared_bm[:, 0], 0))
        other_b = np.sqrt(np.maximum(squared_bm[:, 1] - rounding, 0)) if two else np.full_like(own_b, np.inf)
        return nearest_bm[:, 0], own_b, other_b

    def _some(self, part: slice, rows_bd: Singles, rounding: float) -> tuple[Integers, Singles, Singles]:
        """As `_all`, from the distances to the own centroid and to those that moved far, where these are enough."""
        assert self.before is not None
        assert self.before.other_n is not None
        nearest_b = self.before.assigned_n[part].astype(np.int64)
        difference_bd = rows_bd - self.centroids_kd[nearest_b]
        own_b = np.sqrt(np.einsum("bd,bd->b", difference_bd, difference_bd))
        other_b = self.before.other_n[part] - np.float32(self.fall)
        if self.search_far is not None:
            nearest_b, own_b, other_b = self._with_far(rows_bd, nearest_b, own_b, other_b, rounding)
        # The square of the distance is as exact as faiss's.
        open_b = np.flatnonzero(own_b**2 + rounding >= np.maximum(other_b, 0) ** 2)
        self.looked_at += len(rows_bd) * (1 + len(self.far_m))
        if len(open_b):
            nearest_b[open_b], own_b[open_b], other_b[open_b] = self._all(rows_bd[open_b], rounding)
        return nearest_b, own_b, other_b

    def _with_far(
        self, rows_bd: Singles, nearest_b: Integers, own_b: Singles, other_b: Singles, rounding: float
    ) -> tuple[Integers, Singles, Singles]:
        """Takes in the distances to the centroids that moved far. `other_b` covered all but those and the own."""
        assert self.search_far is not None
        squared_b2, place_b2 = self.search_far(rows_bd, min(2, len(self.far_m)))
        far_b2 = self.far_m[place_b2]
        # The nearest of them that is not the own centroid; the own may be among them.
        is_own_b = far_b2[:, 0] == nearest_b
        if squared_b2.shape[1] == 1:
            squared_b2 = np.column_stack([squared_b2, np.full(len(rows_bd), np.inf, np.float32)])
            far_b2 = np.column_stack([far_b2, far_b2])
        rival_b = np.where(is_own_b, far_b2[:, 1], far_b2[:, 0])
        rival2_b = np.where(is_own_b, squared_b2[:, 1], squared_b2[:, 0])
        wins_b = rival2_b < own_b**2
        # What is then left among them is no nearer than the second; the loser is known.
        beside_b = np.sqrt(np.maximum(np.where(wins_b, squared_b2[:, 1], rival2_b) - rounding, 0))
        beside_b = np.where(wins_b, np.minimum(beside_b, own_b), beside_b)
        winner_b = np.where(wins_b, np.sqrt(np.maximum(rival2_b, 0)), own_b)
        return np.where(wins_b, rival_b, nearest_b), winner_b, np.minimum(other_b, beside_b)

    def settled(self) -> Settled:
        """What the next pass wants to know, when all blocks have been seen."""
        moved = None if self.before is None else int((self.assigned_n != self.before.assigned_n).sum())
        return Settled(self.centroids_kd, self.assigned_n, self.own_n, self.other_n, moved)
