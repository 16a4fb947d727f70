"""Several tasks on one backbone."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl import pretext
from raysl.backbone.network import Backbone, BackboneConfig, build
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.model import DatasetInfo, Model
from raysl.objectives import Setup
from raysl.objectives.multitask import Config, Multitask, Turns
from raysl.objectives.predict import Predict
from raysl.pretext import Geometry
from raysl.rng import ImageRng
from raysl.stream.reader import Batch

TASKS = ("rotation", "colorization", "rotation+jigsaw")


def make(*tasks: str, **hyperparameters: Any) -> tuple[Backbone, Multitask]:
    torch.manual_seed(0)
    geometry = Geometry(image_size=32, predicted=True)
    backbone = build(BackboneConfig(norm="group"))
    built = {task: pretext.build(task, {}, geometry) for task in tasks}
    identity = pretext.build("identity", {}, geometry)
    setup = Setup(None, identity, backbone.width, 64, 0, 0, tasks=built)
    return backbone, Multitask(Config(**{"crop_width": 8, **hyperparameters}), setup)


def batch(objective: Multitask, tasks: tuple[str, ...], b: int = 4) -> Batch:
    rows = Rows(np.arange(b), np.zeros(b, np.int64))
    views: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for task in tasks:
        side = objective.views[task].source.size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8, generator=generator)
        made = objective.views[task].transform(images, ImageRng(0, rows.epochs_b, rows.indices_b).named(task))
        assert made.target is not None
        views[task], targets[task] = made.crops_bpchw, made.target
    return Batch(0, rows, None, views, targets)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_step_is_that_of_its_task_alone(task: str) -> None:
    backbone, objective = make(*TASKS)
    of = batch(objective, (task,))
    found = objective.loss(objective(backbone, of.views), of, None)
    head = objective.heads[task]
    assert isinstance(head, Predict)
    alone = Batch(0, of.rows, None, {"transformed": of.views[task]}, {"transformed": of.targets[task]})
    expected = head.loss(head(backbone, alone.views), alone, None)
    assert found.loss.item() == expected.loss.item()
    assert found.metrics[f"loss/{task}"].item() == expected.loss.item()
    assert {f"{name}/{task}" for name in expected.metrics} == set(found.metrics) - {f"loss/{task}"}


def test_other_heads_stay_as_they_are_momentum_included() -> None:
    backbone, objective = make("rotation", "colorization")
    parameters = [*backbone.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    for task in ("rotation", "colorization"):
        before = {name: p.clone() for name, p in objective.named_parameters()}
        of = batch(objective, (task,))
        optimizer.zero_grad(set_to_none=True)
        objective.loss(objective(backbone, of.views), of, None).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, p in objective.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith(f"heads.{task}."), name


class TestTurns:
    def test_round_robin(self) -> None:
        turns = Turns(("a", "b", "c"), (), seed=0)
        assert [turns(step)[0] for step in range(7)] == list("abcabca")

    def test_by_weight_and_by_seed_and_step_alone(self) -> None:
        turns = Turns(("a", "b"), (1.0, 3.0), seed=0)
        drawn = [turns(step)[0] for step in range(2000)]
        assert Counter(drawn)["b"] == pytest.approx(1500, abs=80)
        assert [turns(step)[0] for step in range(1990, 2000)] == drawn[1990:]
        other = Turns(("a", "b"), (1.0, 3.0), seed=1)
        assert [other(step)[0] for step in range(2000)] != drawn

    def test_they_travel_to_the_data_tasks(self) -> None:
        _, objective = make("rotation", "jigsaw")
        turns = pickle.loads(pickle.dumps(objective.schedule()))
        assert turns(3) == ("jigsaw",)


def test_gray_shows_every_task_the_same_kind_of_image() -> None:
    _, objective = make(*TASKS, gray=True)
    _, colored = make(*TASKS)
    of, plain = batch(objective, TASKS), batch(colored, TASKS)
    for task in TASKS:
        red, green, blue = of.views[task].unbind(2)
        assert torch.equal(red, green)
        assert torch.equal(red, blue)
        assert torch.equal(of.targets[task], plain.targets[task])
    assert torch.equal(of.views["colorization"], plain.views["colorization"]), "gray already"


def test_the_method_names_the_tasks() -> None:
    config = Pretraining(
        data="-",
        run="-",
        method="multitask-relative_position,rotation+jigsaw",
        parts={"multitask": {"weights": [1, 2]}, "jigsaw": {"num_permutations": 10}},
        view=ViewConfig(image_size=32),
    )
    network = Model(config, DatasetInfo(64))
    assert list(network.views()) == ["relative_position", "rotation+jigsaw"]
    assert network.describe()["rotation+jigsaw"]["parts"][1]["num_permutations"] == 10
    schedule = network.schedule()
    assert schedule is not None
    assert set(schedule(0)) <= set(network.views())
    assert Pretraining.from_json(config.to_json()) == config


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_chance_is_the_mean_over_steps(weights: tuple[float, ...]) -> None:
    _, objective = make("rotation", "rotation+jigsaw", weights=weights)
    each: list[Any] = [head.chance for head in objective.heads.values()]
    assert objective.chance == pytest.approx(np.average(each, weights=weights or None))
    assert make("rotation", "colorization", weights=weights)[1].chance is None


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"--multitask\.gray is for tasks of images, and 'frame_order'"):
        make("rotation", "frame_order", gray=True)
    with pytest.raises(UserError, match="needs a pretext transform, as in 'multitask-rotation,jigsaw'"):
        make()
    with pytest.raises(UserError, match="nothing to predict"):
        make("rotation", "identity")
    with pytest.raises(UserError, match=r"multitask\.weights has 3 values for 2 tasks \(rotation, jigsaw\)"):
        make("rotation", "jigsaw", weights=(1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"multitask\.weights is \(1\.0, 0\.0\)"):
        Config(weights=(1.0, 0.0))
