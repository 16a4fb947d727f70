"""The jigsaw: geometry, order of the patches, labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.errors import UserError
from raysl.pretext import Geometry
from raysl.pretext.jigsaw import Config, Jigsaw
from raysl.rng import ImageRng


def image_rng(count: int) -> ImageRng:
    return ImageRng(0, np.zeros(count, np.int64), np.arange(count))


def coordinates(side: int, count: int) -> Tensor:
    """Images whose red is the row and whose green is the column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8).expand(count, -1, -1, -1)


@pytest.mark.parametrize(
    ("image_size", "source", "cell", "patch"),
    [(224, 255, 85, 64), (32, 36, 12, 9), (64, 72, 24, 18), (96, 108, 36, 27), (128, 144, 48, 36)],
)
def test_sizes_follow_the_published_ratios(image_size: int, source: int, cell: int, patch: int) -> None:
    facts = Jigsaw(Config(), Geometry(image_size)).describe()
    assert (facts["source_size"], facts["cell_size"], facts["patch_size"]) == (source, cell, patch)


@pytest.mark.parametrize("grid", [2, 3])
def test_undoing_the_permutation_gives_the_cells_row_by_row(grid: int) -> None:
    made = Jigsaw(Config(grid=grid), Geometry(64))
    b, cell = 300, made.cell_size
    result = made.transform(coordinates(made.source.size, b), image_rng(b))
    assert result.target is not None
    order_bp = torch.from_numpy(made.permutations.order_kp[result.target.numpy()]).long()
    back = torch.empty_like(result.crops_bpchw)
    back[torch.arange(b)[:, None], order_bp] = result.crops_bpchw
    corner_bp2 = back[:, :, :2, 0, 0].long()
    slot = torch.arange(grid * grid)
    assert torch.equal(corner_bp2[..., 0] // cell, (slot // grid).expand(b, -1))
    assert torch.equal(corner_bp2[..., 1] // cell, (slot % grid).expand(b, -1))
    # Every patch is one contiguous piece, inside its cell, at every offset that is possible.
    assert torch.equal(back, back[..., :1, :1] + coordinates(made.patch_size, 1))
    offset_bp2 = corner_bp2 % cell
    assert set(offset_bp2.flatten().tolist()) == set(range(cell - made.patch_size + 1))
    assert len({tuple(o) for o in offset_bp2.flatten(1).tolist()}) > b * 0.99, "patches share their offsets"


@pytest.mark.parametrize(
    ("grid", "predicted", "count"),
    [(3, False, math.factorial(9)), (3, True, 100), (2, False, 24), (2, True, 24)],
)
def test_default_size_of_the_set(grid: int, predicted: bool, count: int) -> None:
    made = Jigsaw(Config(grid=grid), Geometry(32, predicted=predicted))
    assert made.num_labels == count == made.describe()["num_permutations"]


def test_the_metadata_tell_sets_apart() -> None:
    facts = [
        Jigsaw(Config(num_permutations=20, permutation_seed=s), Geometry(32)).describe() for s in (0, 0, 1)
    ]
    assert facts[0] == facts[1]
    assert facts[0]["permutations_digest"] != facts[2]["permutations_digest"]
    assert facts[0]["permutations_min_hamming"] >= 6


@pytest.mark.parametrize(
    ("config", "geometry", "message"),
    [
        (Config(), Geometry(8), "image-size 8 has patches of 2 pixels"),
        (Config(grid=8, num_permutations=10), Geometry(32), "image-size 32 has patches of 3 pixels"),
        (Config(grid=4), Geometry(64), "Set --jigsaw.num-permutations"),
        (Config(patch_size=13), Geometry(32), "patches of 13 pixels in cells of 12"),
        (Config(source_size=37), Geometry(32), "which is 3, such as 36"),
        (
            Config(grid=2, num_permutations=25),
            Geometry(32),
            "num-permutations is 25; with 4 tiles there are 24",
        ),
    ],
)
def test_impossible_jigsaws_are_refused(config: Config, geometry: Geometry, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Jigsaw(config, geometry)


def test_finer_grids_work_with_a_chosen_set() -> None:
    made = Jigsaw(Config(grid=4, num_permutations=20), Geometry(64))
    assert made.transform(coordinates(made.source.size, 4), image_rng(4)).crops_bpchw.shape == (
        4,
        16,
        3,
        14,
        14,
    )
