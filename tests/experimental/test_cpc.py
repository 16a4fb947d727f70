"""Telling the patches below among others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import Backbone
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.experimental.cpc import Config, Cpc
from raysl.objectives import Setup
from raysl.pretext import Geometry
from raysl.stream.reader import Batch
from tests.objectives.setups import setup

ROWS, SIDE = 7, 4
DOWN = [(k, r, s) for k in (2, 3) for r in range(ROWS - k) for s in range(ROWS)]


def make(transform: str = "patch_grid", **hyperparameters: Any) -> tuple[Backbone, Cpc]:
    backbone, of = setup(transform)
    config = Config(**{"nearest": 2, "farthest": 3, "channels": 8, "dim": 6, "depth": 2, **hyperparameters})
    return backbone, Cpc(config, of)


def batch(b: int, indices: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (b, ROWS**2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    rows = Rows(np.array(indices or range(b)), np.zeros(b, np.int64))
    return Batch(0, rows, None, {"patches": views}, {})


def oracle(
    targets: np.ndarray, predictions: np.ndarray, positive: list[int], scale: float
) -> tuple[float, float]:
    """Loss and accuracy, one prediction at a time."""
    b, p, d = targets.shape
    losses, right = [], []
    for i in range(b):
        for n, place in enumerate(positive):
            scores = targets.reshape(b * p, d) @ predictions[i, n] * scale
            losses.append(np.log(np.exp(scores).sum()) - scores[i * p + place])
            right.append(scores.argmax() == i * p + place)
    return float(np.mean(losses)), float(np.mean(right))


@pytest.mark.parametrize("directions", ["down", "both"])
def test_the_loss_is_info_nce_among_all_patches_of_the_batch(directions: str) -> None:
    backbone, objective = make(directions=directions, scale=2.0, images=0)
    of = batch(3)
    outputs = objective(backbone, of.views)
    down = [(r + k) * ROWS + s for k, r, s in DOWN]
    up = [(ROWS - 1 - r - k) * ROWS + s for k, r, s in DOWN]
    positive = down + (up if directions == "both" else [])
    assert objective.positives().tolist() == positive
    assert outputs["predictions"].shape == (3, len(positive), 6)
    found = objective.loss(outputs, of, None)
    targets, predictions = (outputs[name].detach().double().numpy() for name in ("targets", "predictions"))
    loss, accuracy = oracle(targets, predictions, positive, 2.0)
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert found.metrics["accuracy"].item() == pytest.approx(accuracy)


def test_images_may_meet_in_groups() -> None:
    backbone, objective = make(images=2)
    of = batch(5)
    outputs = {name: x.detach() for name, x in objective(backbone, of.views).items()}
    parts = [
        objective.loss({n: x[i] for n, x in outputs.items()}, batch(len(i), i), None).loss.item() * len(i)
        for i in ([0, 1], [2, 3], [4])
    ]
    assert objective.loss(outputs, of, None).loss.item() == pytest.approx(sum(parts) / 5, rel=1e-6)


def test_another_copy_of_the_image_does_not_count_against_it() -> None:
    backbone, objective = make()
    outputs = objective(backbone, batch(1).views)
    twice = {name: x.repeat(2, 1, 1) for name, x in outputs.items()}
    alone = objective.loss(outputs, batch(1, [3]), None).loss.item()
    assert objective.loss(twice, batch(2, [3, 3]), None).loss.item() == pytest.approx(alone, rel=1e-6)
    assert objective.loss(twice, batch(2, [3, 4]), None).loss.item() > alone + 0.5


def seen(objective: Cpc, backbone: Backbone, prediction: int) -> Tensor:
    """bool (rows,): the rows of patches that a prediction of the first image depends on."""
    views = batch(1).views["patches"].float().requires_grad_()
    objective(backbone, {"patches": views})["predictions"][0, prediction].sum().backward()
    assert views.grad is not None
    return views.grad.abs().sum(dim=(0, 2, 3, 4)).view(ROWS, ROWS).sum(dim=1) > 0


def test_a_prediction_sees_nothing_of_the_rows_that_it_is_about() -> None:
    backbone, objective = make(directions="both", depth=3)
    for n in (DOWN.index((2, 1, 3)), DOWN.index((3, 1, 0))):
        assert seen(objective, backbone, n).tolist() == [True, True, False, False, False, False, False]
        up = seen(objective, backbone, len(DOWN) + n)
        assert up.tolist() == [False, False, False, False, False, True, True]


class Colors(nn.Module):
    """The mean color of a patch in place of a backbone."""

    def forward(self, images_bchw: Tensor) -> Tensor:
        return images_bchw.float().mean(dim=(2, 3)) / 255 - 0.5


def test_it_learns_whose_patches_follow() -> None:
    """Each image is of one color, so that a patch can be told from those of others and not from its own others."""
    torch.manual_seed(0)
    transform = pretext.build("patch_grid", {}, Geometry(image_size=16))
    objective = Cpc(
        Config(farthest=2, channels=16, dim=8, depth=1, images=0, scale=1.0),
        Setup(transform, transform, 3, 64, 0, 0),
    )
    of = batch(4)
    color = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    of.views["patches"] = color[:, None, :, None, None].expand(-1, ROWS**2, -1, SIDE, SIDE)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(objective.loss(objective(Colors(), of.views), of, None).loss)
        optimizer.zero_grad()
        losses[-1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[0].item() > np.log(4 * ROWS**2) - 0.2
    assert losses[-1].item() == pytest.approx(np.log(ROWS**2), abs=0.05)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="whose patches form a grid, as in 'cpc-patch_grid'"):
        make("rotation")
    with pytest.raises(UserError, match=r"cpc\.farthest is 7 and the grid has 7 rows"):
        make(farthest=7)
    with pytest.raises(UserError, match=r"cpc\.nearest is 4 and --cpc\.farthest is 3"):
        Config(nearest=4, farthest=3)
