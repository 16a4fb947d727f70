"""Decoding of ordinary files, and crops of them; see test_pixels.py for the others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from raysl.augment import SourceCrop
from raysl.rng import ImageRng
from raysl.stream.decode import DecodeError, cut, decode, evaluation_side, evaluation_views, resized_to_square
from tests.data import TURNS


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture without symmetries."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rgb = np.stack([x * 255, y * 255, 128 + 100 * np.sin(4 * x + 3 * y)], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def image_rng(count: int, first: int = 0) -> ImageRng:
    return ImageRng(0, np.zeros(count, dtype=np.int64), np.arange(first, first + count))


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(np.int64)


def off(data: bytes, expected: Image.Image) -> int:
    """The largest difference from a picture, in levels of 255."""
    return int(np.abs(pixels(data) - np.asarray(expected.convert("RGB"))).max())


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_files_show_the_picture(mode: str, options: dict[str, Any]) -> None:
    image = picture().convert(mode)
    assert off(encoded(image, "JPEG", quality=98, subsampling=0, **options), image) <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = picture().transpose(TURNS[orientation]) if orientation in TURNS else picture()
    assert off(encoded(picture(), "JPEG", exif=exif, quality=98, subsampling=0), upright) <= 6


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(picture(), "JPEG")[:200], encoded(picture())[:200], b"\xff\xd8\xff\xe0"],
)
def test_damage_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)
    with pytest.raises(DecodeError):
        cut([data], {"image": SourceCrop(8, 0.5)}, image_rng(1))


def test_crops_are_pillows_and_independent_of_the_batch() -> None:
    sizes = [(32, 32), (40, 30), (300, 200), (90, 333), (17, 64), (1, 1), (2, 50)]
    files = [encoded(picture(*size)) for size in sizes]
    crops = {"image": SourceCrop(32, 0.08), "patches": SourceCrop(72, 0.6)}
    together = cut(files, crops, image_rng(len(files)))
    for name, crop in crops.items():
        assert together[name].dtype == torch.uint8
        assert together[name].shape == (len(files), 3, crop.size, crop.size)
        for i, (file, (width, height)) in enumerate(zip(files, sizes, strict=True)):
            alone = cut([file], {name: crop}, image_rng(1, first=i))[name]
            assert torch.equal(alone[0], together[name][i])
            box = crop.boxes(np.array([height]), np.array([width]), image_rng(1, first=i).named(name))[0]
            top, left, h, w = box.tolist()
            expected = picture(width, height).crop((left, top, left + w, top + h))
            expected = expected.resize((crop.size, crop.size), Image.Resampling.BILINEAR)
            ours = alone[0].permute(1, 2, 0).numpy().astype(np.int64)
            assert np.abs(ours - np.asarray(expected)).max() <= 2


def test_views_are_cut_independently() -> None:
    files = [encoded(picture(99, 77))] * 2
    out = cut(files, {"a": SourceCrop(16, 0.1), "b": SourceCrop(16, 0.1)}, image_rng(2))
    assert not torch.equal(out["a"], out["b"])
    assert not torch.equal(out["a"][0], out["a"][1])


def test_nothing_to_cut() -> None:
    assert cut([], {"a": SourceCrop(16, 0.1)}, image_rng(0))["a"].shape == (0, 3, 16, 16)
    assert evaluation_views([], 16).shape == resized_to_square([], 16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (33, 32), (20, 20), (257, 131)])
@pytest.mark.parametrize("side", [32, 47])
def test_center_is_the_evaluation_view_of_torchvision(size: tuple[int, int], side: int) -> None:
    short = evaluation_side(side)
    theirs = transforms.Compose(
        [transforms.Resize(short), transforms.CenterCrop(side), transforms.PILToTensor()]
    )
    assert torch.equal(evaluation_views([encoded(picture(*size))], side)[0], theirs(picture(*size)))


def test_center_leaves_an_image_of_the_right_size_alone() -> None:
    out = evaluation_views([encoded(picture(32, 32)), encoded(picture(50, 40))], 32)
    assert out.shape == (2, 3, 32, 32)
    assert (out[0].permute(1, 2, 0).numpy() == np.asarray(picture(32, 32))).all()


@pytest.mark.parametrize("size", [(65000, 3), (3, 65000), (1, 5000)])
def test_of_an_extreme_shape_the_middle_is_seen(size: tuple[int, int]) -> None:
    long = max(size)
    black_ends = np.where(abs(np.arange(long) - long / 2) < long / 6, 130, 0).astype(np.uint8)
    row = Image.fromarray(np.broadcast_to(black_ends, (min(size), long)).copy())
    out = evaluation_views(
        [encoded(row if size[0] > size[1] else row.transpose(Image.Transpose.TRANSPOSE))], 224
    )
    assert out.shape == (1, 3, 224, 224)
    assert int(out.min()) == int(out.max()) == 130


def test_resized_to_square_shows_the_whole_image_as_pillow_resizes_it() -> None:
    sizes = [(300, 200), (20, 301), (32, 32), (1, 2)]
    found = resized_to_square([encoded(picture(*size)) for size in sizes], 32)
    for ours, size in zip(found.permute(0, 2, 3, 1).numpy().astype(np.int64), sizes, strict=True):
        expected = np.asarray(picture(*size).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(ours - expected).max() <= (0 if size == (32, 32) else 2)


def test_photos_as_in_the_wild(shared_data: Path) -> None:
    files = [path.read_bytes() for path in sorted((shared_data / "imagenet-sample").iterdir())[:30]]
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            assert off(data, image) <= 12
    assert cut(files, {"image": SourceCrop(224, 0.08)}, image_rng(30))["image"].shape == (30, 3, 224, 224)
