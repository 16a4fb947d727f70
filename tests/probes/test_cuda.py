"""Features and probes on a pretended GPU: no device is mixed with another, and the results are those of a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysl import probes
from raysl.backbone.network import BackboneConfig
from raysl.extraction.encoders import RandomBackbone
from raysl.probes import Labeled, knn, linear
from raysl.ray_cluster import gpus
from tests.pretended_cuda import CUDA, OnDevice, pretended

PROBES: dict[str, Any] = {
    "knn": knn.Knn(knn.Config((5, 1), (0.07,))),
    "linear": linear.Linear(linear.Config(weight_decays=(1e-2, 1e-3), max_iterations=5)),
    "linear by SGD": linear.Linear(linear.Config(schedule="fast")),
}


def labeled(n: int, seed: int) -> Labeled:
    random = np.random.default_rng(seed)
    labels_n = random.integers(0, 3, n)
    features_nd = random.normal(size=(n, 12)) + 2 * np.eye(3, 12)[labels_n]
    return Labeled(features_nd.astype(np.float32), labels_n)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("share", [0.5, 8e-6])  # of 1 GiB; the features take 9,600 bytes
def test_a_probe_gives_the_results_of_the_cpu(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_TRAIN_TILE", 50)
    monkeypatch.setattr(probes, "_SHARE", share)
    monkeypatch.setattr(knn, "_QUERY_TILE", 2)
    train, test = labeled(200, 0), labeled(60, 1)
    expected = {row.name: row.value for row in PROBES[name].run(train, test)}
    monkeypatch.setattr(gpus, "device", lambda: CUDA)
    with pretended() as counts:
        found = {row.name: row.value for row in PROBES[name].run(train, test)}
    assert counts.copies, "the features are copied to the device"
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("share", [0.5, 1e-6])
def test_an_image_is_not_its_own_neighbor_in_any_tile(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train = labeled(200, 0)
    expected = {row.name: row.value for row in PROBES["knn"].run(train, train)}
    monkeypatch.setattr(knn, "_TRAIN_TILE", 50)
    monkeypatch.setattr(knn, "_QUERY_TILE", 3)
    monkeypatch.setattr(probes, "_SHARE", share)
    monkeypatch.setattr(gpus, "device", lambda: CUDA)
    with pretended():
        found = {row.name: row.value for row in PROBES["knn"].run(train, train)}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("layers", [("pooled",), ("res3:768", "res4")])
def test_features_are_those_of_the_cpu(layers: tuple[str, ...]) -> None:
    source = RandomBackbone(BackboneConfig("small"), 0)
    images_bchw = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    expected = source.load(torch.device("cpu"), layers)(images_bchw)
    with pretended() as counts:
        encode = source.load(CUDA, layers)
        on_device = images_bchw.to(CUDA)
        counts.clear()
        found = encode(on_device)
        assert not counts.copies
        assert not counts.waits
        assert all(isinstance(values, OnDevice) for values in found.values())
        found = {layer: values.cpu() for layer, values in found.items()}
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer], values)
