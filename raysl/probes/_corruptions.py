"""Corruptions of images at five severities.

The kinds and strengths are those of Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
corruptions and perturbations" (ImageNet-C), for the kinds that need no texture and no optics. The standard deviation of
the blur is that of their CIFAR-10-C as a share of the side, because that of ImageNet-C changes nothing at 32 pixels.
Every image has random numbers of its own, which do not depend on its batch.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from raysl.rng import ImageRng

SEVERITIES = 5


def corrupt(name: str, images_bchw: Tensor, severity: int, image_rng: ImageRng) -> Tensor:
    """Return images, uint8 (b, 3, s, s), after a corruption of `CORRUPTIONS` at a severity of 1 to 5."""
    change, strengths = CORRUPTIONS[name]
    return change(images_bchw, strengths[severity - 1], image_rng.named(f"{name}/{severity}"))


def _stored(shares_bchw: Tensor) -> Tensor:
    return shares_bchw.clamp(0, 1).mul(255).round().to(torch.uint8)


def _normal(images_bchw: Tensor, image_rng: ImageRng) -> Tensor:
    """Return standard normal numbers of the shape of the images, by the method of Box and Muller."""
    count = images_bchw[0].numel()
    first = torch.from_numpy(1 - image_rng.uniform_array("radius", count))
    second = torch.from_numpy(image_rng.uniform_array("angle", count))
    return ((-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()).view(images_bchw.shape).float()


def _gaussian_noise(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    return _stored(images_bchw / 255 + strength * _normal(images_bchw, image_rng))


def _shot_noise(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    seed_b = image_rng.integers("seed", 2**31)[:, 0].tolist()
    made: list[NDArray[np.int64]] = [
        np.random.default_rng(seed).poisson(image.numpy() / 255 * strength)
        for seed, image in zip(seed_b, images_bchw, strict=True)
    ]
    return _stored(torch.from_numpy(np.stack(made)) / strength)


def _impulse_noise(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    drawn = torch.from_numpy(image_rng.uniform_array("where", images_bchw[0].numel())).view(images_bchw.shape)
    half = strength / 2
    return torch.where(drawn < half, 0, torch.where(drawn < 2 * half, 255, images_bchw)).to(torch.uint8)


def _gaussian_blur(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    sigma = strength * images_bchw.shape[-1]
    radius = min(max(1, round(3 * sigma)), images_bchw.shape[-1] - 1)
    return functional.gaussian_blur(images_bchw, [2 * radius + 1] * 2, [sigma] * 2)  # type: ignore[no-any-return]


def _pixelate(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    side = images_bchw.shape[-1]
    few = max(1, int(side * strength))

    def one(image: Image.Image) -> Image.Image:
        return image.resize((few, few), Image.Resampling.BOX).resize((side, side), Image.Resampling.NEAREST)

    return _each(images_bchw, one)


def _jpeg(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    def one(image: Image.Image) -> Image.Image:
        image.save(stream := io.BytesIO(), "JPEG", quality=int(strength))
        return Image.open(stream)

    return _each(images_bchw, one)


def _each(images_bchw: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    made = [
        np.array(change(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())))
        for image in images_bchw
    ]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def _contrast(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    mean_bc11 = (images_bchw / 255).mean((2, 3), keepdim=True)
    return _stored((images_bchw / 255 - mean_bc11) * strength + mean_bc11)


def _brightness(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    """Raise the value of HSV: all channels by the factor of the largest."""
    share_bchw = images_bchw / 255
    value_b1hw = share_bchw.amax(1, keepdim=True)
    raised_b1hw = (value_b1hw + strength).clamp(max=1)
    return _stored(torch.where(value_b1hw > 0, share_bchw / value_b1hw.clamp(min=1e-6), 1) * raised_b1hw)


def _saturate(images_bchw: Tensor, strength: float, image_rng: ImageRng) -> Tensor:
    """Scale the saturation of HSV, at most to 1."""
    share_bchw = images_bchw / 255
    value_b1hw = share_bchw.amax(1, keepdim=True)
    saturation_b1hw = 1 - share_bchw.amin(1, keepdim=True) / value_b1hw.clamp(min=1e-6)
    wanted_b1hw = (saturation_b1hw * strength).clamp(max=1)
    factor_b1hw = torch.where(saturation_b1hw > 0, wanted_b1hw / saturation_b1hw.clamp(min=1e-6), 1)
    return _stored(value_b1hw - (value_b1hw - share_bchw) * factor_b1hw)


# The function of each corruption, and its strength at each severity.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, ImageRng], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_gaussian_blur, (0.4 / 32, 0.6 / 32, 0.7 / 32, 0.8 / 32, 1 / 32)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "saturate": (_saturate, (0.3, 0.1, 2.0, 5.0, 20.0)),
}
