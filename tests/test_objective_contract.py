"""What the training loop relies on, for every objective there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import Backbone, build
from raysl.checkpoint import SaveConfig, Saver, complete
from raysl.config import methods
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.objectives import Setup
from raysl.pretext import Geometry
from raysl.reporting import combinations
from raysl.rng import ImageRng
from raysl.storage import Folder
from raysl.stream.reader import Batch
from tests.objectives.setups import given

N = 5_000

pytestmark = pytest.mark.parametrize("name", methods.objective_names())


def make(name: str, seed: int = 0) -> tuple[Backbone, Any]:
    torch.manual_seed(seed)
    config_type, objective_type = methods.load_objective(name)
    geometry = Geometry(image_size=16, predicted=objective_type.predicts)
    backbone = build(methods.example_backbone(name))
    transform = next(t for t in ("rotation", "", "patch_grid") if combinations.combines(name, t) == "yes")
    setup = Setup(
        pretext=pretext.build(transform, {}, geometry) if transform else None,
        identity=pretext.build("identity", {}, geometry),
        width=backbone.width,
        num_images=N,
        num_classes=4,
        seed=0,
        backbone=backbone,
    )
    return backbone, objective_type(config_type(**given(name, N)), setup)


def batch(objective: Any, b: int) -> Batch:
    """Views as the stream makes them, of random images."""
    rows = Rows(np.arange(b) * 13, np.zeros(b, np.int64))
    views: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for view, transform in objective.views.items():
        side = transform.source.size
        images = torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8, generator=generator)
        made = transform.transform(images, ImageRng(0, rows.epochs_b, rows.indices_b).named(view))
        views[view] = made.crops_bpchw
        if made.target is not None:
            targets[view] = made.target
    return Batch(0, rows, torch.arange(b) % 4, views, targets)


def test_it_has_a_documented_config(name: str) -> None:
    config_type, objective_type = methods.load_objective(name)
    assert dataclasses.is_dataclass(config_type)
    config_type()
    assert config_type.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert config_type.__doc__
    assert objective_type.__doc__
    documented = " ".join(base.__doc__ or "" for base in config_type.__mro__)
    for field in dataclasses.fields(config_type):
        assert f"{field.name}:" in documented


@pytest.mark.parametrize("b", [2, 5])
def test_a_step_reaches_every_parameter(name: str, b: int) -> None:
    backbone, objective = make(name)
    bank = MemoryBank(N, objective.bank_dim, BankConfig(), seed=0) if objective.bank_dim else None
    of = batch(objective, b)
    found = objective.loss(objective.forward(backbone, of.views), of, bank)
    assert found.loss.shape == ()
    assert found.loss.isfinite()
    assert all(value.numel() == 1 and not value.requires_grad for value in found.metrics.values())
    found.loss.backward()
    for key, parameter in nn.ModuleDict({"backbone": backbone, "objective": objective}).named_parameters():
        if not parameter.requires_grad:
            assert key.startswith("objective."), f"{key} is frozen"
            continue
        assert parameter.grad is not None, f"{key} takes no part in the loss"
        assert parameter.grad.isfinite().all()


def test_what_it_remembers_are_unit_vectors_without_gradient(name: str) -> None:
    backbone, objective = make(name)
    bank = MemoryBank(N, objective.bank_dim, BankConfig(), seed=0) if objective.bank_dim else None
    of = batch(objective, 3)
    bank_update_bd = objective.loss(objective.forward(backbone, of.views), of, bank).bank_update_bd
    assert (bank_update_bd is None) == (bank is None)
    if bank_update_bd is not None:
        assert bank_update_bd.shape == (3, objective.bank_dim)
        assert not bank_update_bd.requires_grad
        torch.testing.assert_close(bank_update_bd.norm(dim=1), torch.ones(3))


def test_its_checkpoint_makes_another_one_equal(name: str, tmp_path: Path) -> None:
    backbone, objective = make(name)
    bank = MemoryBank(N, objective.bank_dim, BankConfig(), seed=0) if objective.bank_dim else None
    of = batch(objective, 2)
    objective.loss(objective.forward(backbone, of.views), of, bank)
    model = nn.ModuleDict({"backbone": backbone, "objective": objective})
    saver = Saver(Folder(str(tmp_path)), SaveConfig(), 0, 1)
    saver.save(1, {"network": model.state_dict()}, None)
    saver.wait()
    (saved,) = complete(saver.folder)
    other_backbone, other = make(name, seed=1)
    saved.fill(nn.ModuleDict({"backbone": other_backbone, "objective": other}), saved.network(saved.state()))
    saved.fill(other_backbone, saved.backbone_state())
    backbone.eval(), objective.eval(), other.eval()
    torch.manual_seed(0)
    ours = objective.forward(backbone, of.views)
    torch.manual_seed(0)
    theirs = other.forward(backbone, of.views)
    assert ours.keys() == theirs.keys()
    for output in ours:
        assert torch.equal(ours[output], theirs[output])
    torch.testing.assert_close(other.state_dict(), objective.state_dict(), rtol=0, atol=0, equal_nan=True)
