"""The momentum encoder, the queue, and what they survive."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl import optim
from raysl.backbone.network import Backbone, BackboneConfig, build
from raysl.objectives import AfterStep
from raysl.objectives.moco import Config, Moco
from raysl.optim import OptimConfig
from tests.objectives.setups import batch, setup

K, D = 10, 16


def make(transform: str = "", **hyperparameters: Any) -> tuple[Backbone, Moco]:
    backbone, of = setup(transform)
    return backbone, Moco(Config(**{"queue": K, "dim": D, "momentum": 0.9, **hyperparameters}), of)


def train(backbone: Backbone, objective: Moco, steps: range) -> list[float]:
    """Some steps as the training loop takes them."""
    optimizer = torch.optim.SGD(
        [p for p in _network(backbone, objective).parameters() if p.requires_grad], 0.1
    )
    losses = []
    for step in steps:
        of = batch(objective, step=step)
        loss = objective.loss(objective(backbone, of.views), of, None).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert isinstance(objective, AfterStep)
        objective.after_step(backbone, 0)
        losses.append(loss.item())
    return losses


def _network(backbone: Backbone, objective: Moco) -> nn.Module:
    return nn.ModuleDict({"backbone": backbone, "objective": objective})


def _weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("transform", ["", "rotation", "jigsaw"])
def test_the_loss_is_equation_1(transform: str, head: Any) -> None:
    backbone, objective = make(transform, head=head, temperature=0.3)
    of = batch(objective)
    queue_kd = objective.queue_kd
    outputs = objective(backbone, of.views)
    query, key = outputs["query"], outputs["key"]
    assert not key.requires_grad
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue_kd.T], dim=1) / 0.3
    found = objective.loss(outputs, of, None)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))
    assert found.metrics["accuracy"] == (logits.argmax(dim=1) == 0).float().mean()
    assert found.metrics["similarity"].item() == pytest.approx((query * key).sum(dim=1).mean().item())


def test_keys_are_dealt_out_where_images_see_each_other() -> None:
    assert not make()[1].shuffles
    _, of = setup()
    assert Moco(Config(), replace(of, backbone=build(BackboneConfig()))).shuffles


def test_the_key_network_begins_as_the_query_network() -> None:
    backbone, objective = make()
    view = batch(objective).views["key"]
    outputs = objective(backbone, {"query": view, "key": view})
    assert torch.equal(outputs["query"], outputs["key"])


def test_the_key_network_follows_and_is_not_trained() -> None:
    backbone, objective = make()
    network = _network(backbone, objective)
    optimizer = optim.build(OptimConfig(), network)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = [*objective.key_backbone.parameters(), *objective.key_head.parameters()]
    assert trained == {id(p) for p in (*backbone.parameters(), *objective.head.parameters())}
    before = _weights(objective.key_backbone) + _weights(objective.key_head)
    train(backbone, objective, range(1))
    queries = [*backbone.parameters(), *objective.head.parameters()]
    moved = 0
    for old, key, query in zip(before, frozen, queries, strict=True):
        assert key.grad is None
        torch.testing.assert_close(key, 0.9 * old + 0.1 * query)
        moved += not torch.equal(key, old)
    assert moved > len(frozen) / 2


def test_the_queue_holds_the_newest_keys() -> None:
    backbone, objective = make()
    keys, indices = [objective.queue_kd], [objective.queue_indices_k]
    for step in range(4):
        of = batch(objective, step=step)
        outputs = objective(backbone, of.views)
        objective.loss(outputs, of, None)
        keys.insert(0, outputs["key"])
        indices.insert(0, of.indices_b)
        assert torch.equal(objective.queue_kd, torch.cat(keys)[:K])
        assert torch.equal(objective.queue_indices_k, torch.cat(indices)[:K])


def test_a_queue_shorter_than_the_batch() -> None:
    backbone, objective = make(queue=3)
    assert torch.isfinite(torch.tensor(train(backbone, objective, range(2)))).all()
    assert objective.queue_kd.shape == (3, D)


def test_own_keys_in_the_queue_do_not_count() -> None:
    backbone, objective = make(queue=4)
    of = batch(objective)
    outputs = objective(backbone, of.views)
    objective.loss(outputs, of, None)
    # Now the queue is these very images: each has the three others as negatives.
    query, key = outputs["query"], outputs["key"]
    expected = F.cross_entropy(query @ key.T / 0.2, torch.arange(4))
    torch.testing.assert_close(objective.loss(outputs, of, None).loss, expected)


def test_the_queue_is_no_buffer_and_a_checkpoint_goes_on_bit_for_bit() -> None:
    backbone, objective = make()
    assert not {"queue_kd", "queue_indices_k"} & {name for name, _ in objective.named_buffers()}
    train(backbone, objective, range(3))
    file = io.BytesIO()
    torch.save(_network(backbone, objective).state_dict(), file)
    file.seek(0)
    other_backbone, other = make()
    _network(other_backbone, other).load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.queue_kd, objective.queue_kd)
    assert train(backbone, objective, range(3, 6)) == train(other_backbone, other, range(3, 6))
    for a, b in zip(_weights(objective.key_backbone), _weights(other.key_backbone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arithmetic_is_finite(dtype: torch.dtype) -> None:
    backbone, objective = make()
    of = batch(objective)
    with torch.autocast("cpu", dtype):
        found = objective.loss(objective(backbone, of.views), of, None)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.dtype == objective.queue_kd.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
