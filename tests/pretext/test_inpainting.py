"""Holes in the image, and what was there as the target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.errors import UserError
from raysl.pretext import Geometry
from raysl.pretext.inpainting import Config, Inpainting
from raysl.rng import ImageRng

FILL = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]


def transformed(config: Config, count: int = 40, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """The images, what the network sees of them, and the target."""
    generator = torch.Generator().manual_seed(0)
    # Values that the filling does not have.
    x = torch.randint(130, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    result = Inpainting(config, Geometry(side)).transform(
        x, ImageRng(0, np.zeros(count, np.int64), np.arange(count))
    )
    assert result.target is not None
    return x, result.crops_bpchw[:, 0], result.target


@pytest.mark.parametrize("mode", ["random", "center"])
@pytest.mark.parametrize("side", [32, 50])
def test_cells_that_the_target_marks_are_filled_and_nothing_else_changes(mode: str, side: int) -> None:
    x, seen, target = transformed(Config(mode="random" if mode == "random" else "center"), side=side)
    assert target.shape == (40, 4, 8, 8)
    hole = (seen == FILL).all(1)
    cell = torch.arange(side) * 8 // side
    assert torch.equal(hole, target[:, 3][:, cell][:, :, cell] == 255)
    assert torch.equal(torch.where(hole[:, None], x, seen), x)


def test_the_target_is_the_color_of_every_cell_before() -> None:
    x, _, target = transformed(Config())
    cells = x.float().unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))  # type: ignore[no-untyped-call]
    assert (target[:, :3].float() - cells).abs().max() <= 0.501


def test_the_center_is_the_half_of_each_side() -> None:
    _, _, target = transformed(Config(mode="center"))
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[2:6, 2:6] = 255
    assert (target[:, 3] == expected).all()


def test_random_holes_differ_cover_every_cell_and_at_most_the_share() -> None:
    _, _, target = transformed(Config(), count=300)
    missing = target[:, 3] == 255
    assert len(missing.flatten(1).unique(dim=0)) > 250  # type: ignore[no-untyped-call]
    assert missing.any(0).all()
    share = missing.float().mean((1, 2))
    assert float(share.min()) > 0
    assert float(share.max()) <= 0.25
    assert float(share.mean()) > 0.18


def test_only_what_is_missing_is_judged_and_every_image_counts_alike() -> None:
    made = Inpainting(Config(), Geometry(32))
    _, _, target = transformed(Config(), count=5)
    right = target[:, :3] / 127.5 - 1
    missing = target[:, 3:] / 255
    assert float(made.loss(right, target)) == 0
    assert float(made.loss(right + 3 * (1 - missing), target)) == 0
    assert float(made.loss(right + 2 * missing, target)) == pytest.approx(4)
    one = torch.zeros(5, 1, 1, 1)
    one[2] = 1
    assert float(made.loss(right + one, target)) == pytest.approx(1 / 5)


@pytest.mark.parametrize("grid", [5, 40])
def test_an_impossible_grid_is_refused(grid: int) -> None:
    with pytest.raises(UserError, match=f"--inpainting.grid is {grid} and --view.image-size is 32"):
        Inpainting(Config(grid=grid), Geometry(32))
