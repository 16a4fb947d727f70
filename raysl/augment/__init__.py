"""Crops, flips and color augmentation: batched pure functions of uint8 images, with random numbers from `ImageRng`.

The pixels of an image depend on the image and its random numbers only, and not on the batch, the number of threads or
the device. For this, sums of float32 products are exact: coefficients are rounded to a fixed number of binary places
(`_fixed`), so that neither the order nor fused multiply-adds change a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from raysl.communication.device_copy import to_device
from raysl.errors import UserError, unknown
from raysl.rng import ImageRng

_ATTEMPTS = 10
_CHUNK_PIXELS = 1 << 17

# With these binary places, the largest sum of products of each kind stays below 2**24.
_COLOR_PLACES = 11
_SHARPNESS_PLACES = 14
_BLUR_PLACES = 16

_LUMA_PER_MILLE = (299, 587, 114)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMINANCE = np.tile(_YIQ[:1], (3, 1))
_CHROMA = np.eye(3) - _LUMINANCE
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ


@dataclass(frozen=True)
class SourceCrop:
    """A random crop of an image, resized to a square: the "random resized crop" of Inception training.

    Args:
        size: side of the square in pixels.
        min_scale: smallest share of the image's area.
        max_scale: largest share of the image's area.
        min_ratio: smallest width / height.
        max_ratio: largest width / height.

    Raises:
        UserError: the size is below 1, or a range is empty or out of bounds.
    """

    size: int
    min_scale: float
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3

    def __post_init__(self) -> None:
        scales_fit = 0 < self.min_scale <= self.max_scale <= 1
        if self.size < 1 or not scales_fit or not 0 < self.min_ratio <= self.max_ratio:
            raise UserError(
                f"A crop with size={self.size}, min_scale={self.min_scale}, max_scale={self.max_scale}, "
                f"min_ratio={self.min_ratio} and max_ratio={self.max_ratio} is not possible. The size must be at least "
                "1 pixel, 0 < min_scale <= max_scale <= 1 and 0 < min_ratio <= max_ratio."
            )

    def boxes(
        self, heights_b: NDArray[np.int64], widths_b: NDArray[np.int64], image_rng: ImageRng
    ) -> NDArray[np.int64]:
        """Sample boxes: area uniform in the scales, ratio log-uniform, the first of ten attempts that fits.

        When none fits, take the largest centered box with an allowed ratio (as torchvision's RandomResizedCrop).

        Returns:
            int64 (b, 4): top, left, height, width, each box inside its image.
        """
        u = image_rng.uniform_array("box", 2 * _ATTEMPTS + 2)
        area = (heights_b * widths_b)[:, None] * (
            self.min_scale + (self.max_scale - self.min_scale) * u[:, :_ATTEMPTS]
        )
        log_min, log_max = math.log(self.min_ratio), math.log(self.max_ratio)
        ratio = np.exp(log_min + (log_max - log_min) * u[:, _ATTEMPTS:-2])
        widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (widths > 0) & (widths <= widths_b[:, None]) & (heights > 0) & (heights <= heights_b[:, None])
        first = np.argmax(fits, axis=1)[:, None]
        some = fits.any(axis=1)
        all_widths = np.clip(np.rint(heights_b * self.max_ratio).astype(np.int64), 1, widths_b)
        all_heights = np.clip(np.rint(widths_b / self.min_ratio).astype(np.int64), 1, heights_b)
        width = np.where(some, np.take_along_axis(widths, first, 1)[:, 0], all_widths)
        height = np.where(some, np.take_along_axis(heights, first, 1)[:, 0], all_heights)
        free_y, free_x = heights_b - height, widths_b - width
        top = np.where(some, (u[:, -2] * (free_y + 1)).astype(np.int64), free_y // 2)
        left = np.where(some, (u[:, -1] * (free_x + 1)).astype(np.int64), free_x // 2)
        return np.stack([top, left, height, width], axis=1)


def windows(images_bchw: Tensor, top_bp: Tensor, left_bp: Tensor, size: int) -> Tensor:
    """Cut square windows out of every image: (b, p, c, size, size).

    Args:
        images_bchw: uint8, on any device.
        top_bp: int64, upper edges, on the CPU.
        left_bp: int64, left edges, on the CPU.
        size: side of a window in pixels.
    """
    device = images_bchw.device
    image = torch.arange(len(images_bchw))[:, None]
    if device.type == "cpu":
        # The same as below and ten times faster.
        views = np.lib.stride_tricks.sliding_window_view(images_bchw.numpy(), (size, size), (2, 3))
        return torch.from_numpy(views[image.numpy(), :, top_bp.numpy(), left_bp.numpy()])
    views_bcyxhw = images_bchw.unfold(2, size, 1).unfold(3, size, 1)
    return views_bcyxhw[to_device(image, device), :, to_device(top_bp, device), to_device(left_bp, device)]


@dataclass(frozen=True)
class Recipe:
    """A recipe of color augmentation and flips.

    Args:
        hflip: probability of a horizontal flip.
        jitter: probability of color jitter.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        hue: largest rotation of the hue, as a share of the color circle.
        gray: probability of grayscale.
        photometric: probability of the block posterize, sharpness, solarize, autocontrast of PIRL.
        blur: probability of a Gaussian blur.
        solarize: probability of solarization at half brightness (Grill et al. 2020).
    """

    hflip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    photometric: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


_STRONG = Recipe(
    hflip=0.5, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, gray=0.2, blur=0.5
)
# Grill et al. 2020, table 6, whose two views differ in blur and solarization.
_BYOL = Recipe(hflip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2)

RECIPES = {
    "pirl": Recipe(
        hflip=0.5, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, gray=0.2, photometric=0.66
    ),
    "pirl+": _STRONG,
    "simclr": _STRONG,
    "mocov2": Recipe(
        hflip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, gray=0.2, blur=0.5
    ),
    "npid": Recipe(hflip=0.5, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, gray=0.2),
    "gray": Recipe(hflip=0.5, gray=0.66),  # for jigsaws, against chromatic aberration
    "byol_a": replace(_BYOL, blur=1.0),
    "byol_b": replace(_BYOL, blur=0.1, solarize=0.2),
    "plain": Recipe(hflip=0.5),
    "none": Recipe(),
}


def recipe(name: str) -> Recipe:
    """Return a recipe by name; "simclr-gray-blur" is "simclr" without two of its parts, the fields of `Recipe`.

    Raises:
        UserError: there is no recipe of that name, or a recipe has no such part.
    """
    whole, *left_out = name.split("-")
    if whole not in RECIPES:
        raise unknown("augmentation recipe", whole, RECIPES)
    for part in left_out:
        if part not in vars(RECIPES[whole]):
            raise unknown("part of an augmentation recipe", part, vars(RECIPES[whole]))
    return replace(RECIPES[whole], **dict.fromkeys(left_out, 0.0))


def hflip(images_bchw: Tensor, image_rng: ImageRng, probability: float) -> Tensor:
    """Mirror each image left to right with the given probability."""
    rows = _selected(image_rng, "hflip", probability)
    return _changed(images_bchw, rows, lambda images, _: images.flip(-1))


def color_jitter(images_bchw: Tensor, recipe: Recipe, image_rng: ImageRng, side: int | None = None) -> Tensor:
    """Change the colors of each image: a color map, then the photometric block, blur and solarization.

    Brightness, contrast, saturation, hue and grayscale are one affine map of the colors of an image, in this order.
    torchvision's ColorJitter uses a random order, clamps and rounds after each of the four and rotates the hue in HSV;
    here nothing is clamped before the end, the hue is rotated in the chroma plane of YIQ (which keeps the luminance),
    and contrast is relative to the mean luminance of the image after the change of brightness. Grayscale therefore
    comes before the photometric block; VISSL applies it last. The factors have torchvision's ranges.

    Args:
        images_bchw: uint8 (b, 3, h, w), on any device.
        recipe: probabilities and strengths.
        image_rng: random numbers of the b images.
        side: side in pixels of the whole image, of which the images may be parts. It scales the blur: 224 gives the
            published radius of 0.1 to 2. None: the height of the images.

    Returns:
        uint8, of the same shape.
    """
    if recipe.jitter or recipe.gray:
        matrix_b33, pull_b = _color_map(recipe, image_rng)
        planes_bcn = images_bchw.contiguous().flatten(2)
        parts = [
            _map_colors(planes_bcn[p], matrix_b33[p], pull_b[p]) for p in _chunks(len(pull_b), planes_bcn)
        ]
        images_bchw = torch.cat(parts).view(images_bchw.shape) if parts else images_bchw
    if recipe.photometric:
        strengths_b3 = image_rng.uniform_array("photometric strengths", 3)
        rows = _selected(image_rng, "photometric", recipe.photometric)
        images_bchw = _changed(
            images_bchw, rows, lambda images, rows: _photometric_block(images, strengths_b3[rows])
        )
    if recipe.blur:
        reach = (side or images_bchw.shape[2]) / 224
        sigma_b1 = (0.1 + 1.9 * image_rng.uniform_array("blur strength", 1)) * reach
        weights_bk = _gaussian(sigma_b1, math.ceil(6 * reach))
        rows = _selected(image_rng, "blur", recipe.blur)
        images_bchw = _changed(images_bchw, rows, lambda images, rows: _blur(images, weights_bk[rows]))
    if recipe.solarize:
        rows = _selected(image_rng, "solarize", recipe.solarize)
        images_bchw = _changed(
            images_bchw, rows, lambda images, _: torch.where(images < 128, images, 255 - images)
        )
    return images_bchw


def _selected(image_rng: ImageRng, name: str, probability: float) -> NDArray[np.int64]:
    """Return the rows of the images that are selected with the given probability."""
    return np.flatnonzero(image_rng.uniform_array(name, 1)[:, 0] < probability)


def _changed(
    images_bchw: Tensor, rows: NDArray[np.int64], change: Callable[[Tensor, NDArray[np.int64]], Tensor]
) -> Tensor:
    """Return the batch with `change(images, rows)` applied to the images at `rows`."""
    if not len(rows):
        return images_bchw
    # torch writes uint8 images by index twenty times slower than it reads them.
    index = to_device(rows, images_bchw.device)
    parts = [change(images_bchw.index_select(0, index[p]), rows[p]) for p in _chunks(len(rows), images_bchw)]
    source = np.arange(len(images_bchw))
    source[rows] = len(images_bchw) + np.arange(len(rows))
    return torch.cat([images_bchw, *parts]).index_select(0, to_device(source, images_bchw.device))


def _chunks(count: int, images: Tensor) -> list[slice]:
    """Split `count` images into parts that fit into the processor's cache as float32; one part on an accelerator."""
    fitting = _CHUNK_PIXELS // max(1, images[0].numel()) if images.device.type == "cpu" and count else count
    step = max(1, fitting)
    return [slice(start, start + step) for start in range(0, count, step)]


def _fixed(values: NDArray[np.float64], places: int) -> NDArray[np.float64]:
    """Round to multiples of 2**-places, so that float32 sums of products with whole numbers are exact."""
    return np.rint(values * 2.0**places) * 2.0**-places


def _column(values_b: NDArray[Any], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one value per image in a shape that broadcasts with (b, 3, h, w)."""
    return to_device(torch.from_numpy(values_b).to(dtype), like.device)[:, None, None, None]


def _color_map(recipe: Recipe, image_rng: ImageRng) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sample the color map of each image: c becomes matrix_b33 @ c + pull_b * mean luminance."""
    jittered_b = image_rng.uniform_array("jitter", 1)[:, 0] < recipe.jitter
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    change_b4 = (
        np.where(jittered_b[:, None], 2 * image_rng.uniform_array("jitter strengths", 4) - 1, 0) * strengths
    )
    brightness_b, contrast_b, saturation_b = 1 + change_b4[:, :3].T
    # A color without saturation is its luminance, for any hue.
    saturation_b[_selected(image_rng, "gray", recipe.gray)] = 0
    angle_b = 2 * np.pi * change_b4[:, 3]
    along_b, across_b = (saturation_b * turn for turn in (np.cos(angle_b), np.sin(angle_b)))
    matrix_b33 = _LUMINANCE + along_b[:, None, None] * _CHROMA + across_b[:, None, None] * _QUARTER_TURN
    return matrix_b33 * (brightness_b * contrast_b)[:, None, None], brightness_b * (1 - contrast_b)


def _map_colors(planes_bcn: Tensor, matrix_b33: NDArray[np.float64], pull_b: NDArray[np.float64]) -> Tensor:
    """Apply the color maps. Only the final rounding to whole numbers is not exact."""
    device = planes_bcn.device
    matrices = to_device(_fixed(matrix_b33, _COLOR_PLACES).astype(np.float32), device)
    weights = to_device(torch.tensor(_LUMA_PER_MILLE), device)
    sums = planes_bcn.sum(-1, dtype=torch.int32) * weights
    luminance = sums.sum(-1).double() / (1000 * planes_bcn.shape[2])
    shift = ((luminance * to_device(pull_b, device) + 0.5) * 2**_COLOR_PLACES).round()
    mapped = _matmul(matrices, planes_bcn.float())
    rounded = mapped.add_((shift * 2.0**-_COLOR_PLACES).float()[:, None, None]).clamp_(0, 255)
    # torch's conversion from float32 to uint8 is not vectorized and four times slower than through int16.
    return rounded.to(torch.int16).to(torch.uint8)


def _matmul(matrix_b33: Tensor, planes_bcn: Tensor) -> Tensor:
    """Multiply small matrices and images in full float32 precision, whatever torch is set to."""
    if planes_bcn.device.type == "cpu":
        return torch.from_numpy(np.matmul(matrix_b33.numpy(), planes_bcn.numpy()))
    red, green, blue = (matrix_b33[:, :, c, None] * planes_bcn[:, c, None] for c in range(3))
    return red + green + blue


def _photometric_block(images_bchw: Tensor, u_b3: NDArray[np.float64]) -> Tensor:
    """Apply posterize, sharpness, solarize and autocontrast, as VISSL's ImgPilRandomPhotometric.

    Overwrites the images.
    """
    bits_b = 4 + (u_b3[:, 0] * 5).astype(np.int64)
    images_bchw &= _column(256 - 2 ** (8 - bits_b), images_bchw, torch.uint8)
    _sharpen(images_bchw, 0.1 + 1.8 * u_b3[:, 1])
    threshold_b = (u_b3[:, 2] * 257).astype(np.int64)
    # In place: torch does not vectorize a comparison whose result has another type.
    bright = images_bchw.clone().ge_(_column(np.minimum(threshold_b, 255), images_bchw, torch.uint8))
    images_bchw ^= bright.mul_(_column(np.where(threshold_b < 256, 255, 0), images_bchw, torch.uint8))
    return _autocontrast(images_bchw)


def _sharpen(images_bchw: Tensor, factor_b: NDArray[np.float64]) -> None:
    """Apply PIL's ImageEnhance.Sharpness in place. A factor above 1 sharpens, below 1 smooths.

    The smoothing kernel is 3 x 3 with weight 5 in the middle and 1 around, divided by 13. The border is unchanged.
    """
    x = images_bchw.to(torch.int16)  # 9 * 255 fits
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    around = _fixed((1 - factor_b) / 13, _SHARPNESS_PLACES)
    sharp = box.float().mul_(_column(around, x))
    sharp += x[:, :, 1:-1, 1:-1].float().mul_(_column(1 - 9 * around, x))
    images_bchw[:, :, 1:-1, 1:-1] = sharp.add_(0.5).clamp_(0, 255).to(torch.int16)


def _autocontrast(images_bchw: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255. A channel with a single value is unchanged."""
    planes_bcn = images_bchw.flatten(2)
    low, high = (m.float() for m in (planes_bcn.amin(-1, True), planes_bcn.amax(-1, True)))
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    shift = 0.5 - low.masked_fill_(flat, 0) * scale
    return planes_bcn.float().mul_(scale).add_(shift).to(torch.int16).to(torch.uint8).view(images_bchw.shape)


def _gaussian(sigma_b1: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Return (b, radius + 1) weights by the distance from the middle. With both sides they sum to 1."""
    far = np.exp(-0.5 * (np.arange(1, radius + 1) / sigma_b1) ** 2)
    far = _fixed(far / (1 + 2 * far.sum(1, keepdims=True)), _BLUR_PLACES)
    return np.concatenate([1 - 2 * far.sum(1, keepdims=True), far], axis=1)


def _blur(images_bchw: Tensor, weights_bk: NDArray[np.float64]) -> Tensor:
    """Convolve rows, then columns, each rounded to whole numbers. The border is repeated outward."""
    radius = weights_bk.shape[1] - 1
    x = pad(images_bchw.float(), (radius,) * 4, mode="replicate")
    weights = [_column(column, x) for column in weights_bk.T]
    for axis in (2, 3):
        length = x.shape[axis] - 2 * radius
        y = x.narrow(axis, radius, length) * weights[0]
        for far in range(1, radius + 1):
            pair = x.narrow(axis, radius - far, length) + x.narrow(axis, radius + far, length)
            y += pair.mul_(weights[far])
        x = y.add_(0.5).floor_()
    return x.to(torch.int16).to(torch.uint8)
