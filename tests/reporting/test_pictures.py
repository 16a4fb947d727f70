"""The grid shows the pixels that the network gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.augment import recipe
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.objectives.clusterfit import Config
from raysl.pretext import Geometry, build
from raysl.reporting.pictures import mosaic, neighbors_grid, views_grid, views_of
from raysl.rng import ImageRng
from raysl.stream.decode import cut, decode
from raysl.stream.views import View
from tests.data import make_dataset
from tests.objectives.setups import clusters


def views(image_size: int = 32) -> dict[str, View]:
    geometry = Geometry(image_size)
    return {
        name: View(build(name, {}, geometry), recipe("pirl")) for name in ("jigsaw", "identity", "rotation")
    }


def test_mosaic_keeps_the_order_of_the_crops_and_their_pixels() -> None:
    crops = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 9, 9) * 20
    shown = np.asarray(mosaic(crops))
    pitch = (shown.shape[0] + 4) // 3
    for i in range(9):
        cell = shown[i // 3 * pitch :, i % 3 * pitch :][: pitch - 4, : pitch - 4]
        assert (cell == i * 20).all()
    assert (pitch - 4) % 9 == 0


def test_grid_holds_the_crops_of_the_stream(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3, side=32)
    indices = np.arange(3)
    image_rng = ImageRng(4, np.zeros_like(indices), indices)
    files = dataset.read(indices).column("image").to_pylist()
    grid = np.asarray(views_grid(dataset, views(), seed=4, count=3))
    for name, view in views().items():
        crops = cut(files, {name: view.source}, image_rng)[name]
        made = view(crops, image_rng.named(name)).crops_bpchw
        for r in range(3):
            assert contains(grid, np.asarray(mosaic(made[r])))


def contains(grid: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture stands somewhere in the grid, pixel for pixel."""
    height, width = picture.shape[:2]
    corner = (grid[: -height + 1, : -width + 1] == picture[0, 0]).all(-1)
    return any(np.array_equal(grid[y : y + height, x : x + width], picture) for y, x in np.argwhere(corner))


@pytest.mark.parametrize("side", [16, 300])
def test_grid_has_a_size_for_people_whatever_the_size_of_the_images(tmp_path: Path, side: int) -> None:
    dataset = make_dataset(tmp_path / "set", 5, side=side)
    small, large = (views_grid(dataset, views(size), count=9) for size in (32, 224))
    assert small.size == large.size
    assert 800 <= small.width <= 1200


def test_views_of_few_images_and_of_labels_for_each(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3, side=32)
    assert set(views_of(Pretraining(str(dataset.folder), "-", "pirl-jigsaw"), dataset)) == {
        "transformed",
        "image",
    }
    labels = clusters(tmp_path / "labels.parquet", np.arange(3))
    fitted = Pretraining(str(dataset.folder), "-", "clusterfit", parts={"clusterfit": Config(labels)})
    assert len(views_of(fitted, dataset)) == 1
    with pytest.raises(UserError, match="3 rows"):
        views_of(fitted, make_dataset(tmp_path / "other", 4, side=32))


def test_a_grid_of_neighbors_shows_the_images_that_were_found(tmp_path: Path) -> None:
    gallery, queries = make_dataset(tmp_path / "set", 9), make_dataset(tmp_path / "other", 4, seed=1)
    nearest_qk, cosine_qk = np.array([[8, 0], [3, 5]]), np.ones((2, 2), np.float32)
    grid = np.asarray(neighbors_grid(queries, gallery, np.array([3, 1]), nearest_qk, cosine_qk))
    for dataset, indices in ((queries, [3, 1]), (gallery, [8, 0, 3, 5])):
        for data in dataset.read(np.array(indices)).column("image").to_pylist():
            assert contains(grid, np.asarray(mosaic(decode(data)[None])))
