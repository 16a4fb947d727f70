"""The contract of every probe that is found by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl import probes
from raysl.backbone.network import BackboneConfig
from raysl.errors import MissingValueError, UserError
from raysl.evaluation.results import protocol_hash
from raysl.extraction import FeatureProtocol, RandomBackbone
from raysl.probes import EncoderProbe, FeatureProbe, Labeled, LabeledProbe, Row, Subject, svm
from raysl.storage import Folder
from tests.data import make_dataset

# Hashes of the default protocols. If the same settings give other numbers, raise `version` and pin the new hash here.
PINNED = {
    "collapse": "58b936fc8ec1",
    "detection": "77914dae7c9f",
    "finetune": "2cec80ddb5c9",
    "invariance": "55ec5e9c04fc",
    "keypoints": "457dd07fc298",
    "knn": "0e3c17152dc6",
    "lidar": "1e53bd4eef38",
    "linear": "8cc9f8028236",
    "localization": "e6d4b64aa8e6",
    "lowshot": "8d561305e206",
    "normals": "d2768b1d38d1",
    "patches": "1250ceae846e",
    "retrieval": "8ae45b92cb9f",
    "robustness": "dc2ad27c7808",
    "semisup": "32187050230a",
    "svm": "d0d78b179c2c",
    "video": "f25eaf8e1bae",
    "voc_svm": "3acd198618ae",
}
# Parameters of the machines of svm, voc_svm and lowshot, whatever the defaults of scikit-learn become.
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
# Refusals of a data set that is too small for a probe.
TOO_SMALL = (
    r"at least (two|4|2)\b|has only one|has 1 images|one image|no boxes|another test set|has \d+ images"
)


def make(name: str) -> Any:
    config_type, probe_type = probes.load(name)
    return probe_type(config_type())


def of_kind(kind: type[Any]) -> list[str]:
    return [name for name in probes.names() if isinstance(make(name), kind)]


every_probe = pytest.mark.parametrize("name", probes.names())
labeled_probe = pytest.mark.parametrize("name", of_kind(LabeledProbe))
accuracy_probe = pytest.mark.parametrize("name", [n for n in of_kind(LabeledProbe) if probes.is_score(n)])
feature_probe = pytest.mark.parametrize("name", of_kind(FeatureProbe))
encoder_probe = pytest.mark.parametrize("name", of_kind(EncoderProbe))
probe_of_features = pytest.mark.parametrize("name", of_kind(LabeledProbe) + of_kind(FeatureProbe))


def examined(name: str, subject: Subject) -> list[Row]:
    """Rows of a probe of an encoder; one that trains the encoder does so for two epochs."""
    config_type, probe_type = probes.load(name)
    config = config_type()
    if hasattr(config, "epochs"):
        config = replace(config, epochs=2)
    try:
        return list(probe_type(config).examine(subject))
    except MissingValueError as error:
        pytest.skip(str(error))


def blobs(n: int, seed: int, classes: int = 6) -> Labeled:
    random = np.random.default_rng(seed)
    labels_n = random.integers(0, classes, n)
    features_nd = np.eye(classes, 8)[labels_n] * 8 + random.normal(size=(n, 8))
    return Labeled(features_nd.astype(np.float32), labels_n, f"set {seed}")


def rows(name: str, train: Labeled, test: Labeled) -> list[Row]:
    """Rows of a probe of features, with labels or without."""
    probe = make(name)
    try:
        if isinstance(probe, LabeledProbe):
            return list(probe.run(train, test))
        return list(probe.measure(test.features_nd))
    except UserError as error:
        if "which is not installed" in str(error):
            pytest.skip(str(error))
        raise


def check_rows(found: list[Row]) -> None:
    assert found
    assert all(math.isfinite(row.value) for row in found)
    assert len({(row.layer, row.name) for row in found}) == len(found)


def rows_or_refusal(found: Callable[[], list[Row]], message: str) -> None:
    """The rows are right, or the probe refuses its data with this message and no other."""
    try:
        made = found()
    except UserError as error:
        error.args = (str(error),)
        with pytest.raises(UserError, match=message):
            raise
    else:
        check_rows(made)


def primary(name: str, found: list[Row]) -> float:
    return next(row.value for row in found if row.name == make(name).primary_metric)


@every_probe
def test_default_protocol_is_pinned(name: str) -> None:
    config_type, _ = probes.load(name)
    if name in PINNED:
        assert protocol_hash(name, config_type(), FeatureProtocol()) == PINNED[name]


@every_probe
def test_version_and_bn_statistics_change_the_protocol_and_version_is_no_flag(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_type, _ = probes.load(name)
    default = protocol_hash(name, config_type(), FeatureProtocol())
    assert "version" not in [field.name for field in fields(config_type)]
    assert protocol_hash(name, config_type(), FeatureProtocol(), "reestimated") != default
    monkeypatch.setattr(config_type, "version", config_type.version + 1)
    assert protocol_hash(name, config_type(), FeatureProtocol()) != default


def test_parameters_of_the_support_vector_machines_are_pinned() -> None:
    pytest.importorskip("sklearn")
    assert svm.machine(3.0).get_params() == MACHINE


@every_probe
def test_numbers_out_of_range_are_refused_with_their_flag(name: str) -> None:
    config_type, _ = probes.load(name)
    refused = 0
    for field in fields(config_type):
        value = getattr(config_type(), field.name)
        several = isinstance(value, tuple)
        number = value[0] if several and value else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for bad in (math.nan, math.inf, -1, 1e20):
            flag = f"--{name}.{field.name} ".replace("_", "-")
            with pytest.raises(UserError, match=flag):
                config_type(**{field.name: (bad,) if several else bad})
            refused += 1
    assert refused or name in ("voc_svm",) or name not in PINNED


@labeled_probe
def test_a_probe_that_learns_refuses_one_set_for_both(name: str) -> None:
    one = blobs(100, 0)
    if probes.learns(name):
        with pytest.raises(UserError, match=r"another test set|not installed"):
            rows(name, one, one)
    else:
        check_rows(rows(name, one, one))


@labeled_probe
def test_a_train_set_of_one_class_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"probe {name} needs a train set of at least two classes"):
        rows(name, blobs(40, 0, classes=1), blobs(20, 1, classes=1))


@every_probe
def test_a_probe_is_of_one_kind(name: str) -> None:
    kinds = (LabeledProbe, FeatureProbe, EncoderProbe)
    assert sum(isinstance(make(name), kind) for kind in kinds) == 1


@probe_of_features
def test_rows_are_deterministic_and_finite_and_features_are_not_changed(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    before = train.features_nd.copy(), test.features_nd.copy()
    first = rows(name, train, test)
    check_rows(first)
    assert primary(name, first) > 0
    assert first == rows(name, train, test)
    np.testing.assert_array_equal(train.features_nd, before[0])
    np.testing.assert_array_equal(test.features_nd, before[1])


@probe_of_features
def test_bad_features_are_refused(name: str) -> None:
    empty = Labeled(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="no images"):
        rows(name, blobs(50, 0), empty)
    broken = blobs(50, 1)
    broken.features_nd[3, 2] = np.nan
    with pytest.raises(UserError, match="not all finite"):
        rows(name, blobs(50, 0), broken)


@probe_of_features
@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (200, 1)])
def test_one_image_gives_a_result_or_is_refused_as_too_few(name: str, sizes: tuple[int, int]) -> None:
    rows_or_refusal(lambda: rows(name, blobs(sizes[0], 0), blobs(sizes[1], 1)), TOO_SMALL)


@accuracy_probe
def test_primary_metric_is_high_for_separate_classes_and_low_for_random_labels(name: str) -> None:
    train, test = blobs(300, 0), blobs(200, 1)
    shuffled = np.random.default_rng(0).permutation(train.labels_n)
    assert primary(name, rows(name, train, test)) > 0.9
    assert primary(name, rows(name, Labeled(train.features_nd, shuffled), test)) < 0.4


@accuracy_probe
def test_a_class_of_the_test_set_only_is_always_wrong(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    unknown = Labeled(test.features_nd, test.labels_n + 6)
    assert primary(name, rows(name, train, unknown)) == 0


@labeled_probe
def test_order_of_the_test_set_does_not_matter(name: str) -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    turned = Labeled(test.features_nd[::-1].copy(), test.labels_n[::-1].copy())
    for one, other in zip(rows(name, train, test), rows(name, train, turned), strict=True):
        assert one.value == pytest.approx(other.value, abs=0.011)


@accuracy_probe
@pytest.mark.parametrize("step", [1, -1])
def test_equal_features_give_chance_even_if_the_set_is_sorted_by_class(name: str, step: int) -> None:
    labels_n = np.repeat(np.arange(5), 40)
    same = np.full((200, 8), 0.3, np.float32)
    found = rows(name, Labeled(same, labels_n, "a"), Labeled(same, labels_n[::step].copy(), "b"))
    assert primary(name, found) == pytest.approx(1 / 5, abs=0.05)


@labeled_probe
def test_a_bad_train_set_is_refused(name: str) -> None:
    empty = Labeled(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="no images"):
        rows(name, empty, blobs(9, 0))
    broken = blobs(50, 0)
    broken.features_nd[3, 2] = np.inf
    with pytest.raises(UserError, match="not all finite"):
        rows(name, broken, blobs(50, 1))


@labeled_probe
def test_images_of_several_classes_are_accepted_or_refused(name: str) -> None:
    def several(data: Labeled) -> Labeled:
        return Labeled(data.features_nd, probes.multi_hot(data.labels_n, 6), data.fingerprint)

    rows_or_refusal(
        lambda: rows(name, several(blobs(100, 0)), several(blobs(60, 1))), "can show several classes"
    )


@feature_probe
def test_equal_features_are_a_defined_result(name: str) -> None:
    same = np.ones((20, 8), np.float32)
    check_rows(list(make(name).measure(same)))
    check_rows(list(make(name).measure(0 * same)))


@encoder_probe
def test_a_probe_of_an_encoder_gives_rows_for_each_layer_or_for_pooled(name: str, tmp_path: Path) -> None:
    layers = ("conv1", "pooled")
    train, test = make_dataset(tmp_path / "train", 60), make_dataset(tmp_path / "test", 40, seed=1)
    encoder = RandomBackbone(BackboneConfig(), seed=0)
    subject = Subject(encoder, layers, 16, train, test, 0, Folder(str(tmp_path / "out")))
    found = examined(name, subject)
    check_rows(found)
    assert {row.layer for row in found} in (set(layers), {"pooled"})
    assert primary(name, found) >= 0
    assert found == examined(name, subject)


@encoder_probe
def test_a_probe_of_an_encoder_refuses_one_image(name: str, tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "one", 1)
    subject = Subject(
        RandomBackbone(BackboneConfig(), seed=0), ("pooled",), 16, one, one, 0, Folder(str(tmp_path / "out"))
    )
    rows_or_refusal(lambda: examined(name, subject), TOO_SMALL)


def test_an_unknown_probe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="'knn'"):
        probes.load("knm")
