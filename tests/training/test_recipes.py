"""Published runs at full scale: their numbers, and one step of each at full geometry on two images."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysl import optim
from raysl.cli.flags import parse_pretraining
from raysl.config import Pretraining
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.model import DatasetInfo, Model
from raysl.objectives import AfterStep
from raysl.pretext import jigsaw
from raysl.rng import ImageRng
from raysl.stream.reader import Batch
from raysl.training import recipes

IMAGENET = 1_281_167
RESNET50 = 23_508_032  # 25.6 million with the classifier of 1,000 classes

HEADS = {
    # A projection of the image, one of each patch, and one of nine patches.
    "pirl-r50-800ep": 2 * (2048 * 128 + 128) + (9 * 128 * 128 + 128),
    # A linear layer and BatchNorm for each patch, and a classifier of 2,000 orders.
    "jigsaw-r50": (2048 * 1000 + 1000) + 2 * 1000 + (9 * 1000 * 2000 + 2000),
    "rotnet-r50": 2048 * 4 + 4,
    "npid-r50": 2048 * 128 + 128,
    "simclr-r50": (2048 * 2048 + 2048) + (2048 * 128 + 128),
    "mocov2-r50": (2048 * 2048 + 2048) + (2048 * 128 + 128),
}
# The rate at these epochs.
RATES: dict[str, dict[float, float]] = {
    "pirl-r50-800ep": {0: 0.12, 400: 0.06006, 800: 1.2e-4},
    "jigsaw-r50": {0: 0.025, 2.5: 0.0625, 5: 0.1, 29.9: 0.1, 30.1: 0.01, 60.1: 1e-3, 90.1: 1e-4, 100.1: 1e-5},
    "rotnet-r50": {0: 0.1, 29.9: 0.1, 30.1: 0.01, 60.1: 1e-3, 90.1: 1e-4, 100.1: 1e-5},
    "npid-r50": {0: 0.03, 119.9: 0.03, 120.1: 0.003, 160.1: 0.0003},
    "simclr-r50": {0: 0, 5: 2.4, 10: 4.8, 405: 2.4, 800: 0},
    "mocov2-r50": {0: 0.03, 100: 0.015, 200: 0},
}
# Crops of an image and their side, by view.
CROPS = {
    "pirl-r50-800ep": {"transformed": (9, 64), "image": (1, 224)},
    "jigsaw-r50": {"transformed": (9, 64)},
    "rotnet-r50": {"transformed": (1, 224)},
    "npid-r50": {"image": (1, 224)},
    "simclr-r50": {"a": (1, 224), "b": (1, 224)},
    "mocov2-r50": {"query": (1, 224), "key": (1, 224)},
}

each = pytest.mark.parametrize("name", recipes.names())


def test_every_recipe_has_its_published_numbers_here() -> None:
    assert set(recipes.names()) == set(HEADS) == set(RATES) == set(CROPS)


@each
def test_the_rate_is_as_published(name: str) -> None:
    config = recipes.load(name, "data", "run")
    num_steps = round(config.epochs * IMAGENET / config.batch_size)
    for epoch, rate in RATES[name].items():
        step = min(num_steps - 1, round(epoch / config.epochs * num_steps))
        found = config.optim.lr_at(step, num_steps, config.batch_size)
        # A cosine that ends at zero in the source ends at a thousandth of the peak.
        assert found == pytest.approx(
            rate, rel=2e-3, abs=1.1e-3 * max(RATES[name].values()) if rate == 0 else 0
        )


@each
def test_a_recipe_says_what_it_reproduces_and_needs(name: str) -> None:
    module = recipes._module(name)
    for word in ("arXiv", "Hardware:", "Differences from"):
        assert word in str(module.__doc__)
    assert "% top-1" in recipes.summary(name)
    assert Pretraining.from_json(recipes.load(name, "data", "run").to_json()) == recipes.load(
        name, "data", "run"
    )


def test_pirl_is_as_published() -> None:
    config = recipes.load("pirl-r50-800ep", "data", "run")
    part = config.parts["pirl"]
    assert (part.num_negatives, part.temperature, part.lam, part.dim) == (32_000, 0.07, 0.5, 128)
    assert (config.bank.momentum, config.epochs, config.batch_size, config.workers) == (0.5, 800, 1024, 32)


def test_flags_override_a_recipe() -> None:
    flags = ["--data", "d", "--run", "r", "--recipe", "pirl-r50-800ep"]
    assert parse_pretraining(flags, "raysl pretrain") == recipes.load("pirl-r50-800ep", "d", "r")
    flags += ["--epochs", "200", "--pirl.head", "mlp", "--pirl.loss", "infonce", "--view.recipe", "pirl+"]
    given = parse_pretraining(flags, "raysl pretrain")
    assert (given.epochs, given.view.recipe, given.view.image_size) == (200, "pirl+", 224)
    assert given.parts["pirl"].head == "mlp"
    assert given.parts["pirl"].num_negatives == 32_000
    other = parse_pretraining([*flags, "--method", "pirl-rotation"], "raysl pretrain")
    assert other.parts.keys() == {"pirl", "rotation"}
    assert other.parts["pirl"].num_negatives == 32_000


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"recipe 'mocov2'\. Did you mean 'mocov2-r50'"):
        parse_pretraining(["--data", "d", "--run", "r", "--recipe", "mocov2"], "raysl pretrain")


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def batch(network: Model, config: Pretraining, b: int) -> Batch:
    """Views of random images, as the stream makes them."""
    rows = Rows(np.arange(b) * 1000, np.zeros(b, np.int64))
    image_rng = ImageRng(0, rows.epochs_b, rows.indices_b)
    generator = torch.Generator().manual_seed(0)
    views: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for name, view in network.views().items():
        side = view.source.size
        images = torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8, generator=generator)
        made = view(images, image_rng.named(name))
        views[name] = made.crops_bpchw
        targets |= {name: made.target} if made.target is not None else {}
    return Batch(0, rows, torch.zeros(b, dtype=torch.int64), views, targets)


@pytest.mark.slow
@each
def test_a_step_at_full_geometry(name: str) -> None:
    config = recipes.load(name, "data", "run")
    if "jigsaw" in config.parts and config.parts["jigsaw"].criterion != "random":
        # As many orders, which take no minute to choose.
        part: jigsaw.Config = replace(config.parts["jigsaw"], criterion="random")
        config = replace(config, parts={**config.parts, "jigsaw": part})
    network = Model(config, DatasetInfo(IMAGENET, 1000))
    assert weights(network.backbone) == RESNET50
    assert weights(network.objective) == HEADS[name]  # type: ignore[arg-type]
    of = batch(network, config, 2)
    assert {view: (x.shape[1], x.shape[-1]) for view, x in of.views.items()} == CROPS[name]
    bank = MemoryBank(40_000, 128, BankConfig(), 0) if network.objective.bank_dim else None
    optimizer = optim.build(config.optim, network)
    before = [p.detach().clone() for p in network.parameters()]
    found = network.objective.loss(network(of.views), of, bank)
    assert found.loss.isfinite()
    found.loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr_at(100_000, 200_000, config.batch_size)
    optimizer.step()
    if isinstance(network.objective, AfterStep):
        network.objective.after_step(network.backbone, 0)
    if bank is not None and found.bank_update_bd is not None:
        bank.update(of.indices_b, found.bank_update_bd)
    after = list(network.parameters())
    assert all(p.isfinite().all() for p in after)
    moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_recipes_are_plain_configurations() -> None:
    for name in recipes.names():
        assert dataclasses.is_dataclass(recipes.load(name, "data", "run"))
