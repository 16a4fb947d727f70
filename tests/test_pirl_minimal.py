"""The example in plain torch computes the loss of raysl."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.objectives.pirl import Config, Pirl
from raysl.rng import ImageRng
from tests.objectives.setups import N, batch, setup

FILE = Path(__file__).parents[1] / "examples" / "pirl_minimal.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("pirl_minimal", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loss_the_gradient_and_the_bank_equal_those_of_raysl() -> None:
    minimal = example()
    backbone, given = setup("jigsaw")
    objective = Pirl(Config(num_negatives=20, negatives="own", dim=16, lam=0.3), given)
    bank = MemoryBank(N, 16, BankConfig(), seed=0)
    rows_nd = bank.rows_nd.clone()
    of = batch(objective)
    outputs = objective(backbone, of.views)
    found = objective.loss(outputs, of, bank)

    model = minimal.Pirl(backbone, backbone.width, num_patches=4, dim=16)
    model.f.load_state_dict(objective.image_head.state_dict())
    model.g_patch.load_state_dict(objective.transformed_head.project.state_dict())
    model.g_mix.load_state_dict(objective.transformed_head.mix[-1].state_dict())  # type: ignore[index]
    image_bd, transformed_bd = model(of.views["image"][:, 0], of.views["transformed"])
    drawn = ImageRng(0, of.rows.epochs_b, of.rows.indices_b).integers("negatives", N - 1, count=20)
    negatives_bk = drawn + (drawn >= of.indices_b[:, None])
    loss = minimal.pirl_loss(image_bd, transformed_bd, of.indices_b, negatives_bk, rows_nd, lam=0.3)
    torch.testing.assert_close(loss, found.loss, rtol=1e-6, atol=1e-6)

    own = torch.autograd.grad(loss, model.f.weight)[0]
    theirs = torch.autograd.grad(found.loss, objective.image_head.weight)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)

    mine = minimal.MemoryBank(N, 16)
    mine.rows_nd = rows_nd
    mine.update(of.indices_b, image_bd)
    assert found.bank_update_bd is not None
    bank.update(of.indices_b, found.bank_update_bd)
    torch.testing.assert_close(mine.rows_nd, bank.rows_nd)


def test_it_trains() -> None:
    minimal = example()
    torch.manual_seed(0)
    last = torch.nn.Linear(48, 8)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), last)
    before = last.weight.detach().clone()
    trained = minimal.train(torch.rand(64, 3, 36, 36), network, 8, steps=3, batch_size=4)
    assert np.isfinite(trained[2].weight.detach().numpy()).all()
    assert not torch.equal(trained[2].weight, before)


def test_it_needs_nothing_of_raysl() -> None:
    text = FILE.read_text()
    assert "import raysl" not in text
    assert "from raysl" not in text
    assert len(text.splitlines()) <= 170
