"""The whole network learns the labels, by the configured schedule."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysl.backbone.network import BackboneConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject, _finetuning, finetune
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_dataset

Solvers = list[tuple[torch.optim.Optimizer, float]]
_STEP = _finetuning.step
QUICK = finetune.Config(epochs=5, batch_size=16, optim=OptimConfig(lr=0.5, weight_decay=0.0))


def subject(folder: Path, train: int = 80, test: int = 40) -> Subject:
    sets = make_dataset(folder / "train", train), make_dataset(folder / "test", test, seed=1)
    return Subject(
        RandomBackbone(BackboneConfig(), 0), ("pooled",), 16, *sets, 0, Folder(str(folder / "out"))
    )


def measured(of: Subject, config: finetune.Config = QUICK) -> list[Row]:
    """In this process, without Ray."""
    labels = _finetuning.labels_of("finetune", of.train, of.test)
    return _finetuning.measure("finetune", of, config, np.arange(len(labels[0])), labels)


def with_classes(data: DataSet, *classes: str) -> DataSet:
    return replace(data, manifest=replace(data.manifest, classes=classes))


def test_the_network_learns_deterministically(tmp_path: Path) -> None:
    here = subject(tmp_path)
    found = measured(here)
    assert (found[0].name, found[-1].name) == ("top1", "train_loss")
    assert {row.layer for row in found} == {"pooled"}
    assert found[0].value > 0.6
    assert found[-1].value < 0.7 * np.log(4)
    assert found == measured(here)
    assert found != measured(replace(here, seed=1))


def test_loss_falls_and_the_backbone_moves(tmp_path: Path) -> None:
    here = subject(tmp_path)
    backbone = RandomBackbone(BackboneConfig(), 0).network()
    before = backbone.body.state_dict()["conv1.weight"].clone()
    network = _finetuning.Tuned(backbone, 4)
    labels_n = here.train.labels()
    with ThreadPoolExecutor(1) as threads:
        losses = _finetuning.train(network, here, QUICK, np.arange(80), labels_n, threads)
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(before, backbone.body.state_dict()["conv1.weight"])


def rates_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Return a list that receives the learning rates of every step of a module."""
    rates: list[list[float]] = []

    def step(network: nn.Module, loss: Tensor, solvers: Solvers, *how: float) -> None:
        _STEP(network, loss, solvers, *how)
        rates.append([group["lr"] for solver, _ in solvers for group in solver.param_groups[:1]])

    monkeypatch.setattr(module, "step", step)
    return rates


class Recorder(nn.Module):
    """A network that keeps its training images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Flatten(), nn.Linear(3 * 16 * 16, 4)
        self.images: list[Tensor] = []

    def forward(self, images_bchw: Tensor) -> Tensor:
        self.images += list(images_bchw)
        logits_bc: Tensor = self.head(self.backbone(images_bchw / 255))
        return logits_bc


def taught(here: Subject, config: finetune.Config) -> list[list[Tensor]]:
    """Return the training images of every epoch."""
    network, count = Recorder(), here.train.num_images
    with ThreadPoolExecutor(1) as threads:
        _finetuning.train(network, here, config, np.arange(count), here.train.labels(), threads)
    return [network.images[first : first + count] for first in range(0, len(network.images), count)]


def test_learning_rate_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, optim = (
        rates_of(_finetuning, monkeypatch),
        OptimConfig(lr=0.5, schedule="step", milestones=(0.4, 0.8)),
    )
    taught(subject(tmp_path, 20, 8), replace(QUICK, batch_size=8, head_lr=10.0, optim=optim))
    # Two batches of eight in each of five epochs; four images are left out.
    wanted = [optim.lr_at(step, 10, 8) for step in range(10)]
    assert rates == [[rate, 10.0 * rate] for rate in wanted]
    assert len(set(wanted)) == 3


def test_an_epoch_shows_every_image_and_mirrors_half(tmp_path: Path) -> None:
    here = subject(tmp_path, 32, 8)
    files = here.train.read(np.arange(32), ("image",)).column("image").to_pylist()
    plain_nchw = decode.evaluation_views(files, 16)  # images are of that size
    mirrored = []
    # With crops of at least the whole area.
    for images in taught(here, replace(QUICK, min_scale=1.0)):
        right_nn = torch.stack([(plain_nchw == image).flatten(1).all(1) for image in images])
        turned_nn = torch.stack([(plain_nchw.flip(-1) == image).flatten(1).all(1) for image in images])
        assert (right_nn | turned_nn).sum(0).tolist() == [1] * 32
        mirrored.append(turned_nn.any(0).tolist())
    assert 0.4 < np.mean(mirrored) < 0.6
    assert mirrored[0] != mirrored[1]


def test_scoring_uses_the_evaluation_view_and_does_not_change_the_network(tmp_path: Path) -> None:
    here = subject(tmp_path, 8, 12)
    network = _finetuning.Tuned(RandomBackbone(BackboneConfig(), 0).network(), 4)
    nn.init.eye_(network.head.weight)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with ThreadPoolExecutor(1) as threads:
        found_nc = _finetuning.predict(network.train(), here, threads)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    files = here.test.read(np.arange(12), ("image",)).column("image").to_pylist()
    with torch.inference_mode():
        torch.testing.assert_close(found_nc, network.eval()(decode.evaluation_views(files, 16)))


def test_two_images_are_enough_to_learn_from(tmp_path: Path) -> None:
    here = subject(tmp_path, 2, 2)
    assert len(np.unique(here.train.labels())) == 2
    assert all(np.isfinite(row.value) for row in measured(here, replace(QUICK, epochs=1)))


def test_a_step_is_sgd_with_a_learning_rate_for_each_part() -> None:
    backbone, head = nn.Linear(3, 2), nn.Linear(2, 2)
    both = nn.Sequential(backbone, head)
    solvers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.SGD(backbone.parameters(), lr=9.0), 1.0),
        (torch.optim.SGD(head.parameters(), lr=9.0), 10.0),
    ]
    before = [weights.detach().clone() for weights in both.parameters()]
    _finetuning.step(both, both(torch.ones(1, 3)).square().sum(), solvers, 0.01, 0.0)
    rates = (0.01, 0.01, 0.1, 0.1)
    for old, new, rate in zip(before, both.parameters(), rates, strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new.detach(), old - rate * new.grad)


def test_the_gradient_is_clipped_over_all_parts() -> None:
    both = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    solver = torch.optim.SGD(both.parameters(), lr=1.0)
    _finetuning.step(both, 100 * both(torch.ones(1, 3)).square().sum(), [(solver, 1.0)], 1.0, 0.5)
    norms = [weights.grad.norm() for weights in both.parameters() if weights.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_class_of_the_test_set_only_is_never_predicted(tmp_path: Path) -> None:
    here = subject(tmp_path)
    here = replace(here, test=with_classes(here.test, "a", "x", "y", "z"))
    only_a = float((here.test.labels() == 0).mean())
    assert next(row.value for row in measured(here)) <= only_a


def test_unsuitable_data_are_refused(tmp_path: Path) -> None:
    here = subject(tmp_path)
    for wrong, message in (
        (replace(here, test=here.train), "another test set"),
        (replace(here, train=with_classes(here.train)), "no labels"),
        (replace(here, test=with_classes(here.test)), "no labels"),
        (replace(here, test=with_classes(here.test, "w", "x", "y", "z")), "no class in common"),
        (replace(here, train=make_dataset(tmp_path / "one", 1)), "at least two classes"),
    ):
        with pytest.raises(UserError, match=message):
            _finetuning.labels_of("finetune", wrong.train, wrong.test)


def test_divergence_is_refused_with_the_flag(tmp_path: Path) -> None:
    config = replace(QUICK, optim=OptimConfig(lr=1e30))
    with pytest.raises(UserError, match=r"has diverged in the probe finetune.*--finetune\.optim\.lr"):
        measured(subject(tmp_path, 20, 8), config)


def test_a_damaged_image_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise decode.DecodeError("the file is empty")

    monkeypatch.setattr(decode, "cut", damaged)
    with pytest.raises(UserError, match="can no longer be decoded: the file is empty"):
        measured(subject(tmp_path, 20, 8))


def test_pixels_cannot_be_trained_and_give_no_rows(tmp_path: Path) -> None:
    here = replace(subject(tmp_path, 8, 8), encoder=Pixels())
    assert not list(finetune.Finetune(finetune.Config()).examine(here))
