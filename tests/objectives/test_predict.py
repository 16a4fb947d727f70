"""Predicting the property of the transform."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysl.backbone.network import Backbone
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.objectives.predict import Config, Predict
from raysl.pretext import Geometry, rotation
from raysl.stream.reader import Batch
from tests.objectives.setups import setup


def make(transform: str, permutations: int = 5) -> tuple[Backbone, Predict]:
    backbone, of = setup(transform, predicted=True, permutations=permutations)
    return backbone, Predict(Config(crop_width=8), of)


def batch(b: int, patches: int, labels: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (b, patches, 3, 8, 8), dtype=torch.uint8, generator=generator)
    rows = Rows(np.arange(b), np.zeros(b, np.int64))
    return Batch(0, rows, None, {"transformed": views}, {"transformed": torch.arange(b) % labels})


@pytest.mark.parametrize(
    ("transform", "patches", "labels"), [("rotation", 1, 4), ("jigsaw", 4, 5), ("rotation+jigsaw", 4, 20)]
)
@pytest.mark.parametrize("b", [1, 6])
def test_the_loss_is_the_cross_entropy_of_the_label(
    transform: str, patches: int, labels: int, b: int
) -> None:
    backbone, objective = make(transform)
    of = batch(b, patches, labels)
    outputs = objective(backbone, of.views)
    assert outputs["logits"].shape == (b, labels)
    found = objective.loss(outputs, of, None)
    expected = F.cross_entropy(outputs["logits"], of.targets["transformed"])
    torch.testing.assert_close(found.loss, expected)
    right = outputs["logits"].argmax(dim=1) == of.targets["transformed"]
    assert found.metrics["accuracy"].item() == pytest.approx(right.float().mean().item())
    assert found.bank_update_bd is None
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in nn.ModuleList([backbone, objective]).parameters())


def test_the_patches_of_an_image_decide_its_own_label_only() -> None:
    backbone, objective = make("jigsaw")
    objective.eval()
    of = batch(3, 4, 5)
    before = objective(backbone, of.views)["logits"]
    of.views["transformed"][1] = 255 - of.views["transformed"][1]
    after = objective(backbone, of.views)["logits"]
    assert ((before - after).abs().amax(dim=1) > 1e-5).tolist() == [False, True, False]


def test_a_transform_without_labels_cannot_be_predicted() -> None:
    with pytest.raises(UserError, match=r"0 label.*nothing to predict"):
        make("identity")
    with pytest.raises(UserError, match=r"1 label.*nothing to predict"):
        make("jigsaw", permutations=1)


def test_crops_with_labels_of_their_own_are_samples_of_their_own() -> None:
    backbone, of_run = setup()
    transform = rotation.Rotation(rotation.Config(turns="all"), Geometry(image_size=16, predicted=True))
    objective = Predict(Config(), replace(of_run, pretext=transform))
    assert objective.classify.in_features == backbone.width
    of = batch(3, 4, 1)
    of.targets["transformed"] = torch.tensor([[0, 1, 2, 3]] * 3)
    outputs = objective(backbone, of.views)
    each = torch.stack([objective.classify(backbone(of.views["transformed"][:, p])) for p in range(4)], dim=1)
    torch.testing.assert_close(outputs["logits"], each.flatten(0, 1))
    expected = F.cross_entropy(each.flatten(0, 1), torch.arange(4).repeat(3))
    torch.testing.assert_close(objective.loss(outputs, of, None).loss, expected)
