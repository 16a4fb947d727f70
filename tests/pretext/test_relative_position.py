"""Two patches and where the second lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.errors import UserError
from raysl.pretext import Geometry
from raysl.pretext.relative_position import Config, RelativePosition
from raysl.rng import ImageRng

STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
COUNT = 400


def transformed(made: RelativePosition, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
    count = len(images_bchw)
    result = made.transform(images_bchw, ImageRng(0, np.zeros(count, np.int64), np.arange(count)))
    assert result.target is not None
    return result.crops_bpchw, result.target


def coordinates(side: int) -> Tensor:
    """Images whose red is the row and whose green is the column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8).expand(COUNT, -1, -1, -1)


@pytest.mark.parametrize("both_orders", [False, True])
def test_the_label_is_the_way_from_the_first_patch_to_the_second(both_orders: bool) -> None:
    made = RelativePosition(Config(both_orders=both_orders, color_drop="none"), Geometry(64))
    crops, label_b = transformed(made, coordinates(made.source.size))
    corner_bp2 = crops[:, :, :2, 0, 0].long()
    pitch = made.patch_size + made.gap
    off_b2 = corner_bp2[:, 1] - corner_bp2[:, 0] - pitch * torch.tensor(STEPS)[label_b]
    assert off_b2.abs().max() <= 2 * made.jitter
    centered = ((corner_bp2[:, 0] - pitch).abs() <= 2 * made.jitter).all(1)
    assert bool(centered.all()) != both_orders
    assert float(centered.float().mean()) > 0.4
    assert set(label_b.tolist()) == set(range(8))
    # Every patch is one contiguous piece.
    size = made.patch_size
    assert torch.equal(crops[:, :, :2], crops[:, :, :2, :1, :1] + coordinates(size)[:, None, :2])


def test_patches_never_touch_and_move_as_far_as_the_jitter() -> None:
    made = RelativePosition(Config(color_drop="none"), Geometry(96))
    crops, _ = transformed(made, coordinates(made.source.size))
    corner_bp2 = crops[:, :, :2, 0, 0].long()
    apart = (corner_bp2[:, 1] - corner_bp2[:, 0]).abs().amax(1) - made.patch_size
    assert int(apart.min()) >= 1
    middle = corner_bp2[:, 0] - made.patch_size - made.gap
    assert (int(middle.min()), int(middle.max())) == (0, 2 * made.jitter)


@pytest.mark.parametrize(("image_size", "source", "patch"), [(350, 398, 96), (64, 73, 18), (32, 36, 9)])
def test_sizes_follow_the_published_ratios(image_size: int, source: int, patch: int) -> None:
    facts = RelativePosition(Config(), Geometry(image_size)).describe()
    assert (facts["source_size"], facts["patch_size"]) == (source, patch)
    if image_size == 350:
        assert (facts["gap"], facts["jitter"]) == (48, 7)


def random_images(made: RelativePosition) -> Tensor:
    side = made.source.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (COUNT, 3, side, side), dtype=torch.uint8, generator=generator)


def test_one_channel_of_each_patch_is_kept_and_the_others_are_noise() -> None:
    made = RelativePosition(Config(), Geometry(64))
    plain = RelativePosition(Config(color_drop="none"), Geometry(64))
    x = random_images(made)
    crops, before = transformed(made, x)[0], transformed(plain, x)[0]
    kept_bpc = (crops == before).flatten(3).all(3)
    assert (kept_bpc.sum(2) == 1).all()
    assert kept_bpc.float().mean((0, 1)).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert (kept_bpc[:, 0] != kept_bpc[:, 1]).any(), "the patches of an image lose different channels"
    noise = crops[~kept_bpc].float()
    assert set(noise.unique().tolist()) == {127, 128, 129}  # type: ignore[no-untyped-call]


def test_gray_patches_and_how_often() -> None:
    made = RelativePosition(Config(color_drop="gray", drop_probability=0.66), Geometry(64))
    crops, _ = transformed(made, random_images(made))
    gray_b = (crops[:, :, :1] == crops).flatten(1).all(1)
    assert float(gray_b.float().mean()) == pytest.approx(0.66, abs=0.07)


def test_the_recipe_does_not_mix_dropped_channels() -> None:
    assert RelativePosition(Config(), Geometry(64)).color == "source"
    assert RelativePosition(Config(color_drop="none"), Geometry(64)).color == "crops"


@pytest.mark.parametrize(
    ("hyperparameters", "geometry", "message"),
    [
        ({}, Geometry(8), "image-size 8 has patches of 2 pixels"),
        ({"patch_size": 30}, Geometry(64), "image-size 64 has patches of 30 pixels with gaps of -11"),
        ({"jitter": 9}, Geometry(64), "a jitter of 9"),
    ],
)
def test_patches_that_do_not_fit_are_refused(
    hyperparameters: dict[str, float], geometry: Geometry, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        RelativePosition(Config(**hyperparameters), geometry)  # type: ignore[arg-type]
