"""Sums in float64, empty clusters, and the numbers of the lloyd."""

from __future__ import annotations

import numpy as np
import pytest

from raysl.clustering import lloyd, update
from tests.clustering.blobs import blobs


@pytest.mark.parametrize("num_rows", [7, 900])
def test_sums_are_exact_however_few_or_many_rows(num_rows: int) -> None:
    rows_bd = blobs(num_rows)
    nearest_b = np.random.default_rng(0).integers(0, 5, num_rows)
    expected, found = np.zeros((6, 6)), np.zeros((6, 6))
    np.add.at(expected, nearest_b, rows_bd)
    update.add_rows(found, rows_bd, nearest_b)
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert not found[5].any()


def test_the_objective_needs_no_rows() -> None:
    rows_nd, centroids_kd = blobs(200), blobs(4, seed=1)
    nearest_n = np.random.default_rng(0).integers(0, 4, 200)
    sums_kd = np.zeros((4, 6))
    update.add_rows(sums_kd, rows_nd, nearest_n)
    square = float((rows_nd.astype(np.float64) ** 2).sum())
    found = update.objective(square, centroids_kd, sums_kd, np.bincount(nearest_n))
    expected = ((rows_nd.astype(np.float64) - centroids_kd[nearest_n]) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-12)


def test_large_clusters_are_split_for_empty_ones() -> None:
    counts_k = np.array([0, 100, 1, 0, 1])
    splits = update.plan_splits(counts_k, np.random.default_rng(0))
    assert [empty for empty, _ in splits] == [0, 3]
    assert splits[0][1] == 1
    centroids_kd = update.assemble([blobs(5)], splits[:1], spherical=False)
    np.testing.assert_allclose(np.abs(centroids_kd[0] / centroids_kd[1] - 1), 2 / 1024, rtol=1e-2)
    np.testing.assert_allclose((centroids_kd[0] + centroids_kd[1]) / 2, blobs(5)[1], rtol=1e-6)


def test_nothing_to_split_leaves_clusters_empty() -> None:
    assert update.plan_splits(np.array([0, 1, 1]), np.random.default_rng(0)) == ()


def test_chunks_cover_all_clusters() -> None:
    assert update.chunk_ranges(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert update.chunk_ranges(1, 3)[-1] == (0, 1)


def test_agreement_with_labels() -> None:
    pytest.importorskip("sklearn")
    labels_n = np.array([0, 0, 1, 1, 2, 2])
    assert lloyd.agreement(labels_n + 7, labels_n) == pytest.approx({"nmi": 1, "purity": 1})
    assert lloyd.agreement(np.zeros(6, np.int64), labels_n) == pytest.approx({"nmi": 0, "purity": 1 / 3})


def test_sizes() -> None:
    found = lloyd.sizes(np.array([4, 4, 0, 4]))
    assert found["empty"] == 1
    assert found["entropy_share"] == pytest.approx(np.log(3) / np.log(4))
    assert found["quantiles"]["100%"] == 4
