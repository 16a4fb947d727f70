"""Classifiers on few images are the same after projection on their span."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from raysl.probes import Labeled, linear, svm
from raysl.probes.linear import in_span


def drawn(seed: int, count: int, dim: int) -> Labeled:
    image_rng = np.random.default_rng(seed)
    labels_n = np.arange(count) % 3
    means_cd = np.random.default_rng(0).normal(size=(3, dim))
    features_nd = 0.1 * means_cd[labels_n] + image_rng.normal(size=(count, dim))
    return Labeled(features_nd.astype(np.float32), labels_n, f"drawn {seed}")


def test_products_are_kept() -> None:
    train_nd, test_md = (torch.from_numpy(drawn(seed, 20, 50).features_nd).double() for seed in (1, 2))
    train_nd[3] = train_nd[4]
    few_nn, few_mn = in_span(train_nd, test_md)
    assert few_nn.shape == few_mn.shape == (20, 20)
    torch.testing.assert_close(few_nn @ few_nn.T, train_nd @ train_nd.T)
    torch.testing.assert_close(few_mn @ few_nn.T, test_md @ train_nd.T)


def test_many_images_are_not_projected() -> None:
    train_nd, test_md = (torch.from_numpy(drawn(seed, 48, 50).features_nd) for seed in (1, 2))
    assert in_span(train_nd, test_md) == (train_nd, test_md)


@pytest.mark.parametrize(
    ("module", "probe"),
    [(linear, linear.Linear(linear.Config())), (svm, svm.Svm(svm.Config(costs=(0.1, 1))))],
)
def test_probes_give_the_same_numbers(
    module: ModuleType, probe: linear.Linear | svm.Svm, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    train, test = drawn(1, 60, 200), drawn(2, 300, 200)
    seen: list[int] = []

    def tracing(train_nd: torch.Tensor, test_md: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = in_span(train_nd, test_md)
        seen.append(found[0].shape[1])
        return found

    monkeypatch.setattr(module, "in_span", tracing)
    few = {row.name: row.value for row in probe.run(train, test)}
    monkeypatch.setattr(module, "in_span", lambda *sets: sets)
    assert seen == [60]
    assert {row.name: row.value for row in probe.run(train, test)} == pytest.approx(few, abs=0.005)
