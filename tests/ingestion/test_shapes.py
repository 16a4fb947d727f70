"""Tests of the procedural set: each image is a pure function of (seed, split, index)."""

from __future__ import annotations

import numpy as np
import pytest

from raysl.errors import UserError
from raysl.ingestion import png
from raysl.ingestion.drawing import CLASSES, draw
from raysl.ingestion.sources import Row, SourceLocation, UnitSize, open_source, read
from raysl.rng import ImageRng
from raysl.stream.decode import decode


def rows(source: str, unit_images: int = 1000) -> list[Row]:
    opened = open_source(SourceLocation.parse(source))
    units = opened.source.units(UnitSize(unit_images, 1 << 30))
    return [row for unit in units for row in read(opened.kind, unit)]


def test_an_image_does_not_depend_on_its_unit_or_on_the_size_of_the_set() -> None:
    assert rows("shapes:300") == rows("shapes:300", unit_images=70)
    assert rows("shapes:300")[:50] == rows("shapes:50")


def test_seeds_and_splits_differ() -> None:
    sources = ("shapes:50", "shapes:50#test", "shapes:50?seed=1")
    images = [row.image for source in sources for row in rows(source)]
    assert len(set(images)) == 150


def test_the_default_split_is_train() -> None:
    assert rows("shapes:20") == rows("shapes:20#train")


def test_size_and_labels() -> None:
    made = rows("shapes:200?size=48&seed=5")
    assert {row.label for row in made} == set(CLASSES)
    assert made[0].image is not None
    assert decode(made[0].image).shape == (3, 48, 48)


def test_plain_images_are_others_of_the_same_shapes() -> None:
    usual, plain = rows("shapes:20"), rows("shapes:20?plain=1")
    assert [row.label for row in usual] == [row.label for row in plain]
    assert all(a.image != b.image for a, b in zip(usual, plain, strict=True))


def test_pixels_survive_the_png() -> None:
    image_rng = ImageRng(0, np.zeros(4, np.int64), np.arange(4), "shapes/train")
    pixels_bhwc, _ = draw(image_rng, 32)
    for image_hwc, data in zip(pixels_bhwc, png.encode(pixels_bhwc), strict=True):
        assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), image_hwc)


def test_raw_pixels_do_not_give_the_label_away() -> None:
    image_rng = ImageRng(0, np.zeros(1000, np.int64), np.arange(1000), "shapes/train")
    pixels_bhwc, labels = draw(image_rng, 32)
    flat = pixels_bhwc.reshape(1000, -1).astype(np.float32)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    nearest = (flat[800:] @ flat[:800].T).argmax(1)
    right = np.mean(np.array(labels)[:800][nearest] == np.array(labels)[800:])
    assert right < 0.4


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("shapes:", "number of images"),
        ("shapes:0", "from 1 to"),
        ("shapes:ten", "'ten'"),
        ("shapes:10?size=8", "from 16 to 512"),
        ("shapes:10?color=red", "Known: plain, seed, size"),
        ("shapes:10?seed=-1", "from 0"),
        ("shapes:10#validation", "Known: test, train"),
    ],
)
def test_bad_options(source: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        rows(source)
