"""PIRL: equation 5, what reaches which weights, and what the bank remembers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import Backbone
from raysl.contrastive import losses, negatives
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.objectives import Loss
from raysl.objectives.pirl import Config, Pirl
from raysl.stream.reader import Batch
from tests.objectives.setups import N, setup

D, K = 16, 12
CONFIG = {"num_negatives": K, "dim": D}


def make(transform: str = "jigsaw", **values: Any) -> tuple[Backbone, Pirl, MemoryBank]:
    """A backbone whose images do not see each other, the objective, and its bank."""
    backbone, of = setup(transform)
    objective = Pirl(Config(**{**CONFIG, **values}), of)
    return backbone, objective, MemoryBank(N, objective.bank_dim, BankConfig(), seed=0)


def batch(b: int = 4, patches: int = 4, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    # Smaller patches are a single pixel before the last block, and there torch 2.15 computes the bfloat16 gradient of a
    # strided convolution on the CPU from memory that nobody wrote.
    side = 9 if patches > 1 else 16
    views = {
        "transformed": torch.randint(
            0, 256, (b, patches, 3, side, side), dtype=torch.uint8, generator=generator
        ),
        "image": torch.randint(0, 256, (b, 1, 3, 16, 16), dtype=torch.uint8, generator=generator),
    }
    rows = Rows(np.arange(b) * 7 % N, np.zeros(b, np.int64))
    return Batch(step, rows, None, views, {})


def run(backbone: Backbone, objective: Pirl, bank: MemoryBank, of: Batch) -> tuple[dict[str, Tensor], Loss]:
    outputs = objective(backbone, of.views)
    return outputs, objective.loss(outputs, of, bank)


@pytest.mark.parametrize("mode", ["shared", "own"])
@pytest.mark.parametrize("loss", ["infonce", "nce", "paper_h"])
def test_the_loss_is_equation_5_against_the_bank(loss: Any, mode: Any) -> None:
    backbone, objective, bank = make(lam=0.3, loss=loss, negatives=mode, temperature=0.2)
    of = batch()
    outputs, found = run(backbone, objective, bank, of)
    terms = {}
    for name in ("transformed", "image"):
        query = outputs[name]
        if mode == "shared":
            scores = negatives.shared_scores(bank, query, of.rows, of.step, K)
        else:
            scores = negatives.per_image_scores(bank, query, of.rows, K)
        positive_b, negatives_bk = (query * bank.rows_nd[of.indices_b]).sum(dim=1) / 0.2, scores / 0.2
        if loss == "infonce":
            terms[name] = losses.info_nce(positive_b, negatives_bk).mean()
        elif loss == "paper_h":
            terms[name] = losses.paper_h(positive_b, negatives_bk).mean()
        else:
            # The transformed images of the first batch set z.
            z = losses.estimate_z(positive_b, negatives_bk, N) if not terms else objective.z
            terms[name] = losses.nce(positive_b, negatives_bk, z, N).mean()
        torch.testing.assert_close(found.metrics[f"loss/{name}"], terms[name].detach())
    torch.testing.assert_close(found.loss, 0.3 * terms["transformed"] + 0.7 * terms["image"])


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_every_parameter_gets_a_gradient_at_any_lambda(lam: float, head: Any) -> None:
    backbone, objective, bank = make(lam=lam, head=head)
    _, found = run(backbone, objective, bank, batch())
    found.loss.backward()  # type: ignore[no-untyped-call]
    network = nn.ModuleList([backbone, objective])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    moved = {
        "image": any(p.grad is not None and p.grad.any() for p in objective.image_head.parameters()),
        "transformed": any(
            p.grad is not None and p.grad.any() for p in objective.transformed_head.parameters()
        ),
    }
    assert moved == {"image": lam < 1, "transformed": lam > 0}


def test_both_terms_meet_the_bank_as_it_was_and_leave_it_alone() -> None:
    backbone, objective, bank = make()
    before = bank.rows_nd.clone()
    _, found = run(backbone, objective, bank, batch())
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(bank.rows_nd, before)
    assert bank.rows_nd.grad is None
    assert not bank.rows_nd.requires_grad


def test_the_bank_remembers_the_image_and_never_the_transform() -> None:
    backbone, objective, bank = make()
    of = batch()
    outputs, found = run(backbone, objective, bank, of)
    assert found.bank_update_bd is not None
    assert not found.bank_update_bd.requires_grad
    assert torch.equal(found.bank_update_bd, outputs["image"])
    of.views["transformed"] = 255 - of.views["transformed"]
    again = run(backbone, objective, bank, of)[1].bank_update_bd
    assert again is not None
    assert torch.equal(again, found.bank_update_bd)


def test_embeddings_are_unit_vectors() -> None:
    for output in run(*make(), batch())[0].values():
        assert output.shape == (4, D)
        torch.testing.assert_close(output.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_patches_of_an_image_reach_its_own_embedding_only(head: Any) -> None:
    backbone, objective, _ = make(head=head)
    of = batch()
    before = objective(backbone, of.views)
    of.views["transformed"][2] = 255 - of.views["transformed"][2]
    after = objective(backbone, of.views)
    changed = (before["transformed"] - after["transformed"]).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, False, True, False]
    torch.testing.assert_close(before["image"], after["image"])


def test_the_order_of_the_patches_matters_to_g() -> None:
    backbone, objective, _ = make()
    of = batch()
    before = objective(backbone, of.views)["transformed"]
    of.views["transformed"] = of.views["transformed"][:, [1, 0, 2, 3]]
    after = objective(backbone, of.views)["transformed"]
    assert ((before - after).abs().amax(dim=1) > 1e-4).all()


def test_f_and_g_have_weights_of_their_own() -> None:
    _, objective, _ = make("rotation")
    assert not {id(p) for p in objective.image_head.parameters()} & {
        id(p) for p in objective.transformed_head.parameters()
    }
    # With one crop g is the projection alone (appendix A.2).
    assert [tuple(p.shape) for p in objective.transformed_head.parameters()] == [(D, 192), (D,)]


@pytest.mark.parametrize("loss", ["infonce", "nce", "paper_h"])
@pytest.mark.parametrize("transform", ["jigsaw", "rotation", "rotation+jigsaw"])
def test_a_batch_of_one_image(transform: str, loss: Any) -> None:
    backbone, objective, bank = make(transform, loss=loss)
    outputs, found = run(backbone, objective, bank, batch(1, patches=1 if transform == "rotation" else 4))
    assert outputs["transformed"].shape == (1, D)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["infonce", "nce", "paper_h"])
def test_half_precision_arithmetic_is_finite(loss: Any, dtype: torch.dtype) -> None:
    backbone, objective, bank = make(loss=loss)
    of = batch()
    # A perfect match: exp(1 / 0.07) does not fit float16.
    with torch.no_grad():
        bank.rows_nd[of.indices_b] = objective(backbone, of.views)["image"]
    with torch.autocast("cpu", dtype):
        _, found = run(backbone, objective, bank, of)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.dtype == torch.float32
    assert found.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize(("loss", "extra"), [("infonce", 0.0), ("nce", 1.0), ("paper_h", 1.0)])
@pytest.mark.parametrize("mode", ["shared", "own"])
def test_the_loss_before_anything_is_learned(loss: Any, extra: float, mode: Any) -> None:
    num_images, count = 5_000, 2_048
    of = replace(setup("rotation")[1], width=8, num_images=num_images)
    objective = Pirl(Config(num_negatives=count, loss=loss, negatives=mode), of)
    bank = MemoryBank(num_images, 128, BankConfig(), seed=0)
    generator = torch.Generator().manual_seed(0)
    outputs = {
        n: F.normalize(torch.randn(64, 128, generator=generator), dim=1) for n in ("transformed", "image")
    }
    found = objective.loss(outputs, batch(64), bank)
    assert found.loss.item() == pytest.approx(math.log(count) + math.log(2.21) + extra, abs=0.3)
    if loss == "nce":
        assert objective.z.item() / num_images == pytest.approx(2.21, rel=0.03)


def test_z_is_set_by_the_first_batch_and_saved() -> None:
    backbone, objective, bank = make(loss="nce")
    assert objective.z.isnan()
    run(backbone, objective, bank, batch())
    z = objective.z.clone()
    run(backbone, objective, bank, batch(step=1))
    assert torch.equal(objective.z, z)
    assert torch.equal(objective.state_dict()["z"], z)


def test_more_negatives_than_other_images_are_refused() -> None:
    with pytest.raises(UserError, match=f"--pirl.num-negatives is {N}"):
        make(num_negatives=N)


def test_pirl_needs_a_transform() -> None:
    with pytest.raises(UserError, match="'pirl' needs a pretext transform"):
        make("")
