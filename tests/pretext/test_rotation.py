"""Exact turns, counter-clockwise, with the label that says how far."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raysl import pretext
from raysl.pretext import Geometry
from raysl.pretext.rotation import Config, Rotation
from raysl.rng import ImageRng


def rotated(images_bchw: Tensor) -> tuple[Tensor, Tensor]:
    b = len(images_bchw)
    result = Rotation(Config(), Geometry(8)).transform(
        images_bchw, ImageRng(0, np.zeros(b, np.int64), np.arange(b))
    )
    assert result.target is not None
    return result.crops_bpchw[:, 0], result.target


def test_turning_on_to_a_full_circle_gives_the_image_back() -> None:
    x = torch.randint(0, 256, (80, 3, 8, 8), dtype=torch.uint8)
    turned, label_b = rotated(x)
    assert set(label_b.tolist()) == {0, 1, 2, 3}
    for image, result, label in zip(x, turned, label_b.tolist(), strict=True):
        for _ in range((4 - label) % 4):
            result = torch.rot90(result, 1, (1, 2))
        assert torch.equal(result, image)


def test_label_one_is_a_quarter_counter_clockwise() -> None:
    x = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    x[:, :, 0, 3] = 255  # the top right corner goes to the top left, and on to the bottom left
    turned, label_b = rotated(x)
    corners = [(0, 3), (0, 0), (3, 0), (3, 3)]
    for result, label in zip(turned, label_b.tolist(), strict=True):
        row, column = corners[label]
        assert (result[:, row, column] == 255).all()


def test_all_four_turns_come_with_a_label_each() -> None:
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    made = Rotation(Config(turns="all"), Geometry(8))
    result = made.transform(x, ImageRng(0, np.zeros(5, np.int64), np.arange(5)))
    assert made.num_crops == 4
    assert result.target is not None
    assert result.target.tolist() == [[0, 1, 2, 3]] * 5
    for turn in range(4):
        assert torch.equal(torch.rot90(result.crops_bpchw[:, turn], 4 - turn, (2, 3)), x)
    composed = pretext.build("identity+rotation", {"rotation": Config(turns="all")}, Geometry(8))
    assert pretext.label_per_crop(composed)
