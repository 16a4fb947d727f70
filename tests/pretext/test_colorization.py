"""Lightness in, colors out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.augment import Recipe
from raysl.errors import UserError
from raysl.pretext import Geometry, Transformed, build
from raysl.pretext.colorization import Colorization, Config, rebalancing
from raysl.rng import ImageRng
from raysl.stream.views import View

# CIE L*a*b* of sRGB primaries under D65, from any table of colors.
KNOWN = {
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (119, 119, 119): (50.03, 0.0, 0.0),
}


def image_rng(count: int) -> ImageRng:
    return ImageRng(0, np.zeros(count, np.int64), np.arange(count))


def plain(colors: list[tuple[int, int, int]], side: int = 32) -> Tensor:
    return torch.tensor(colors, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, side, side).contiguous()


def transformed(images_bchw: Tensor, config: Config | None = None) -> Transformed:
    side = images_bchw.shape[-1]
    return Colorization(config or Config(), Geometry(side)).transform(
        images_bchw, image_rng(len(images_bchw))
    )


def test_known_colors() -> None:
    result = transformed(plain(list(KNOWN)))
    assert result.target is not None
    assert result.target.shape == (len(KNOWN), 2, 8, 8)
    for i, (lightness, a, b) in enumerate(KNOWN.values()):
        assert (result.crops_bpchw[i].float() * 100 / 255 - lightness).abs().max() < 0.25
        found = result.target[i].float() - 128
        assert (found - torch.tensor([a, b])[:, None, None]).abs().max() <= 0.51


def test_the_network_sees_no_color_and_the_target_is_that_of_each_cell() -> None:
    image = plain([(128, 128, 128)])
    image[0, :, :4, 28:] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    result = transformed(image)
    gray = result.crops_bpchw[0, 0]
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    assert result.target is not None
    colored = (result.target[0] != 128).any(0)
    assert colored.nonzero().tolist() == [[0, 7]]


def test_the_recipe_acts_before_the_target_is_taken() -> None:
    view = View(build("colorization", {}, Geometry(32)), Recipe(gray=1))
    target = view(plain([(255, 0, 0)]), image_rng(1)).target
    assert target is not None
    assert (target == 128).all()


def test_colors_share_the_nearest_bins() -> None:
    made = Colorization(Config(), Geometry(32))
    bin_nk, share_nk = made.soft_bins(torch.tensor([[20.0, -30.0], [24.0, -30.0]]))
    assert made.bins_q2[bin_nk[:, 0]].tolist() == [[20, -30], [20, -30]]
    torch.testing.assert_close(share_nk.sum(1), torch.ones(2))
    assert (share_nk.diff(dim=1) <= 0).all()
    assert share_nk[0, 0] > share_nk[1, 0]


def test_bins_are_those_of_the_screen_and_weighed_by_rarity() -> None:
    made = Colorization(Config(), Geometry(32))
    bins = {tuple(ab) for ab in made.bins_q2.tolist()}
    assert 240 < len(bins) < 320
    assert {(0, 0), (80, 70), (80, -110)} <= bins
    assert (100, 100) not in bins
    prior_q = (-made.bins_q2.norm(dim=1) / 8).softmax(0)
    assert float((prior_q * made.weights_q).sum()) == pytest.approx(1, rel=1e-4)
    assert made.weights_q.argmin() == made.bins_q2.square().sum(1).argmin()
    torch.testing.assert_close(rebalancing(made.bins_q2, 8, 1), torch.ones(len(made.bins_q2)))


@pytest.mark.parametrize("mode", ["classify", "regress"])
def test_the_right_colors_cost_least(mode: str) -> None:
    made = Colorization(Config(mode="classify" if mode == "classify" else "regress"), Geometry(32))
    target = transformed(plain([(200, 60, 30), (20, 90, 160)])).target
    assert target is not None

    def output(of: Tensor) -> Tensor:
        ab = of.float() - 128
        if mode == "regress":
            return ab / 12
        bins = made.bins_q2[:, :, None, None]
        return -(ab[:, None] - bins).square().sum(2) / 50

    right, wrong = made.loss(output(target), target), made.loss(output(target.flip(0)), target)
    assert right * 2 < wrong


def test_what_it_predicts_of_one_image_can_be_learned() -> None:
    torch.manual_seed(0)
    made = Colorization(Config(grid=4), Geometry(32))
    target = transformed(plain([(200, 60, 30), (20, 90, 160)]), Config(grid=4)).target
    assert target is not None
    head, features = made.head(8), torch.eye(2, 8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = made.loss(head(features), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("grid", [7, 64])
def test_an_impossible_grid_is_refused(grid: int) -> None:
    with pytest.raises(UserError, match=f"--colorization.grid is {grid} and --view.image-size is 32"):
        Colorization(Config(grid=grid), Geometry(32))
