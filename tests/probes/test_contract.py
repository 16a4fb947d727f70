"""What holds for every probe that is found by its name."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from raysl import probes
from raysl.backbone.network import BackboneConfig
from raysl.errors import Unset, UserError
from raysl.evaluation.results import protocol_hash
from raysl.extraction import FeatureProtocol, RandomBackbone
from raysl.probes import (
    EncoderProbe,
    FeatureProbe,
    Labelled,
    LabelledProbe,
    Row,
    Subject,
    _detector,
    _tuning,
    collapse,
    detection,
    svm,
)
from raysl.storage import Folder
from tests.data import make_dataset

# A default that changes makes numbers that must not stand beside older ones: raise `version`, then pin the new hash.
PINNED = {
    "collapse": "19584826f3fd",
    "detection": "cb8f5896355c",
    "finetune": "e0d95064abf3",
    "invariance": "c5939c42c414",
    "knn": "c9e48683fae2",
    "linear": "45ee934dccc5",
    "lowshot": "eccd53ccc911",
    "retrieval": "a5cb10fb55c4",
    "semisup": "73f29b4f7400",
    "svm": "ab3127b34a42",
    "voc_svm": "68f537a1d20d",
}

# What numbers hang on and no hash holds. Who changes one raises `version` of every probe named with it, then pins both.
# The linear probe's are pinned in test_linear.py.
CONSTANTS = [
    ({"finetune": 1, "semisup": 1}, _tuning, {"_MIRRORED": 0.5}),
    ({"detection": 1}, detection, {"_MIRRORED": 0.5}),
    (
        {"detection": 1},
        _detector,
        {
            "ANCHORS": (32, 64, 128, 256, 512),
            "_EMPTY_SIDE": 256,
            "_COARSEST": 6,
            "_FINEST": 64,
            "_MOST_MAPS": 4,
            "_ROI_CELLS": 7,
        },
    ),
    ({"svm": 2, "voc_svm": 2, "lowshot": 1}, svm, {"_FOLDS": 3, "_NO_LENGTH": 1e-5}),
    ({"collapse": 1}, collapse, {"_NOTHING": 1e-6}),
]
MACHINE = {
    "C": 3.0,
    "class_weight": {1: 2, -1: 1},
    "dual": True,
    "fit_intercept": True,
    "intercept_scaling": 1.0,
    "loss": "squared_hinge",
    "max_iter": 2000,
    "multi_class": "ovr",
    "penalty": "l2",
    "random_state": 0,
    "tol": 1e-4,
    "verbose": 0,
}


def of_kind(kind: type[Any]) -> list[str]:
    return [name for name in probes.names() if isinstance(make(name), kind)]


def make(name: str) -> Any:
    config_type, probe_type = probes.load(name)
    return probe_type(config_type())


def examined(name: str, subject: Subject) -> list[Row]:
    """Of a probe of an encoder; one that trains it does so for two epochs."""
    config_type, probe_type = probes.load(name)
    config = config_type()
    if hasattr(config, "epochs"):
        config = replace(config, epochs=2)
    try:
        return list(probe_type(config).examine(subject))
    except Unset as error:
        pytest.skip(str(error))


every_probe = pytest.mark.parametrize("name", probes.names())
labelled_probe = pytest.mark.parametrize("name", of_kind(LabelledProbe))
feature_probe = pytest.mark.parametrize("name", of_kind(FeatureProbe))
encoder_probe = pytest.mark.parametrize("name", of_kind(EncoderProbe))


def blobs(n: int, seed: int, classes: int = 6) -> Labelled:
    random = np.random.default_rng(seed)
    labels_n = random.integers(0, classes, n)
    features_nd = np.eye(classes, 8)[labels_n] * 8 + random.normal(size=(n, 8))
    return Labelled(features_nd.astype(np.float32), labels_n, f"set {seed}")


def rows(name: str, train: Labelled, test: Labelled) -> list[Row]:
    """Of a probe of features, with labels or without."""
    probe = make(name)
    try:
        if isinstance(probe, LabelledProbe):
            return list(probe.run(train, test))
        return list(probe.measure(test.features_nd))
    except UserError as error:
        if "which is not installed" in str(error):
            pytest.skip(str(error))
        raise


def sane(found: list[Row]) -> None:
    assert found
    assert all(math.isfinite(row.value) for row in found)
    assert len({(row.layer, row.name) for row in found}) == len(found)


def headline(name: str, found: list[Row]) -> float:
    return next(row.value for row in found if row.name == make(name).headline)


@every_probe
def test_protocol_is_pinned(name: str) -> None:
    config_type, _ = probes.load(name)
    assert protocol_hash(name, config_type(), FeatureProtocol()) == PINNED[name]


@pytest.mark.parametrize(("versions", "module", "pinned"), CONSTANTS)
def test_constants_are_pinned_with_the_versions_of_their_probes(
    versions: dict[str, int], module: ModuleType, pinned: dict[str, Any]
) -> None:
    assert {name: getattr(module, name) for name in pinned} == pinned
    assert {name: probes.load(name)[0]().version for name in versions} == versions


def test_support_vector_machines_are_pinned() -> None:
    """As `CONSTANTS`, for svm, voc_svm and lowshot; whatever scikit-learn's own defaults come to be."""
    pytest.importorskip("sklearn")
    assert svm._machine(3.0).get_params() == MACHINE


@labelled_probe
def test_what_learns_says_so(name: str) -> None:
    """And refuses one set for both."""
    one = blobs(100, 0)
    if probes.learns(name):
        with pytest.raises(UserError, match=r"another test set|not installed"):
            rows(name, one, one)
    else:
        sane(rows(name, one, one))


@every_probe
def test_is_of_one_kind(name: str) -> None:
    kinds = (LabelledProbe, FeatureProbe, EncoderProbe)
    assert sum(isinstance(make(name), kind) for kind in kinds) == 1


@pytest.mark.parametrize("name", of_kind(LabelledProbe) + of_kind(FeatureProbe))
def test_same_numbers_twice_and_all_finite(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    before = train.features_nd.copy(), test.features_nd.copy()
    first = rows(name, train, test)
    sane(first)
    assert headline(name, first) > 0
    assert first == rows(name, train, test)
    # Other probes are handed the same arrays.
    np.testing.assert_array_equal(train.features_nd, before[0])
    np.testing.assert_array_equal(test.features_nd, before[1])


@pytest.mark.parametrize("name", of_kind(LabelledProbe) + of_kind(FeatureProbe))
def test_bad_features_are_refused(name: str) -> None:
    empty = Labelled(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="no images"):
        rows(name, blobs(50, 0), empty)
    broken = blobs(50, 1)
    broken.features_nd[3, 2] = np.nan
    with pytest.raises(UserError, match="not all finite"):
        rows(name, blobs(50, 0), broken)


@pytest.mark.parametrize("name", of_kind(LabelledProbe) + of_kind(FeatureProbe))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (200, 1)])
def test_one_image_is_a_result_or_a_clear_error(name: str, sizes: tuple[int, int]) -> None:
    with contextlib.suppress(UserError):
        sane(rows(name, blobs(sizes[0], 0), blobs(sizes[1], 1)))


@labelled_probe
def test_headline_is_high_where_classes_lie_apart_and_low_where_labels_are_random(name: str) -> None:
    train, test = blobs(300, 0), blobs(200, 1)
    shuffled = np.random.default_rng(0).permutation(train.labels_n)
    assert headline(name, rows(name, train, test)) > 0.9
    assert headline(name, rows(name, Labelled(train.features_nd, shuffled), test)) < 0.4


@labelled_probe
def test_a_class_that_only_the_test_set_has_is_always_wrong(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    unknown = Labelled(test.features_nd, test.labels_n + 6)
    assert headline(name, rows(name, train, unknown)) == 0


@labelled_probe
def test_order_of_the_test_set_does_not_matter(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    turned = Labelled(test.features_nd[::-1].copy(), test.labels_n[::-1].copy())
    for one, other in zip(rows(name, train, test), rows(name, train, turned), strict=True):
        assert one.value == pytest.approx(other.value, abs=0.011)


@labelled_probe
@pytest.mark.parametrize("step", [1, -1])
def test_features_that_are_all_one_are_worth_chance_also_where_classes_are_sorted(
    name: str, step: int
) -> None:
    labels_n = np.repeat(np.arange(5), 40)
    same = np.full((200, 8), 0.3, np.float32)
    found = rows(name, Labelled(same, labels_n, "a"), Labelled(same, labels_n[::step].copy(), "b"))
    assert headline(name, found) == pytest.approx(1 / 5, abs=0.05)


@labelled_probe
def test_a_bad_train_set_is_refused(name: str) -> None:
    empty = Labelled(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="no images"):
        rows(name, empty, blobs(9, 0))
    broken = blobs(50, 0)
    broken.features_nd[3, 2] = np.inf
    with pytest.raises(UserError, match="not all finite"):
        rows(name, broken, blobs(50, 1))


@labelled_probe
def test_images_of_several_classes_are_taken_or_refused(name: str) -> None:
    def several(data: Labelled) -> Labelled:
        return Labelled(data.features_nd, probes.presence(data.labels_n, 6), data.fingerprint)

    with contextlib.suppress(UserError):
        sane(rows(name, several(blobs(100, 0)), several(blobs(60, 1))))


@feature_probe
def test_features_that_are_all_one_are_a_defined_result(name: str) -> None:
    same = np.ones((20, 8), np.float32)
    sane(list(make(name).measure(same)))
    sane(list(make(name).measure(0 * same)))


@encoder_probe
@pytest.mark.ray
def test_of_an_encoder_gives_rows_for_every_layer_or_for_the_whole(
    ray_session: None, name: str, tmp_path: Path
) -> None:
    layers = ("conv1", "pooled")
    train, test = make_dataset(tmp_path / "train", 60), make_dataset(tmp_path / "test", 40, seed=1)
    encoder = RandomBackbone(BackboneConfig(), seed=0)
    subject = Subject(encoder, layers, 16, train, test, 0, Folder(str(tmp_path / "out")))
    found = examined(name, subject)
    sane(found)
    # One of the whole network stands at its output.
    assert {row.layer for row in found} in (set(layers), {"pooled"})
    assert headline(name, found) >= 0
    assert found == examined(name, subject)


@encoder_probe
@pytest.mark.ray
def test_of_an_encoder_answers_to_one_image(ray_session: None, name: str, tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "one", 1)
    subject = Subject(
        RandomBackbone(BackboneConfig(), seed=0), ("pooled",), 16, one, one, 0, Folder(str(tmp_path / "out"))
    )
    with contextlib.suppress(UserError):
        sane(examined(name, subject))


def test_an_unknown_probe_answers_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'knn'"):
        probes.load("knm")
