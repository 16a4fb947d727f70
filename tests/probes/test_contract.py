"""What holds for every probe that is found by its name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysl import probes
from raysl.errors import UserError
from raysl.features import FeatureProtocol
from raysl.probe import protocol_hash
from raysl.probes import Labelled, Row

# A default that changes makes numbers that must not stand beside older ones: raise `version`, then pin the new hash.
PINNED = {
    "knn": "c9e48683fae2",
    "linear": "96c4ece4f512",
}

every_probe = pytest.mark.parametrize("name", probes.names())


def blobs(n: int, seed: int, classes: int = 6) -> Labelled:
    random = np.random.default_rng(seed)
    labels_n = random.integers(0, classes, n)
    features_nd = np.eye(classes, 8)[labels_n] * 4 + random.normal(size=(n, 8))
    return Labelled(features_nd.astype(np.float32), labels_n, f"set {seed}")


def rows(name: str, train: Labelled, test: Labelled) -> list[Row]:
    config_type, probe_type = probes.load(name)
    return list(probe_type(config_type()).run(train, test))


@every_probe
def test_protocol_is_pinned(name: str) -> None:
    config_type, _ = probes.load(name)
    assert protocol_hash(name, config_type(), FeatureProtocol()) == PINNED[name]


@every_probe
def test_same_numbers_twice_and_all_finite(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    first = rows(name, train, test)
    assert first == rows(name, train, test)
    assert all(math.isfinite(row.value) for row in first)
    assert len({row.name for row in first}) == len(first)


@every_probe
def test_headline_is_high_where_classes_lie_apart_and_low_where_labels_are_random(name: str) -> None:
    config_type, probe_type = probes.load(name)
    headline = probe_type(config_type()).headline
    train, test = blobs(300, 0), blobs(200, 1)
    shuffled = np.random.default_rng(0).permutation(train.labels_n)
    good = {row.name: row.value for row in rows(name, train, test)}
    bad = {row.name: row.value for row in rows(name, Labelled(train.features_nd, shuffled), test)}
    assert good[headline] > 0.9
    assert bad[headline] < 0.4


@every_probe
def test_a_class_that_only_the_test_set_has_is_always_wrong(name: str) -> None:
    config_type, probe_type = probes.load(name)
    headline = probe_type(config_type()).headline
    train, test = blobs(200, 0), blobs(100, 1)
    unknown = Labelled(test.features_nd, test.labels_n + 6)
    assert {row.name: row.value for row in rows(name, train, unknown)}[headline] == 0


@every_probe
def test_order_of_the_test_set_does_not_matter(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    turned = Labelled(test.features_nd[::-1].copy(), test.labels_n[::-1].copy())
    for one, other in zip(rows(name, train, test), rows(name, train, turned), strict=True):
        assert one.value == pytest.approx(other.value, abs=0.011)


@every_probe
def test_empty_sets_are_refused(name: str) -> None:
    empty = Labelled(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
    for train, test in ((empty, blobs(9, 0)), (blobs(9, 0), empty)):
        with pytest.raises(UserError, match="no images"):
            rows(name, train, test)


@every_probe
def test_diverged_features_are_refused(name: str) -> None:
    broken = blobs(50, 0)
    broken.features_nd[3, 2] = np.nan
    with pytest.raises(UserError, match="not all finite"):
        rows(name, broken, blobs(50, 1))


def test_an_unknown_probe_answers_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'knn'"):
        probes.load("knm")
