"""Draw the images of the procedural set: one textured object on a cluttered background.

The label is the shape of the object. Position, size, tilt, colors and textures have the same distribution for every
shape, so they tell nothing about the label. Light comes from above and objects are tilted by at most 30 degrees, so
that "up" is visible, as in photographs.

Coordinates run from -1 to 1, x to the right and y down. A shape is a function that is negative inside and grows by
about 1 per unit of length at the edge. This gives soft edges of one pixel without a higher resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raysl.rng import ImageRng

_DISTRACTORS = 3
_TEXTURES = ("plain", "stripes", "checks", "blobs")
# Of plain images: the share of the usual saturation, and the texture of each shape in waves per unit of length along x
# and y in the frame of the object.
_PLAIN_COLOR = 0.1
_SURFACES = (
    *((0.0, 0.0), (0.0, 1.2), (1.2, 0.0), (0.0, 2.2), (2.2, 0.0)),
    *((1.0, 1.0), (1.8, 1.8), (2.2, 1.0), (1.0, 2.2), (0.6, 0.6)),
)


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum(y + 0.02, 0.77 * x.abs() - 0.64 * (y + 0.95))
    return torch.minimum(head, _box(x, y - 0.42, 0.26, 0.5))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    point = (x.abs() + (y - 0.12).abs() - 0.74) * math.sqrt(0.5)
    return torch.minimum(point, torch.hypot(x.abs() - 0.37, y + 0.25) - 0.523)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Each of five lines goes through two points of the star. A point inside the star is outside of at most one line.
    angles = [math.pi / 2 + 2 * math.pi * k / 5 for k in range(5)]
    lines = torch.stack([math.cos(a) * x + math.sin(a) * y - 0.32 for a in angles])
    return lines.topk(2, dim=0).values[1]


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arrow": _arrow,
    "circle": lambda x, y: torch.hypot(x, y) - 0.85,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.72 - torch.hypot(x - 0.45, y + 0.1)),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.9, 0.28), _box(x, y, 0.28, 0.9)),
    "heart": _heart,
    "hourglass": lambda x, y: torch.maximum(y.abs() - 0.85, 0.75 * x.abs() - 0.66 * y.abs() - 0.07),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.69).abs() - 0.2,
    "square": lambda x, y: _box(x, y, 0.72, 0.72),
    "star": _star,
    "triangle": lambda x, y: torch.maximum(y - 0.6, 0.866 * x.abs() - 0.5 * (y + 0.95)),
}
CLASSES = tuple(_SHAPES)


def draw(image_rng: ImageRng, size: int, plain: bool = False) -> tuple[NDArray[np.uint8], list[int]]:
    """Draw an image for each index of `image_rng`: uint8 (b, size, size, 3), RGB, and its label, an index of `CLASSES`.

    `plain` draws nearly without color on a plain background, and gives every shape a texture of its own.
    """
    label_b = image_rng.integers("label", len(CLASSES))[:, 0]
    centers = (torch.arange(size) + 0.5) * (2 / size) - 1
    x_bhw, y_bhw = centers.expand(len(label_b), size, size), centers[:, None].expand(len(label_b), size, size)
    # The object and its background differ in luminance; either may be the lighter one.
    ground_b = image_rng.uniform("ground", 0.15, 0.85)[:, 0]
    step_b = image_rng.uniform("contrast", 0.28, 0.5)[:, 0]
    lighter_b = ground_b + image_rng.uniform("lighter", -0.12, 0.12)[:, 0] < 0.5
    object_b = ground_b + torch.where(lighter_b, step_b, -step_b)

    image_bchw = _background(image_rng.named("background"), ground_b, x_bhw, y_bhw, plain)
    for k in range(0 if plain else _DISTRACTORS):
        _distractor(image_bchw, image_rng.named(f"distractor{k}"), x_bhw, y_bhw)
    _object(image_bchw, image_rng.named("object"), object_b, label_b, (x_bhw, y_bhw), plain)
    pixels = image_bchw.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy(), label_b.tolist()


def _color(image_rng: ImageRng, name: str, luminance_b: Tensor, saturation: float) -> Tensor:
    """Return colors of random hue around a luminance: float (b, 3)."""
    hue_bc = image_rng.uniform(f"{name}/hue", count=3)
    hue_bc = hue_bc - hue_bc.mean(1, keepdim=True)
    return luminance_b[:, None] + saturation * hue_bc


def _turned(x_bhw: Tensor, y_bhw: Tensor, angle_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates in a frame that is turned by an angle in radians."""
    cos, sin = angle_b.cos()[:, None, None], angle_b.sin()[:, None, None]
    return cos * x_bhw + sin * y_bhw, cos * y_bhw - sin * x_bhw


def _wave(x: Tensor) -> Tensor:
    """Return a triangle wave between -1 and 1, of period 1."""
    return ((x - x.floor() - 0.5).abs() * 4).sub_(1)


def _blobs(image_rng: ImageRng, channels: int, cells: int, size: int) -> Tensor:
    """Interpolate random values on a coarse grid: float (b, channels, size, size) in [-1, 1]."""
    grid = image_rng.uniform("blobs", -1, 1, channels * cells * cells).view(-1, channels, cells, cells)
    return F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=True)


def _texture(image_rng: ImageRng, x_bhw: Tensor, y_bhw: Tensor) -> Tensor:
    """Return a texture of a random kind for each image: float (b, h, w) in [-1, 1]."""
    kind_b = image_rng.integers("texture", len(_TEXTURES))[:, 0]
    texture_bhw = torch.zeros_like(x_bhw)
    frequency_b = image_rng.uniform("frequency", 1.2, 2.6)[:, 0]
    angle_b = image_rng.uniform("direction", 0, math.pi)[:, 0]
    for kind in ("stripes", "checks"):
        at = (kind_b == _TEXTURES.index(kind)).nonzero()[:, 0]
        u, v = _turned(x_bhw[at], y_bhw[at], angle_b[at])
        wave = _wave(u * frequency_b[at, None, None])
        if kind == "checks":
            wave = wave * _wave(v * frequency_b[at, None, None]) * 2
        texture_bhw[at] = (wave * 3).clamp_(-1, 1)
    at = (kind_b == _TEXTURES.index("blobs")).nonzero()[:, 0]
    epochs_b, indices_b = image_rng.epochs_b[at.numpy()], image_rng.indices_b[at.numpy()]
    some = ImageRng(image_rng.seed, epochs_b, indices_b, image_rng.name)
    texture_bhw[at] = (_blobs(some, 1, 8, x_bhw.shape[-1])[:, 0] * 1.6).clamp_(-1, 1)
    return texture_bhw


def _surface(x_bhw: Tensor, y_bhw: Tensor, label_b: Tensor) -> Tensor:
    """Return the stripes or checks that belong to each shape: float (b, h, w) in [-1, 1]."""
    texture_bhw = torch.ones_like(x_bhw)
    waves_b = torch.tensor(_SURFACES)[label_b].unbind(1)
    for along_bhw, frequency_b in zip((x_bhw, y_bhw), waves_b, strict=True):
        wave_bhw = (_wave(along_bhw * frequency_b[:, None, None]) * 3).clamp_(-1, 1)
        texture_bhw *= torch.where(frequency_b[:, None, None] > 0, wave_bhw, 1)
    return texture_bhw


def _background(rng: ImageRng, luminance_b: Tensor, x_bhw: Tensor, y_bhw: Tensor, plain: bool) -> Tensor:
    """Draw a gradient of two colors with a faint texture and blobs, lit from above: float (b, 3, h, w)."""
    saturation = 0.55 * (_PLAIN_COLOR if plain else 1)
    spread_b = rng.uniform("spread", 0, 0.12)[:, 0]
    low_bc = _color(rng, "low", luminance_b - spread_b, saturation)
    high_bc = _color(rng, "high", luminance_b + spread_b, saturation)
    along_bhw, _ = _turned(x_bhw, y_bhw, rng.uniform("gradient", 0, 2 * math.pi)[:, 0])
    image_bchw = _mix(low_bc, high_bc, (0.5 + 0.4 * along_bhw).clamp_(0, 1))
    if plain:
        return image_bchw - (0.07 * y_bhw)[:, None]
    strength_b = rng.uniform("strength", 0, 0.14)[:, 0, None, None]
    image_bchw += (strength_b * _texture(rng, x_bhw, y_bhw) - 0.07 * y_bhw)[:, None]
    amount_b = rng.uniform("amount", 0.02, 0.16)[:, :, None, None]
    image_bchw += amount_b * _blobs(rng.named("clutter"), 3, 5, x_bhw.shape[-1])
    return image_bchw


def _mix(low_bc: Tensor, high_bc: Tensor, share_bhw: Tensor) -> Tensor:
    """Mix two colors by the share of the second: float (b, 3, h, w)."""
    return low_bc[:, :, None, None] + (high_bc - low_bc)[:, :, None, None] * share_bhw[:, None]


def _cover(edge_bhw: Tensor, scale_b: Tensor) -> Tensor:
    """Return the share of each pixel that lies inside a shape drawn at a scale: float (b, h, w) in [0, 1]."""
    pixels = edge_bhw.shape[-1] / 2
    return (0.5 - edge_bhw * (scale_b * pixels)[:, None, None]).clamp_(0, 1)


def _distractor(image_bchw: Tensor, image_rng: ImageRng, x_bhw: Tensor, y_bhw: Tensor) -> None:
    """Draw a small bar, square or disc at a random place in two of three images."""
    at_bc = image_rng.uniform("at", -1, 1, 2)
    half_bc = image_rng.uniform("half", 0.05, 0.17, 2)
    x, y = x_bhw - at_bc[:, 0, None, None], y_bhw - at_bc[:, 1, None, None]
    x, y = _turned(x, y, image_rng.uniform("tilt", 0, math.pi)[:, 0])
    x, y = x / half_bc[:, 0, None, None], y / half_bc[:, 1, None, None]
    round_b = image_rng.chance("round", 0.5)[:, None, None]
    edge_bhw = torch.where(round_b, torch.hypot(x, y), torch.maximum(x.abs(), y.abs())) - 1
    cover_bhw = _cover(edge_bhw, half_bc.amin(1)) * image_rng.chance("there", 2 / 3)[:, None, None]
    color_bc = _color(image_rng, "colour", image_rng.uniform("luminance", 0.1, 0.9)[:, 0], 0.9)
    image_bchw += cover_bhw[:, None] * (color_bc[:, :, None, None] - image_bchw)


def _object(
    image_bchw: Tensor,
    rng: ImageRng,
    luminance_b: Tensor,
    label_b: Tensor,
    grid: tuple[Tensor, Tensor],
    plain: bool,
) -> None:
    """Draw the object and its shadow."""
    x_bhw, y_bhw = grid
    scale_b = rng.uniform("scale", 0.42, 0.8)[:, 0]
    reach_b = 1.05 - 0.85 * scale_b
    at_bc = rng.uniform("at", -1, 1, 2) * reach_b[:, None]
    tilt_b = rng.uniform("tilt", -math.pi / 6, math.pi / 6)[:, 0]
    stretch_b = rng.uniform("stretch", 0.88, 1.12)[:, 0]

    x, y = _turned(x_bhw - at_bc[:, 0, None, None], y_bhw - at_bc[:, 1, None, None], tilt_b)
    x, y = x / (scale_b * stretch_b)[:, None, None], y / scale_b[:, None, None]
    edge_bhw = torch.empty_like(x)
    for label, shape in enumerate(_SHAPES.values()):
        of_shape = (label_b == label).nonzero()[:, 0]
        edge_bhw[of_shape] = shape(x[of_shape], y[of_shape])
    # The shadow has the same edge, wider and softer, a little further down.
    drop_hw = max(1, round(x.shape[-1] / 20))
    shadow_bhw = F.pad((0.12 - edge_bhw).clamp_(0, 0.3), (0, 0, drop_hw, 0))[:, :-drop_hw]
    image_bchw -= (rng.uniform("shadow", 0.2, 0.8)[:, 0, None, None] * shadow_bhw)[:, None]

    outward_b = (luminance_b - 0.5).sign()
    if plain:  # Stripes are to be seen without color.
        second_b, texture_bhw = luminance_b - 0.3 * outward_b, _surface(x, y, label_b)
    else:
        second_b, texture_bhw = luminance_b + 0.1 * outward_b, _texture(rng, x_bhw, y_bhw)
    saturation = 0.8 * (_PLAIN_COLOR if plain else 1)
    first_bc = _color(rng, "first", luminance_b, saturation)
    fill_bchw = _mix(first_bc, _color(rng, "second", second_b, saturation), 0.5 + 0.5 * texture_bhw)
    fill_bchw -= (0.1 * y.clamp(-1, 1))[:, None]
    image_bchw += _cover(edge_bhw, scale_b)[:, None] * (fill_bchw - image_bchw)
