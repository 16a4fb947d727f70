"""Crops, flips and colors: ranges, agreement with Pillow, and independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from raysl import augment
from raysl.augment import RECIPES, Recipe, SourceCrop, color_jitter, hflip, recipe
from raysl.errors import UserError
from raysl.rng import ImageRng


def image_rng(count: int, first: int = 0, seed: int = 0) -> ImageRng:
    return ImageRng(seed, np.zeros(count, dtype=np.int64), np.arange(first, first + count))


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    """Smooth random pictures: noise of a few pixels, enlarged."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return smooth.clamp(0, 255).to(torch.uint8)


def pil(image_chw: Tensor) -> Image.Image:
    return Image.fromarray(image_chw.permute(1, 2, 0).numpy())


def difference(a: Tensor, b: Image.Image) -> int:
    return int(np.abs(a.permute(1, 2, 0).numpy().astype(int) - np.asarray(b)).max())


class TestSourceCrop:
    def test_boxes_keep_to_scale_ratio_and_image(self) -> None:
        b = 4000
        crop = SourceCrop(32, 0.2, 0.5)
        heights, widths = np.full(b, 300), np.full(b, 400)
        top, left, height, width = crop.boxes(heights, widths, image_rng(b)).T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= 300).all()
        assert (left + width <= 400).all()
        share = height * width / 120_000
        assert 0.195 < share.min() < 0.21
        assert 0.49 < share.max() < 0.505
        ratio = width / height
        assert 0.74 < ratio.min() < 0.76
        assert 1.32 < ratio.max() < 1.35
        assert abs(np.log(ratio).mean()) < 0.03, "log-uniform"
        assert (top == 0).any()
        assert (left + width == 400).any()

    def test_places_are_uniform(self) -> None:
        b = 6000
        crop = SourceCrop(8, 0.25, 0.25, 1, 1)
        top, left, height, width = crop.boxes(np.full(b, 20), np.full(b, 20), image_rng(b)).T
        assert set(height) == set(width) == {10}
        for start in (top, left):
            counts = np.bincount(start, minlength=11)
            assert len(counts) == 11
            assert ((counts - b / 11) ** 2 / (b / 11)).sum() < 30

    def test_an_image_that_no_attempt_fits_is_cropped_in_the_middle(self) -> None:
        crop = SourceCrop(8, 1.0)
        boxes = crop.boxes(np.array([10, 100, 1]), np.array([100, 10, 1]), image_rng(3))
        assert boxes.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10], [0, 0, 1, 1]]

    def test_boxes_do_not_depend_on_the_batch(self) -> None:
        crop = SourceCrop(32, 0.08)
        sizes = np.array([[32, 32], [500, 375], [1, 9], [64, 64]])
        together = crop.boxes(sizes[:, 0], sizes[:, 1], image_rng(4))
        for i, (height, width) in enumerate(sizes):
            alone = crop.boxes(np.array([height]), np.array([width]), image_rng(1, first=i))
            assert (alone[0] == together[i]).all()


class TestRecipes:
    def test_unknown_name_answers_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match="Did you mean 'simclr'"):
            recipe("simcrl")

    def test_plain_and_none_leave_colors_alone(self) -> None:
        x = images(8)
        for name in ("plain", "none"):
            assert torch.equal(color_jitter(x, recipe(name), image_rng(8)), x)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 9), (53, 37), (1, 2), (90, 90)])
def test_an_image_never_depends_on_its_batch_mates(name: str, height: int, width: int) -> None:
    x = images(24, height, width)
    together = color_jitter(x, recipe(name), image_rng(24))
    assert together.dtype == torch.uint8
    assert together.shape == x.shape
    alone = torch.cat([color_jitter(x[i : i + 1], recipe(name), image_rng(1, first=i)) for i in range(24)])
    assert torch.equal(alone, together)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(color_jitter(strided, recipe(name), image_rng(24)), together)


@pytest.mark.parametrize("name", ["pirl", "simclr"])
def test_colors_are_the_same_in_any_number_of_threads(name: str) -> None:
    x = images(40, 61, 61)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(color_jitter(x, recipe(name), image_rng(40)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_source_is_never_written_to() -> None:
    x = images(16)
    before = x.clone()
    for name in RECIPES:
        color_jitter(hflip(x, image_rng(16), 0.5), recipe(name), image_rng(16))
    assert torch.equal(x, before)


def test_strong_color_sums_stay_exact() -> None:
    """The bound that exactness rests on: 255 * sum |coefficient| * 2**places < 2**24, at the strongest settings."""
    strongest = Recipe(jitter=1, brightness=1, contrast=1, saturation=1, hue=0.5)
    matrix_b33, pull_b = augment._color_map(strongest, image_rng(100_000))
    largest = 255 * (np.abs(matrix_b33).sum(2).max() + np.abs(pull_b).max()) + 1
    assert largest * 2**augment._COLOR_PLACES < 2**24


def test_brightness_contrast_and_saturation_are_pillows() -> None:
    x = images(1)
    matrix, pull = (np.array(a) for a in ([np.eye(3)], [0.0]))
    luma = np.tile([0.299, 0.587, 0.114], (3, 1))
    for enhancer, strength, m, p in [
        (ImageEnhance.Brightness, 0.7, matrix * 0.7, pull),
        (ImageEnhance.Contrast, 0.6, matrix * 0.6, pull + 0.4),
        (ImageEnhance.Color, 0.5, matrix * 0.5 + 0.5 * luma, pull),
    ]:
        ours = augment._map_colors(x.flatten(2), m, p).view(x.shape)
        assert difference(ours[0], enhancer(pil(x[0])).enhance(strength)) <= 1


def test_hue_keeps_luminance_and_gray_loses_color() -> None:
    x = (images(64) // 2 + 64).clone()
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = color_jitter(x, Recipe(jitter=1, hue=0.1), image_rng(64))
    assert (turned.float() - x.float()).abs().max() > 10
    inside = (turned > 0) & (turned < 255)
    change = ((turned.float() - x.float()) * luma).sum(1).abs()
    assert change[inside.all(1)].max() < 1
    gray = color_jitter(x, Recipe(gray=1), image_rng(64))
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert difference(gray[0, :1].expand(3, -1, -1), pil(x[0]).convert("L").convert("RGB")) <= 1


@pytest.mark.parametrize("u", [(0.0, 0.0, 0.2), (0.3, 0.99, 0.6), (0.99, 0.4, 0.999), (0.5, 0.5, 0.0)])
def test_the_photometric_block_is_pillows(u: tuple[float, float, float]) -> None:
    x = images(1)
    expected = ImageOps.posterize(pil(x[0]), 4 + int(u[0] * 5))
    expected = ImageEnhance.Sharpness(expected).enhance(0.1 + 1.8 * u[1])
    sharpened = x & (256 - 2 ** (8 - 4 - int(u[0] * 5)))
    augment._sharpen(sharpened, np.array([0.1 + 1.8 * u[1]]))
    assert difference(sharpened[0], expected) <= 1
    # The rest from our own sharpened image: one level can lie on the other side of the threshold.
    expected = ImageOps.autocontrast(ImageOps.solarize(pil(sharpened[0]), int(u[2] * 257)))
    assert difference(augment._photometric_block(x.clone(), np.array([u]))[0], expected) <= 1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_a_gaussian(sigma: float) -> None:
    x = images(1, 40, 40)
    ours = augment._blur(x, augment._gaussian(np.array([[sigma]]), 6))
    assert difference(ours[0], pil(x[0]).filter(ImageFilter.GaussianBlur(sigma))) <= 3
    flat = torch.full((1, 3, 9, 9), 255, dtype=torch.uint8)
    assert torch.equal(augment._blur(flat, augment._gaussian(np.array([[sigma]]), 6)), flat)


def test_blur_is_sized_by_the_picture() -> None:
    x = images(64, 16, 16)
    part_of_large = color_jitter(x, Recipe(blur=1), image_rng(64), side=224)
    whole = color_jitter(x, Recipe(blur=1), image_rng(64))
    assert (part_of_large.float() - x).abs().mean() > 4 * (whole.float() - x).abs().mean()


def test_flip_mirrors_half_of_the_images() -> None:
    x = images(400)
    flipped = hflip(x, image_rng(400), 0.5)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    unchanged = (flipped == x).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert 160 < int(mirrored.sum()) < 240
    assert torch.equal(hflip(x, image_rng(400), 0), x)
    assert torch.equal(hflip(x, image_rng(400), 1), x.flip(-1))


def test_coins_fall_as_often_as_the_recipe_says() -> None:
    x = images(2000, 8, 8)
    changed = (color_jitter(x, Recipe(jitter=0.8, brightness=0.5), image_rng(2000)) != x).flatten(1).any(1)
    assert 0.76 < float(changed.float().mean()) < 0.83
    gray = color_jitter(x, recipe("pirl"), image_rng(2000))
    share = float(((gray[:, 0] == gray[:, 1]) & (gray[:, 0] == gray[:, 2])).flatten(1).all(1).float().mean())
    assert 0.17 < share < 0.23


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_an_accelerator_makes_the_same_pixels(name: str) -> None:
    x = images(64, 48, 48)
    device = torch.device("cuda")
    on_device = color_jitter(hflip(x.to(device), image_rng(64), 0.5), recipe(name), image_rng(64))
    assert torch.equal(
        on_device.cpu(), color_jitter(hflip(x, image_rng(64), 0.5), recipe(name), image_rng(64))
    )


def test_empty_batches_pass_through() -> None:
    x = images(4)[:0]
    for name in RECIPES:
        assert color_jitter(hflip(x, image_rng(0), 0.5), recipe(name), image_rng(0)).shape == x.shape
    assert SourceCrop(8, 0.1).boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), image_rng(0)).shape == (
        0,
        4,
    )


def test_a_recipe_without_some_of_its_parts() -> None:
    whole = recipe("simclr")
    assert recipe("simclr-gray-blur") == replace(whole, gray=0.0, blur=0.0)
    with pytest.raises(UserError, match="Unknown part of an augmentation recipe 'grey'"):
        recipe("simclr-grey")
