"""Retrieval against a direct count."""

from __future__ import annotations

import numpy as np
import pytest

from raysl.probes import Labeled, multi_hot, retrieval


def random_set(n: int, seed: int, fingerprint: str = "") -> Labeled:
    random = np.random.default_rng(seed)
    return Labeled(
        random.normal(size=(n, 5)).astype(np.float32), random.integers(0, 4, n), fingerprint or str(seed)
    )


def values(train: Labeled, test: Labeled, config: retrieval.Config | None = None) -> dict[str, float]:
    found = retrieval.Retrieval(config or retrieval.Config()).run(train, test)
    return {row.name: row.value for row in found}


def by_hand(train: Labeled, test: Labeled, k: int, own: bool = False) -> tuple[float, float]:
    """mAP and precision at k, one query and one rank at a time."""
    units = [
        x.features_nd.astype(np.float64) / np.linalg.norm(x.features_nd, axis=1, keepdims=True)
        for x in (train, test)
    ]
    means, shares = [], []
    for query, label in enumerate(test.labels_n):
        ranked = np.argsort(-(units[0] @ units[1][query]))
        right = [train.labels_n[i] == label for i in ranked if not (own and i == query)]
        found = [sum(right[: rank + 1]) / (rank + 1) for rank in range(len(right)) if right[rank]]
        means.append(np.mean(found) if found else 0.0)
        shares.append(np.mean(right[:k]))
    return float(np.mean(means)), float(np.mean(shares))


@pytest.mark.parametrize("tile", [256, 7])
def test_equals_a_direct_count(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_TILE", tile)
    train, test = random_set(90, 0), random_set(40, 1)
    found = values(train, test, retrieval.Config(ks=(3,)))
    assert (found["mAP"], found["precision/k=3"]) == pytest.approx(by_hand(train, test, 3))


def test_a_query_does_not_find_itself() -> None:
    data = random_set(50, 2)
    found = values(data, data, retrieval.Config(ks=(3,)))
    assert (found["mAP"], found["precision/k=3"]) == pytest.approx(by_hand(data, data, 3, own=True))


def test_images_that_share_a_class_are_right() -> None:
    train, test = random_set(60, 0), random_set(30, 1)
    plain = values(train, test)
    one, other = (Labeled(x.features_nd, multi_hot(x.labels_n, 4)) for x in (train, test))
    assert values(one, other) == plain
    one.labels_n[:, 0] = other.labels_n[:, 0] = 1
    assert values(one, other)["mAP"] == 1


def test_queries_are_a_sample_and_k_is_clamped() -> None:
    train, test = random_set(5, 0), random_set(300, 1)
    few = values(train, test, retrieval.Config(ks=(5, 99), max_queries=10))
    assert few["precision/k=99"] == few["precision/k=5"]
    assert few["mAP"] != values(train, test)["mAP"]


def test_nearest_images_are_those_of_the_ranking() -> None:
    gallery, queries = random_set(30, 0).features_nd, random_set(4, 1).features_nd
    cosine_qk, index_qk = retrieval.nearest(queries, gallery, 5)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    assert index_qk.tolist() == np.argsort(-(units[0] @ units[1].T))[:, :5].tolist()
    assert cosine_qk[0, 0] == pytest.approx(float(units[0][0] @ units[1][index_qk[0, 0]]))
    own = np.array([7, 3])
    assert not (retrieval.nearest(gallery[own], gallery, 5, own)[1] == own[:, None]).any()
