"""Average precision against direct sums, and the machines against scikit-learn used directly."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from raysl.errors import UserError
from raysl.probes import Labeled, lowshot, svm


def precision(*shown: int) -> float:
    """Of a ranking whose first image is the first number."""
    return svm.average_precision(-np.arange(len(shown), dtype=np.float64), np.array(shown))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ((1, 1, 0, 0), 1.0),
        ((0, 1), 1 / 2),
        ((1, 0, 1), (1 + 2 / 3) / 2),
        # The envelope: 1/2 at the first, 2/3 and 3/4 behind it, so that 3/4 holds at every recall.
        ((0, 1, 1, 1), 3 / 4),
        ((0, 0, 1, 1, 0, 1), 1 / 2),
        ((1, 0, 0, 1, 1), (1 + 3 / 5 + 3 / 5) / 3),
    ],
)
def test_average_precision_is_the_area_under_the_envelope(shown: tuple[int, ...], expected: float) -> None:
    assert precision(*shown) == pytest.approx(expected)


def test_images_of_equal_score_pass_the_threshold_together() -> None:
    scores_n, shown_n = np.array([3.0, 2, 2, 2, 1]), np.array([0, 1, 0, 1, 1])
    # Recall 2/3 at the precision 2/4, then 1 at 3/5, which holds at every recall.
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 1, 3, 4]):
        assert svm.average_precision(scores_n[order], shown_n[order]) == pytest.approx(3 / 5)
    assert svm.average_precision(scores_n[:4], shown_n[:4]) == pytest.approx(2 / 4)
    assert svm.average_precision(np.zeros(5), np.array([1, 0, 0, 0, 0])) == pytest.approx(1 / 5)


def several(n: int, seed: int) -> Labeled:
    """Images that show none to three classes; a tenth of the marks are difficult."""
    random = np.random.default_rng(seed)
    features_nd = random.normal(size=(n, 6)).astype(np.float32)
    shown_nc = (features_nd[:, :3] + 0.7 * random.normal(size=(n, 3)) > 0.4).astype(np.int64)
    shown_nc[random.random((n, 3)) < 0.1] = -1
    return Labeled(features_nd, shown_nc)


def test_equals_scikit_learn_used_directly() -> None:
    sklearn_svm = pytest.importorskip("sklearn.svm")
    selection = pytest.importorskip("sklearn.model_selection")
    train, test = several(120, 0), several(80, 1)
    costs = (0.01, 1.0, 100.0)
    (row,) = svm.Svm(svm.Config(costs=costs)).run(train, test)

    def unit(x: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = x.astype(np.float64)
        return wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-5)  # type: ignore[no-any-return]

    found = []
    for c in range(3):
        sign = np.where(train.labels_n[:, c] == 1, 1, -1)  # difficult ones are negatives here
        machines = [
            sklearn_svm.LinearSVC(
                C=cost, dual=True, max_iter=2000, class_weight={1: 2, -1: 1}, random_state=0
            )
            for cost in costs
        ]
        scores = [
            selection.cross_val_score(
                m, unit(train.features_nd), sign, cv=3, scoring="average_precision"
            ).mean()
            for m in machines
        ]
        best = machines[int(np.argmax(scores))].fit(unit(train.features_nd), sign)
        sure = test.labels_n[:, c] >= 0  # and are left out here
        ranked = test.labels_n[sure, c][np.argsort(-best.decision_function(unit(test.features_nd[sure])))]
        found.append(precision(*ranked))
    assert row.value == pytest.approx(np.mean(found), abs=1e-6)


def test_a_class_without_train_images_has_zero_and_one_without_test_images_is_left_out() -> None:
    pytest.importorskip("sklearn")
    train, test = several(60, 0), several(60, 1)
    train.labels_n[:, 0] = 0
    test.labels_n[:, 1] = 0
    (row,) = svm.Svm(svm.Config(costs=(1.0,))).run(train, test)
    (alone,) = svm.Svm(svm.Config(costs=(1.0,))).run(
        Labeled(train.features_nd, train.labels_n[:, 2:]), Labeled(test.features_nd, test.labels_n[:, 2:])
    )
    assert row.value == pytest.approx(alone.value / 2)


def test_missing_scikit_learn_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn.svm", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"in the extra 'eval': .* pip install"):
        list(svm.Svm(svm.Config()).run(several(20, 0), several(20, 1)))


def test_test_images_without_classes_are_refused() -> None:
    test = several(20, 1)
    with pytest.raises(UserError, match="No image of the test set shows a class"):
        list(svm.Svm(svm.Config()).run(several(20, 0), Labeled(test.features_nd, 0 * test.labels_n)))


def test_lowshot_samples_k_of_each_class_and_samples_are_nested() -> None:
    labels_n = np.repeat([3, 1, 7], [20, 30, 40])
    few, more = lowshot.chosen(labels_n, 2, 0), lowshot.chosen(labels_n, 5, 0)
    assert np.unique(labels_n[more], return_counts=True)[1].tolist() == [5, 5, 5]
    assert set(few) < set(more)
    assert set(few) != set(lowshot.chosen(labels_n, 2, 1))


def test_lowshot_equals_scikit_learn_used_directly_for_any_labels() -> None:
    sklearn_svm = pytest.importorskip("sklearn.svm")
    sets = []
    for seed, count in ((0, 90), (1, 60)):
        random = np.random.default_rng(seed)
        classes_n = random.integers(0, 3, count)
        features_nd = np.eye(3, 6)[classes_n] + random.normal(size=(count, 6))
        sets.append(Labeled(features_nd.astype(np.float32), np.array([3, 1, 7])[classes_n], f"{seed}"))
    train, test = sets
    unit = [
        x.features_nd / (np.linalg.norm(x.features_nd.astype(np.float64), axis=1, keepdims=True) + 1e-5)
        for x in sets
    ]
    for cost in (0.1, 2.0):
        found = []
        for sample in range(3):
            rows = lowshot.chosen(train.labels_n, 8, sample)
            scores_cn = []
            for c in (1, 3, 7):
                machine = sklearn_svm.LinearSVC(
                    C=cost, dual=True, max_iter=2000, class_weight={1: 2, -1: 1}, random_state=0
                )
                machine.fit(unit[0][rows], np.where(train.labels_n[rows] == c, 1, -1))
                scores_cn.append(machine.decision_function(unit[1]))
            found.append((np.array([1, 3, 7])[np.argmax(scores_cn, axis=0)] == test.labels_n).mean())
        mean, std = lowshot.Lowshot(lowshot.Config(ks=(8,), samples=3, cost=cost)).run(train, test)
        assert (mean.value, std.value) == pytest.approx((np.mean(found), np.std(found, ddof=1)), abs=1e-6)


def test_lowshot_omits_a_k_that_is_too_large_and_refuses_the_first() -> None:
    pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    labels_n = np.arange(30) % 3
    features_nd = (np.eye(3)[labels_n] * 5 + random.normal(size=(30, 3))).astype(np.float32)
    data, test = Labeled(features_nd, labels_n, "a"), Labeled(features_nd, labels_n, "b")
    found = {row.name: row.value for row in lowshot.Lowshot(lowshot.Config(ks=(2, 10, 11))).run(data, test)}
    assert set(found) == {"top1/k=2", "top1_std/k=2", "top1/k=10", "top1_std/k=10"}
    # All five samples of ten are all images.
    assert found["top1_std/k=10"] == 0
    assert found["top1/k=10"] > 0.9
    with pytest.raises(UserError, match="at most 10"):
        list(lowshot.Lowshot(lowshot.Config(ks=(11,))).run(data, test))
