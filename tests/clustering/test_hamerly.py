"""Hamerly bounds save distances and never change the nearest centroid."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from raysl.clustering import update
from raysl.clustering.hamerly import Assigner, HamerlyBounds, Search
from tests.clustering.blobs import blobs


def index(centroids_md: NDArray[np.float32]) -> Search:
    """Brute force in float64."""

    def search(rows_bd: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        squared_bm = squares(rows_bd, centroids_md)
        nearest_bm = np.argsort(squared_bm, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(squared_bm, nearest_bm, 1).astype(np.float32), nearest_bm

    return search


def squares(rows_bd: NDArray[np.float32], centroids_md: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return squared distances, float64 (b, m)."""
    difference_bmd = rows_bd[:, None].astype(np.float64) - centroids_md[None]
    return np.einsum("bmd,bmd->bm", difference_bmd, difference_bmd)  # type: ignore[no-any-return]


def one_pass(
    before: HamerlyBounds | None, rows_nd: NDArray[np.float32], centroids_kd: NDArray[np.float32], block: int
) -> tuple[HamerlyBounds, float]:
    """Assign all rows in blocks; return the bounds, and the share of the distances that were computed."""
    assigner = Assigner(before, centroids_kd, len(rows_nd), index)
    for place in range(0, len(rows_nd), block):
        found_b = assigner.assign(place, rows_nd[place : place + block])
        assert (found_b == assigner.assigned_n[place : place + block]).all()
    return assigner.bounds(), assigner.computed / (len(rows_nd) * len(centroids_kd))


def check(bounds: HamerlyBounds, rows_nd: NDArray[np.float32], centroids_kd: NDArray[np.float32]) -> None:
    """Check that every row has its nearest centroid, up to rounding, and that no other is nearer than its bound."""
    squared_nk = squares(rows_nd, centroids_kd)
    chosen_n = squared_nk[np.arange(len(rows_nd)), bounds.assigned_n]
    assert (chosen_n <= squared_nk.min(1) + 1e-4).all()
    if bounds.other_n is not None:
        squared_nk[np.arange(len(rows_nd)), bounds.assigned_n] = np.inf
        assert (bounds.other_n <= np.sqrt(squared_nk.min(1)) + 1e-5).all()


@pytest.mark.parametrize("k", [1, 2, 40, 200])
def test_lloyd_with_bounds_is_lloyd(k: int) -> None:
    rows_nd = blobs(3000, dim=6, centers=30)
    centroids_kd = rows_nd[:k].copy()
    bounds, shares = None, []
    for _ in range(60):
        bounds, share = one_pass(bounds, rows_nd, centroids_kd, 700)
        check(bounds, rows_nd, centroids_kd)
        shares.append(share)
        sums_kd = np.zeros(centroids_kd.shape)
        update.add_rows(sums_kd, rows_nd, bounds.assigned_n.astype(np.int64))
        counts_k = np.bincount(bounds.assigned_n, minlength=k)
        centroids_kd = update.means(sums_kd, counts_k, centroids_kd, spherical=False)
    assert shares[0] == 1
    if k >= 40:
        assert min(shares) < 0.2


@pytest.mark.parametrize("jumping", [1, 5, 60])
def test_centroids_that_jump_are_compared_with_every_row(jumping: int) -> None:
    """As when empty clusters are split: some centroids move anywhere between two passes, the rest a little."""
    generator = np.random.default_rng(0)
    rows_nd = blobs(2000, dim=5, centers=40)
    centroids_kd = rows_nd[:100].copy()
    bounds = None
    for _ in range(12):
        bounds, _ = one_pass(bounds, rows_nd, centroids_kd, 512)
        check(bounds, rows_nd, centroids_kd)
        centroids_kd = centroids_kd + generator.normal(size=centroids_kd.shape).astype(np.float32) * 1e-3
        places = generator.choice(100, jumping, replace=False)
        centroids_kd[places] = rows_nd[generator.choice(2000, jumping, replace=False)]


def test_rows_that_lie_on_centroids_and_twins() -> None:
    """Distances of zero, and centroids at the same place."""
    rows_nd = np.repeat(blobs(50), 4, axis=0)
    centroids_kd = np.concatenate([rows_nd[::4], rows_nd[:3]])
    bounds = None
    for _ in range(5):
        bounds, _ = one_pass(bounds, rows_nd, centroids_kd, 64)
        check(bounds, rows_nd, centroids_kd)
