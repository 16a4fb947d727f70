"""Instance discrimination is PIRL with lambda = 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.objectives import pirl
from raysl.objectives.npid import Config, Npid
from tests.objectives.setups import N, batch, setup

HYPERPARAMETERS = {"num_negatives": 12, "dim": 16}


def bank() -> MemoryBank:
    return MemoryBank(N, 16, BankConfig(), seed=0)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("mode", ["shared", "own"])
@pytest.mark.parametrize("loss", ["infonce", "nce", "paper_h"])
def test_it_is_pirl_with_lambda_0(loss: Any, mode: Any, head: Any) -> None:
    hyperparameters = {**HYPERPARAMETERS, "loss": loss, "negatives": mode, "head": head}
    backbone, of_pirl = setup("rotation")
    theirs = pirl.Pirl(pirl.Config(lam=0, **hyperparameters), of_pirl)
    ours = Npid(Config(**hyperparameters), setup()[1])
    ours.image_head.load_state_dict(theirs.image_head.state_dict())
    # PIRL's z comes from the transformed images, which NPID does not have.
    theirs.z.fill_(150.0)
    ours.z.fill_(150.0)
    of = batch(theirs)
    expected = theirs.loss(theirs(backbone, of.views), of, bank())
    found = ours.loss(ours(backbone, {"image": of.views["image"]}), of, bank())
    assert found.loss.item() == expected.loss.item()
    weights = [*backbone.parameters()]
    for a, b in zip(
        torch.autograd.grad(found.loss, weights), torch.autograd.grad(expected.loss, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found.bank_update_bd is not None
    assert expected.bank_update_bd is not None
    assert torch.equal(found.bank_update_bd, expected.bank_update_bd)
