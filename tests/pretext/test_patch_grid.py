"""Overlapping patches in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl import pretext
from raysl.errors import UserError
from raysl.pretext import Geometry
from raysl.pretext.patch_grid import Config, PatchGrid
from raysl.rng import ImageRng


def patches(made: PatchGrid, images_bchw: Tensor) -> Tensor:
    b = len(images_bchw)
    return made.transform(images_bchw, ImageRng(0, np.zeros(b, np.int64), np.arange(b))).crops_bpchw


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (Config(), {"source_size": 256, "patch_size": 64, "stride": 32}),
        (Config(grid=6, overlap=0.55, source_size=260), {"source_size": 260, "patch_size": 80, "stride": 36}),
        (Config(grid=4, overlap=0.0), {"source_size": 256, "patch_size": 64, "stride": 64}),
    ],
)
def test_it_has_the_published_sizes(config: Config, sizes: dict[str, int]) -> None:
    assert PatchGrid(config, Geometry(224)).describe() == sizes


def test_patches_lie_row_by_row_and_overlap() -> None:
    made = PatchGrid(Config(grid=3), Geometry(32))
    side, stride = made.patch_size, made.stride
    x = torch.randint(0, 256, (2, 3, made.source.size, made.source.size), dtype=torch.uint8)
    found = patches(made, x)
    for p in range(9):
        top, left = p // 3 * stride, p % 3 * stride
        assert torch.equal(found[:, p], x[:, :, top : top + side, left : left + side])
    assert torch.equal(found[:, 0, :, :, stride:], found[:, 1, :, :, : side - stride])
    assert top + side == left + side == made.source.size, "no pixel is left out"


def test_its_crops_have_places_and_those_of_others_have_none() -> None:
    geometry = Geometry(32)
    assert pretext.columns(pretext.build("patch_grid", {}, geometry)) == 7
    assert pretext.columns(pretext.build("rotation+patch_grid", {}, geometry)) == 7
    assert pretext.columns(pretext.build("jigsaw", {}, geometry)) == 0


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match=r"image-size 12 has 7 x 7 patches of 3 pixels"):
        PatchGrid(Config(), Geometry(12))
