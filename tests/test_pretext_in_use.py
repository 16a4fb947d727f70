"""A transform in the methods made of it: the grid, the flags, the stream and a step of training.

That one file is enough for all of them is checked with a file of a user's, here with a target that is no label.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from raysl import pretext
from raysl.backbone.network import BackboneConfig
from raysl.cli.flags import parse_pretraining
from raysl.config import Pretraining, ViewConfig, methods
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.model import DatasetInfo, Model
from raysl.objectives import pirl
from raysl.reporting import combinations, method_pages
from raysl.reporting.pictures import views_grid
from raysl.storage import Folder
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.plan import Plan
from raysl.stream.reader import Batch, Stream, StreamConfig
from raysl.tuning.space import space
from tests.data import make_clips, make_dataset

ONE_FILE = '''
"""Brightness: the image made darker; the target is by how much."""
from dataclasses import dataclass
from typing import Annotated
from torch import nn
from raysl.augment import SourceCrop
from raysl.pretext import Transformed
from raysl.fields import Range


@dataclass(frozen=True)
class Config:
    """Hyperparameters of brightness.

    Args:
        darkest: smallest factor.
    """

    darkest: Annotated[float, Range((0.2, 0.5, 0.8))] = 0.5


class Brightness:
    num_crops, num_labels, color = 1, 0, "source"

    def __init__(self, config, geometry):
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)
        self.darkest = config.darkest

    def transform(self, images_bchw, image_rng):
        factor_b1 = image_rng.uniform("factor", self.darkest, 1.0)
        crops_bchw = (images_bchw * factor_b1[:, :, None, None]).byte()
        return Transformed(crops_bchw[:, None], factor_b1.half())

    def head(self, width):
        return nn.Linear(width, 1)

    def loss(self, output, target):
        return (output - target).square().mean()

    def describe(self):
        return {}
'''


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "brightness.py").write_text(ONE_FILE)
    monkeypatch.setattr(pretext, "__path__", [*pretext.__path__, str(folder)])
    yield "brightness"
    sys.modules.pop(f"{pretext.__name__}.brightness", None)


def make(method: str, place: Literal["data", "trainer"] = "data") -> tuple[Model, Pretraining]:
    parts = {"pirl": pirl.Config(num_negatives=16, dim=8)} if method.startswith("pirl") else {}
    view, backbone = ViewConfig(image_size=32), BackboneConfig(norm="group")
    config = Pretraining(
        "-", "-", method, view=view, backbone=backbone, stream=StreamConfig(place), parts=parts
    )
    return Model(config, DatasetInfo(60, 4)), config


def first_batch(network: Model, config: Pretraining, dataset: DataSet) -> Batch:
    """The batch of the first step, by way of the columns that a data task puts out."""
    stream = Stream(dataset, Plan.of(dataset, 12, 0, 1), network.views(), config.stream)
    columns = next(MakeBatches(stream, 0, 1)({"id": np.zeros(1, np.int64)}))
    return stream.batch(0, {name: values[0] for name, values in columns.items()})


def losses_of_steps(network: Model, batch: Batch, steps: int) -> list[float]:
    dim = network.objective.bank_dim
    bank = MemoryBank(60, dim, BankConfig(), 0) if dim else None
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        found = network.objective.loss(network(batch.views), batch, bank)
        optimizer.zero_grad()
        found.loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(found.loss.item())
    return losses


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_clips(tmp_path_factory.mktemp("clips") / "set", 60)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 60, side=32)


# These change nothing that could be told: they are there to be compared, or for an objective that knows places.
UNLABELED = ("identity", "multi_crop", "patch_grid", "near_frame", "tracking")


@pytest.mark.parametrize("objective", ["predict", "pirl"])
@pytest.mark.parametrize("transform", [name for name in pretext.names() if name not in UNLABELED])
def test_every_transform_trains_when_predicted_and_when_compared(
    objective: str, transform: str, dataset: DataSet, clips: DataSet
) -> None:
    network, config = make(f"{objective}-{transform}")
    dataset = clips if any(view.of_clips for view in network.views().values()) else dataset
    assert combinations.combines(objective, transform) == "yes"
    losses = losses_of_steps(network, first_batch(network, config, dataset), 4)
    assert np.isfinite(losses).all()
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("transform", pretext.names())
def test_targets_are_the_same_wherever_views_are_made(
    transform: str, dataset: DataSet, clips: DataSet
) -> None:
    dataset = clips if pretext.of_clips(pretext.build(transform, {}, pretext.Geometry())) else dataset
    here, there = (first_batch(*make(f"pirl-{transform}", place), dataset) for place in ("data", "trainer"))
    assert here.views.keys() == there.views.keys()
    assert here.targets.keys() == there.targets.keys()
    assert ("transformed" in here.targets) == (transform not in UNLABELED)
    for name, target in here.targets.items():
        assert target.dtype == there.targets[name].dtype
        assert torch.equal(target, there.targets[name])


def test_a_new_file_is_all_that_a_new_transform_needs(
    brightness: str, dataset: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert methods.parse("predict-brightness").transforms == ("brightness",)
    assert methods.parse("pirl-rotation+brightness").transforms == ("rotation", "brightness")
    with pytest.raises(SystemExit) as stopped:
        parse_pretraining(["--method", "predict-brightness", "--help"], "raysl pretrain")
    assert stopped.value.code == 0
    assert "--brightness.darkest" in capsys.readouterr().out
    flags = ["--data", "-", "--run", "-", "--method", "pirl-brightness", "--brightness.darkest", "0.2"]
    assert parse_pretraining(flags, "raysl pretrain").parts["brightness"].darkest == 0.2
    searched = space(parse_pretraining(flags, "raysl sweep"), ("darkest",), listed=True)
    assert searched.grid() == [{"brightness.darkest": value} for value in (0.2, 0.5, 0.8)]
    transforms = next(table for table in combinations.describe() if table.columns[0].header == "transform")
    names, summaries = (list(column.cells) for column in transforms.columns)
    assert "Brightness: the image made darker" in str(summaries[names.index(brightness)])
    for objective in ("predict", "pirl"):
        assert combinations.combines(objective, brightness) == "yes"
        network, config = make(f"{objective}-{brightness}")
        batch = first_batch(network, config, dataset)
        assert (batch.targets["transformed"].dtype, batch.targets["transformed"].shape) == (
            torch.half,
            (12, 1),
        )
        assert np.isfinite(losses_of_steps(network, batch, 2)).all()
    grid = views_grid(dataset, network.views(), count=2)
    assert grid.width > 400
    page = method_pages.page(brightness)
    assert "Brightness: the image made darker; the target is by how much." in page
    assert "--method predict-brightness" in page
    assert "| `--brightness.darkest` | `0.5` | smallest factor. |" in page
    assert f"[{brightness}]({brightness}.md)" in method_pages.index()
    method_pages.write_part(Folder(str(tmp_path)), brightness, dataset)
    assert (tmp_path / "brightness.png").read_bytes().startswith(b"\x89PNG")


def test_a_composition_predicts_the_dense_target_of_its_last(dataset: DataSet) -> None:
    network, config = make("predict-rotation+colorization")
    batch = first_batch(network, config, dataset)
    assert batch.targets["transformed"].shape == (12, 2, 8, 8)
    losses_of_steps(network, batch, 1)
    gray, config = make("predict-colorization+jigsaw")
    batch = first_batch(gray, config, dataset)
    assert batch.targets["transformed"].shape == (12,)
    losses_of_steps(gray, batch, 1)
    with pytest.raises(UserError, match="nothing to predict"):
        make("predict-colorization+identity")
