"""Two views of an image against all others of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import Backbone
from raysl.dataset import Rows
from raysl.objectives.simclr import Config, Simclr
from raysl.stream.reader import Batch
from tests.objectives.setups import batch, setup


def make(transform: str = "", **hyperparameters: Any) -> tuple[Backbone, Simclr]:
    backbone, of = setup(transform)
    return backbone, Simclr(Config(**{"dim": 16, **hyperparameters}), of)


def nt_xent(a_bd: Tensor, b_bd: Tensor, temperature: float) -> Tensor:
    """As the paper writes it: 2 B queries, each with 2 B - 2 negatives."""
    z = torch.cat([a_bd, b_bd])
    scores = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(a_bd)))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_nt_xent(temperature: float) -> None:
    _, objective = make(temperature=temperature)
    z = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeddings_b2d = F.normalize(z, dim=2)
    found = objective.loss({"embeddings": embeddings_b2d}, batch(objective, 5), None)
    expected = nt_xent(embeddings_b2d[:, 0], embeddings_b2d[:, 1], temperature)
    torch.testing.assert_close(found.loss, expected)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients)
    assert found.metrics["similarity"].item() == pytest.approx(
        (embeddings_b2d[:, 0] * embeddings_b2d[:, 1]).sum(dim=1).mean().item()
    )


def test_accuracy_is_how_often_the_other_view_is_the_nearest() -> None:
    _, objective = make()
    same = F.normalize(torch.eye(4, 16)[:, None].expand(4, 2, 16), dim=2)
    of = batch(objective)
    assert objective.loss({"embeddings": same}, of, None).metrics["accuracy"] == 1
    swapped = torch.stack([same[:, 0], same[[1, 0, 3, 2], 1]], dim=1)
    assert objective.loss({"embeddings": swapped}, of, None).metrics["accuracy"] == 0


def test_an_image_that_comes_twice_does_not_push_itself_away() -> None:
    backbone, objective = make(temperature=0.5)
    of = batch(objective, 3)
    of = replace(of, rows=Rows(np.array([1, 2, 1]), np.array([0, 0, 1])))
    outputs = objective(backbone, of.views)
    z = outputs["embeddings"].flatten(0, 1)
    scores, image = z @ z.T / 0.5, [1, 1, 2, 2, 1, 1]
    terms = []
    for q in range(6):
        partner, others = q ^ 1, [k for k in range(6) if image[k] != image[q]]
        terms.append(torch.logsumexp(scores[q, [partner, *others]], dim=0) - scores[q, partner])
    torch.testing.assert_close(objective.loss(outputs, of, None).loss, torch.stack(terms).mean())


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("transform", ["", "rotation", "jigsaw"])
def test_every_parameter_gets_a_gradient(transform: str, norm: Any) -> None:
    backbone, objective = make(transform, norm=norm)
    of = batch(objective)
    outputs = objective(backbone, of.views)
    assert outputs["embeddings"].shape == (4, 2, 16)
    torch.testing.assert_close(outputs["embeddings"].norm(dim=2), torch.ones(4, 2))
    objective.loss(outputs, of, None).loss.backward()  # type: ignore[no-untyped-call]
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in nn.ModuleList([backbone, objective]).parameters()
    )


def test_views_are_both_ordinary_unless_a_transform_is_named() -> None:
    backbone, objective = make()
    assert objective.views["a"] is objective.views["b"]
    of = batch(objective)
    same = objective(backbone, {"a": of.views["a"], "b": of.views["a"]})["embeddings"]
    torch.testing.assert_close(same[:, 0], same[:, 1])
    _, objective = make("rotation")
    assert (objective.views["a"].num_labels, objective.views["b"].num_labels) == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arithmetic_is_finite(dtype: torch.dtype) -> None:
    backbone, objective = make()
    of = batch(objective)
    with torch.autocast("cpu", dtype):
        found = objective.loss(objective(backbone, of.views), of, None)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_one_image_has_nothing_to_learn_from() -> None:
    backbone, objective = make()
    of: Batch = batch(objective, 1)
    assert objective.loss(objective(backbone, of.views), of, None).loss.item() == 0
