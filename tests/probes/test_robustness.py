"""Corruptions are stronger at higher severities, and accuracies are those of the classifiers themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.probes import Labeled, Subject, robustness
from raysl.probes._corruptions import CORRUPTIONS, corrupt
from raysl.probes.knn import Config as KnnConfig
from raysl.probes.knn import Knn
from raysl.rng import ImageRng
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_dataset

each = pytest.mark.parametrize("name", list(CORRUPTIONS))


def images(count: int = 6, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 200 + 20
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").round().to(torch.uint8)


def numbers(indices: list[int]) -> ImageRng:
    return ImageRng(0, np.zeros(len(indices), np.int64), np.array(indices), "test")


@each
def test_a_corruption_grows_with_severity_and_each_image_has_its_own_numbers(name: str) -> None:
    clean = images()
    made = [corrupt(name, clean, severity, numbers([0, 1, 2, 3, 4, 5])) for severity in range(1, 6)]
    assert all(one.shape == clean.shape and one.dtype == torch.uint8 for one in made)
    change = [float((one.float() - clean.float()).square().mean()) for one in made]
    if name == "pixelate":  # blocks that fit the side, and those that do not, alternate
        assert change[4] > change[0]
    elif name != "saturate":  # less color at first, then more
        assert change == sorted(change)
    assert change[0] > 0.1
    alone = corrupt(name, clean[3:4], 5, numbers([3]))
    # Values that lie between two levels may be rounded up or down.
    assert float((alone.float() - made[4][3:4].float()).abs().max()) <= 1


@pytest.mark.parametrize(("name", "share"), [("gaussian_noise", 0.18), ("shot_noise", (0.5 / 12) ** 0.5)])
def test_noise_has_the_published_strength(name: str, share: float) -> None:
    gray = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(name, gray, 3, numbers([0, 1, 2, 3])).float() / 255 - 0.5
    assert float(noise.std()) == pytest.approx(share, rel=0.04)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


def test_accuracies_are_those_of_knn_on_the_corrupted_images(tmp_path: Path) -> None:
    train, test = make_dataset(tmp_path / "train", 60), make_dataset(tmp_path / "test", 40, seed=1)
    subject = Subject(Pixels(), ("pooled",), 16, train, test, 0, Folder(str(tmp_path / "out")))
    config = robustness.Config(corruptions=("contrast", "gaussian_noise"), severities=(5,))
    labels = (train.labels(), test.labels())
    found = {row.name: row.value for row in robustness.Robustness(config).rows(subject)}
    files = [data.read(np.arange(data.num_images)).column("image").to_pylist() for data in (train, test)]
    clean = [decode.evaluation_views(one, 16) for one in files]
    contrast = corrupt("contrast", clean[1], 5, numbers(list(range(40))))
    known, dull = ((one.flatten(1) / 255 - 0.5).numpy() for one in (clean[0], contrast))
    wanted = next(Knn(KnnConfig()).run(Labeled(known, labels[0]), Labeled(dull, labels[1]))).value
    assert found["top1/contrast"] == wanted
    assert found["top1_corrupted"] == pytest.approx((wanted + found["top1/gaussian_noise"]) / 2)
    assert found["kept_share"] == pytest.approx(found["top1_corrupted"] / found["top1_clean"])


def test_layers_have_rows_by_either_classifier(tmp_path: Path) -> None:
    train, test = make_dataset(tmp_path / "train", 40), make_dataset(tmp_path / "test", 20, seed=1)
    encoder = RandomBackbone(BackboneConfig(), 0)
    subject = Subject(encoder, ("res2", "pooled"), 16, train, test, 0, Folder(str(tmp_path / "out")))
    config = robustness.Config(classifier="linear", corruptions=("jpeg",), severities=(1,))
    found = robustness.Robustness(config).rows(replace(subject, bn_statistics="reestimated"))
    assert {row.layer for row in found} == {"res2", "pooled"}


def test_unknown_corruptions_are_refused() -> None:
    with pytest.raises(UserError, match=r"Unknown corruption 'snow'"):
        robustness.Config(corruptions=("snow",))
    with pytest.raises(UserError, match=r"--robustness\.severities"):
        robustness.Config(severities=(6,))
