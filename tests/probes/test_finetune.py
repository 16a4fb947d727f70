"""The whole network learns what its labels say, by the schedule that it was given."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.features import Pixels, RandomTrunk
from raysl.network.trunk import TrunkConfig
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject, _tuning, finetune
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_dataset

QUICK = finetune.Config(epochs=5, batch_size=16, optim=OptimConfig(lr=0.5, weight_decay=0.0))


def subject(folder: Path, train: int = 80, test: int = 40) -> Subject:
    sets = make_dataset(folder / "train", train), make_dataset(folder / "test", test, seed=1)
    return Subject(RandomTrunk(TrunkConfig(), 0), ("pooled",), 16, *sets, 0, Folder(str(folder / "out")))


def measured(of: Subject, config: finetune.Config = QUICK) -> list[Row]:
    """In this process, without Ray."""
    train_n, test_n = _tuning.labels_of(of)
    return _tuning.measure(of, config, np.arange(len(train_n)), train_n, test_n)


def with_classes(data: DataSet, *classes: str) -> DataSet:
    return replace(data, manifest=replace(data.manifest, classes=classes))


def test_the_network_learns_and_says_the_same_twice(tmp_path: Path) -> None:
    here = subject(tmp_path)
    found = measured(here)
    assert [row.name for row in found] == ["top1", "train_loss"]
    assert {row.layer for row in found} == {"pooled"}
    assert found[0].value > 0.6
    assert found[1].value < 0.7 * np.log(4)
    assert found == measured(here)
    assert found != measured(replace(here, seed=1))


def test_loss_falls_and_the_trunk_moves(tmp_path: Path) -> None:
    here = subject(tmp_path)
    trunk = RandomTrunk(TrunkConfig(), 0).network()
    before = trunk.body.state_dict()["conv1.weight"].clone()
    network = _tuning.Tuned(trunk, 4)
    labels_n = here.train.labels()
    with ThreadPoolExecutor(1) as threads:
        losses = _tuning.train(network, here, QUICK, np.arange(80), labels_n, threads)
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(before, trunk.body.state_dict()["conv1.weight"])


def test_a_step_is_sgd_with_a_rate_for_each_part() -> None:
    trunk, head = nn.Linear(3, 2), nn.Linear(2, 2)
    both = nn.Sequential(trunk, head)
    solvers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.SGD(trunk.parameters(), lr=9.0), 1.0),
        (torch.optim.SGD(head.parameters(), lr=9.0), 10.0),
    ]
    before = [weights.detach().clone() for weights in both.parameters()]
    _tuning.step(both, both(torch.ones(1, 3)).square().sum(), solvers, 0.01, 0.0)
    rates = (0.01, 0.01, 0.1, 0.1)
    for old, new, rate in zip(before, both.parameters(), rates, strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new.detach(), old - rate * new.grad)


def test_a_gradient_is_clipped_over_all_parts() -> None:
    both = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    solver = torch.optim.SGD(both.parameters(), lr=1.0)
    _tuning.step(both, 100 * both(torch.ones(1, 3)).square().sum(), [(solver, 1.0)], 1.0, 0.5)
    norms = [weights.grad.norm() for weights in both.parameters() if weights.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_class_that_only_the_test_set_has_is_never_predicted(tmp_path: Path) -> None:
    here = subject(tmp_path)
    here = replace(here, test=with_classes(here.test, "a", "x", "y", "z"))
    only_a = float((here.test.labels() == 0).mean())
    assert next(row.value for row in measured(here)) <= only_a


def test_data_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    here = subject(tmp_path)
    for wrong, message in (
        (replace(here, test=here.train), "another test set"),
        (replace(here, train=with_classes(here.train)), "no labels"),
        (replace(here, test=with_classes(here.test)), "no labels"),
        (replace(here, test=with_classes(here.test, "w", "x", "y", "z")), "no class in common"),
        (replace(here, train=make_dataset(tmp_path / "one", 1)), "at least two classes"),
    ):
        with pytest.raises(UserError, match=message):
            _tuning.labels_of(wrong)


def test_divergence_is_said(tmp_path: Path) -> None:
    config = replace(QUICK, optim=OptimConfig(lr=1e30))
    with pytest.raises(UserError, match="have diverged"):
        measured(subject(tmp_path, 20, 8), config)


def test_a_damaged_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise decode.DecodeError("the file is empty")

    monkeypatch.setattr(decode, "cut", damaged)
    with pytest.raises(UserError, match="no longer can: the file is empty"):
        measured(subject(tmp_path, 20, 8))


def test_pixels_cannot_be_trained_and_give_no_rows(tmp_path: Path) -> None:
    here = replace(subject(tmp_path, 8, 8), encoder=Pixels())
    assert not list(finetune.Finetune(finetune.Config()).examine(here))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"head_lr": 0.0}, {"min_scale": 2.0}])
def test_a_protocol_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"finetune\.{next(iter(wrong))}"):
        replace(finetune.Config(), **wrong)  # type: ignore[arg-type]
