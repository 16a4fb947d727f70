"""k-nearest-neighbor classification against a direct count, and edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from raysl.probes import Labeled, Row, knn


def random_set(n: int, classes: int, seed: int) -> Labeled:
    random = np.random.default_rng(seed)
    return Labeled(random.normal(size=(n, 12)).astype(np.float32), random.integers(0, classes, n))


def values(train: Labeled, test: Labeled, config: knn.Config | None = None) -> dict[str, float]:
    return {row.name: row.value for row in knn.Knn(config or knn.Config()).run(train, test)}


def by_hand(
    train: Labeled, test: Labeled, k: int, temperature: float, own: bool = False
) -> tuple[float, float]:
    """Top-1 and top-5, one query at a time."""
    classes = int(train.labels_n.max()) + 1
    units = [x.features_nd / np.linalg.norm(x.features_nd, axis=1, keepdims=True) for x in (train, test)]
    hits = {1: 0, 5: 0}
    for query in range(len(test.labels_n)):
        similar = units[0].astype(np.float64) @ units[1][query]
        if own:
            similar[query] = -np.inf
        scores = np.zeros(classes)
        for neighbor in np.argsort(-similar)[:k]:
            scores[train.labels_n[neighbor]] += np.exp(similar[neighbor] / temperature)
        ranked = [c for c in np.argsort(-scores, kind="stable") if scores[c] > 0]
        for top in hits:
            hits[top] += int(test.labels_n[query] in ranked[:top])
    return hits[1] / len(test.labels_n), hits[5] / len(test.labels_n)


@pytest.mark.parametrize("tiles", [(1 << 16, 1 << 9), (37, 16)])
def test_equals_a_direct_count(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_TRAIN_TILE", tiles[0])
    monkeypatch.setattr(knn, "_QUERY_TILE", tiles[1])
    train, test = random_set(120, 8, 0), random_set(50, 8, 1)
    found = values(train, test, knn.Config((5, 1, 40), (0.07, 0.5)))
    for k in (5, 1, 40):
        for temperature in (0.07, 0.5):
            top1, top5 = by_hand(train, test, k, temperature)
            assert found[f"top1/k={k},T={temperature}"] == pytest.approx(top1)
            assert found[f"top5/k={k},T={temperature}"] == pytest.approx(top5)


@pytest.mark.parametrize("tiles", [(1 << 16, 1 << 9), (37, 16)])
def test_an_image_is_not_its_own_neighbor(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_TRAIN_TILE", tiles[0])
    monkeypatch.setattr(knn, "_QUERY_TILE", tiles[1])
    data = random_set(90, 8, 2)
    same = Labeled(data.features_nd, data.labels_n, "a")
    found = values(same, Labeled(data.features_nd, data.labels_n, "a"))
    for k in (20, 1):
        assert found[f"top1/k={k},T=0.07"] == pytest.approx(by_hand(data, data, k, 0.07, own=True)[0])
    assert values(same, Labeled(data.features_nd, data.labels_n, "b"))["top1/k=1,T=0.07"] == 1


def test_k_is_clamped_to_the_train_set() -> None:
    train, test = random_set(7, 3, 3), random_set(20, 3, 4)
    found = values(train, test)
    assert found["top1/k=20,T=0.07"] == by_hand(train, test, 7, 0.07)[0]
    # The primary metric is clamped; other rows with too large a k are left out.
    assert "top1/k=1,T=0.07" in found
    assert "top1/k=200,T=0.07" not in found


def test_top5_needs_more_than_five_classes() -> None:
    assert not any(name.startswith("top5") for name in values(random_set(30, 5, 0), random_set(30, 5, 1)))


def test_a_low_temperature_does_not_overflow() -> None:
    train, test = random_set(60, 8, 0), random_set(40, 8, 1)
    coldest = values(train, test, knn.Config((20,), (1e-4,)))
    nearest = values(train, test, knn.Config((1,), (0.07,)))
    assert coldest["top1/k=20,T=0.0001"] == nearest["top1/k=1,T=0.07"]


def test_primary_metric_is_the_first_of_the_settings() -> None:
    rows = list(knn.Knn(knn.Config((3,), (0.2,))).run(random_set(9, 2, 0), random_set(9, 2, 1)))
    assert knn.Knn(knn.Config((3,), (0.2,))).primary_metric == rows[0].name == "top1/k=3,T=0.2"
    assert isinstance(rows[0], Row)


def test_settings_that_are_given_twice_count_once() -> None:
    train, test = random_set(30, 3, 0), random_set(20, 3, 1)
    assert values(train, test, knn.Config((5, 5), (0.1, 0.1))) == values(
        train, test, knn.Config((5,), (0.1,))
    )
