"""The ranking loss: its value by hand, the hardest negatives, and pairs of any transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysl import pretext
from raysl.dataset import Rows
from raysl.objectives import Setup
from raysl.objectives.triplet import Config, Triplet
from raysl.pretext import Geometry
from raysl.stream.reader import Batch


def make(transform: str, steps: int = 100, **config: float) -> Triplet:
    geometry = Geometry(32)
    made = pretext.build(transform, {}, geometry) if transform else None
    setup = Setup(made, pretext.build("identity", {}, geometry), 8, 100, 0, 0, num_steps=steps)
    return Triplet(Config(dim=4, **config), setup)  # type: ignore[arg-type]


def batch(step: int, b: int) -> Batch:
    return Batch(step, Rows(np.arange(b), np.zeros(b, np.int64)), None, {}, {})


def test_two_crops_are_a_pair_and_other_transforms_give_two_views() -> None:
    assert list(make("tracking").views) == ["pair"]
    assert list(make("rotation").views) == ["b", "a"]
    assert list(make("").views) == ["b", "a"]


@pytest.mark.parametrize("step", [0, 50])
def test_the_loss_by_hand(step: int) -> None:
    torch.manual_seed(0)
    pairs = F.normalize(torch.randn(3, 2, 4), dim=2)
    objective = make("tracking", margin=0.5, hardest=2, hard_from=0.3)
    found = objective.loss({"embeddings": pairs}, batch(step, 3), None).loss.item()
    losses = []
    for i in range(3):
        for view in range(2):
            own = float(pairs[i, view] @ pairs[i, 1 - view])
            hinges = [
                max(0.0, float(pairs[i, view] @ pairs[j, other]) - own + 0.5)
                for j in range(3)
                for other in range(2)
                if j != i
            ]
            losses.append(np.mean(hinges) if step < 30 else np.mean(sorted(hinges)[-2:]))
    assert found == pytest.approx(np.mean(losses), abs=1e-6)


def test_pairs_apart_by_the_margin_cost_nothing() -> None:
    pairs = torch.eye(4)[:, None].expand(4, 2, 4)
    found = make("tracking", margin=0.5).loss({"embeddings": pairs}, batch(99, 4), None)
    assert found.loss.item() == 0
    assert float(found.metrics["accuracy"]) == 1
