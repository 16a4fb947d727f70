"""What a user brings to a run: a backbone, starting weights, an augmentation and callbacks of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import raysl
from raysl import UserError
from raysl.api import arguments
from raysl.augment.own_augmentation import OwnAugmentation, name_of
from raysl.config import Pretraining, ViewConfig
from raysl.extraction import RandomBackbone
from raysl.model import Model
from raysl.ray_cluster.placement import Machines, make_placement
from raysl.rng import ImageRng
from raysl.run import Run
from raysl.run.callbacks import Callbacks
from raysl.training.launch import pretrain
from tests.data import make_dataset
from tests.training.test_launch import assert_same_end

NOISY = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])


def darker(image_chw: Tensor) -> Tensor:
    """Halve a random share of the pixels."""
    return torch.where(torch.rand(image_chw.shape) < 0.5, image_chw // 2, image_chw)


def floats(image_chw: Tensor) -> Tensor:
    return image_chw / 255


def rng(indices: list[int]) -> ImageRng:
    return ImageRng(0, np.zeros(len(indices), np.int64), np.array(indices))


@pytest.mark.parametrize("name", ["NOISY", "darker"])
def test_views_of_an_own_augmentation_do_not_depend_on_the_batch(name: str) -> None:
    own = OwnAugmentation(f"{__name__}:{name}")
    images_bchw = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    made = own(images_bchw, rng([0, 1, 2, 3]))
    assert torch.equal(made[2:], own(images_bchw[2:], rng([2, 3])))
    assert not torch.equal(made, images_bchw)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_own_augmentation_has_its_place_in_the_metadata(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 40)
    given = {"view": {"recipe": darker}, "pirl": {"num_negatives": 8}}
    config = arguments.run_config(data, str(tmp_path / "run"), None, given, workers=False)
    assert config.view.recipe == f"{__name__}:darker"
    run = Run.begin(config, data, Model.of(config, data).describe())
    assert run.metadata()["facts"]["augmentation"]["name"] == config.view.recipe
    assert Run.open(str(run.folder)).config() == config


@pytest.mark.parametrize(
    ("name", "answer"),
    [(f"{__name__}:floats", "float32"), (f"{__name__}:none", "no function"), ("no:f", "cannot be")],
)
def test_an_augmentation_that_cannot_be_used_is_refused(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        OwnAugmentation(name)(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), rng([0]))
    with pytest.raises(UserError, match=r"'MODULE:NAME' or 'FILE\.py:NAME'"):
        name_of(NOISY)
    with pytest.raises(UserError, match="cannot be imported by workers"):
        name_of(lambda image_chw: image_chw)


def test_training_starts_from_weights_in_a_file(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 40)
    first = Model.of(Pretraining("d", "r", method="simclr", seed=7), data).backbone
    file = tmp_path / "weights.pth"
    torch.save(first.body.state_dict(), file)
    config = Pretraining.from_json(
        {"data": "d", "run": "r", "method": "simclr", "backbone": {"weights": str(file)}, "view": {}}
    )
    model = Model.of(config, data)
    untrained = RandomBackbone(config.backbone, config.seed).network()
    for name, value in first.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
        assert torch.equal(untrained.state_dict()[name], value)
    began_from = model.describe()["starting_weights"]
    torch.save(model.backbone.body.state_dict(), tmp_path / "other.pth")
    other = replace(config.backbone, weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="has changed since the run started"):
        RandomBackbone(other, 0, weights_hash=began_from[::-1]).network()
    assert ViewConfig(recipe="pirl").modules() == []


class Tiny(nn.Module):
    """A backbone of the user, without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images_bchw: Tensor) -> Tensor:
        return self.norm(self.conv(images_bchw)).relu().mean((2, 3))  # type: ignore[no-any-return]


class Listener(raysl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_log(self, row: Mapping[str, Any]) -> None:
        self.steps.append(row["step"])


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_of_own_parts_that_is_half_on_ray_has_the_same_numbers(
    tmp_path: Path, ray_session: None
) -> None:
    data, listeners = make_dataset(tmp_path / "set", 40), [Listener(), Listener()]
    parts: dict[str, Any] = {"backbone": Tiny, "view": {"recipe": darker, "image_size": 16}}
    parts |= {"pirl": {"num_negatives": 8}, "epochs": 3, "batch_size": 20, "log_every": 1, "workers": 1}
    whole = raysl.pretrain(data, tmp_path / "whole", callbacks=listeners[:1], local=True, **parts)
    halves = replace(whole.config(), run=str(tmp_path / "halves"))
    placement = make_placement(1, Machines(({"CPU": 2.0},)))
    pretrain(halves, until=2, placement=placement, local=True)
    pretrain(halves, until=4, placement=placement, callbacks=Callbacks(listeners[1:]))
    pretrain(halves, placement=placement, local=True)
    assert_same_end(halves.run, whole)
    assert [listener.steps for listener in listeners] == [[1, 2, 3, 4, 5, 6], [3, 4]]
    assert Run.open(halves.run).config().backbone.name == f"{__name__}:Tiny"
    assert raysl.load(halves.run)(np.zeros((16, 16, 3), np.uint8)).shape == (1, 8)


def test_a_network_of_timm_is_pretrained_like_any_other(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    data = make_dataset(tmp_path / "set", 40)
    given = {"backbone": {"name": "timm/resnet10t"}, "view": {"image_size": 64}, "method": "simclr"}
    config = arguments.run_config(data, str(tmp_path / "run"), None, given, workers=False)
    model = Model.of(config, data)
    model.check()
    views = {name: torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8) for name in model.views()}
    model(views)["embeddings"].sum().backward()
    assert all(weight.grad is not None for weight in model.backbone.parameters())
