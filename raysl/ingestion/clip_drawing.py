"""Draw the clips of the procedural video set: two moving shapes, each with its own tone, and an articulated figure.

Every clip is a pure function of its random numbers. All surfaces are height fields over the picture, so depth and
normals are exact. The light comes from the upper left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysl.dataset.clips import SOUND_HZ

Array = NDArray[Any]
Random = Callable[[str, int], NDArray[np.float64]]

ACTIONS = ("walk", "wave", "jump", "squat", "kick")
KINDS = ("disc", "square", "triangle", "star", "cross", "ellipse", "hexagon", "flower")
KEYPOINTS = (
    *("head", "neck", "hip", "left_elbow", "left_hand", "right_elbow", "right_hand"),
    *("left_knee", "left_foot", "right_knee", "right_foot"),
)
# Ends of the limbs as numbers of key points: torso, arms, legs.
_LIMBS = ((1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10))
_LEFT = {1, 2, 5, 6}
_LIGHT = np.array([-0.4, -0.5, 0.77], np.float32)
_HEAD_RADIUS, _LIMB_RADIUS = 0.11, 0.035
# A shape's kind decides its tone, its color an overtone.
_LOWEST_TONE_HZ, _TONES_PER_OCTAVE, _GLIDE_OCTAVES = 300.0, 2.5, 0.3
# The largest radius of an outline.
_WIDEST = 1.45
_OVERTONES_HZ = (3200.0, 4200.0, 5400.0, 7000.0)


class Drawn(NamedTuple):
    """A clip and everything that is known about it. Floats are float32."""

    frames_nhwc: NDArray[np.uint8]
    sound_t: NDArray[np.int16]
    # Boxes of both shapes, then of the figure: top, left, height, width in pixels; NaN out of the frame.
    tracks_kn4: Array
    # The shape that sounds, 0 or 1, the number of its kind, and the number of the action of the figure.
    sounding: int
    kind: int
    action: int
    # x, y in pixels, and 1 where the point is seen.
    keypoints_np3: Array
    # Depth in the middle frame, in sides of the frame, and its normals, unit vectors.
    depth_hw: Array
    normals_hw3: Array


@dataclass
class _Surface:
    """An object in all frames: where it is, how near, and its color before shading."""

    alpha_nhw: Array
    depth_nhw: Array
    color_nhw3: Array


def draw(random: Random, size: int, num_frames: int, rate: float) -> Drawn:
    """Draw a clip of square frames, `rate` in a second. `random` returns n numbers in [0, 1) for a name and n."""
    time_n = np.arange(num_frames) / rate
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    grid = x[None], y[None]
    layers = [_background(random, grid, num_frames)]
    kinds = np.argsort(random("kinds", len(KINDS)))[:2].tolist()
    paths = [_path(random, i, time_n) for i in range(2)]
    hues = np.argsort(random("hues", len(_OVERTONES_HZ)))[:2].tolist()
    shapes = [_shape(random, f"shape {i}", kinds[i], hues[i], paths[i], time_n, size) for i in range(2)]
    action = int(random("action", 1)[0] * len(ACTIONS))
    points_np2 = _pose(random, action, time_n)
    figure = _figure(random, points_np2, grid)
    layers += [*shapes, figure]
    color, depth, top = _compose(layers)
    normals = _normals(depth, top, size)
    light_nhw = 0.45 + 0.55 * np.clip(normals @ _LIGHT, 0, 1)
    pixels = np.clip(np.rint(255 * color * light_nhw[..., None]), 0, 255).astype(np.uint8)
    sounding = int(random("sounding", 1)[0] * 2)
    tracks = np.stack([_boxes(layer.alpha_nhw) for layer in (*shapes, figure)])
    middle = num_frames // 2
    return Drawn(
        pixels,
        _sound(random, kinds[sounding], hues[sounding], paths[sounding][:, 1], rate),
        tracks,
        sounding,
        kinds[sounding],
        action,
        _seen(points_np2, top, size),
        depth[middle],
        normals[middle],
    )


def _background(random: Random, grid: tuple[Array, Array], num_frames: int) -> _Surface:
    x, y = grid
    a = random("background", 12)
    depth = 3 + (a[0] - 0.5) * (x - 0.5) + (a[1] - 0.5) * (y - 0.5)
    wave = np.sin(2 * math.pi * ((1 + 3 * a[2]) * x + (1 + 3 * a[3]) * y + a[4]))
    color = _color(a[5:8])[None, None, None] * (0.6 + 0.15 * wave[..., None])
    shape = (num_frames, *depth.shape[1:])
    return _Surface(
        np.ones(shape, np.float32),
        np.broadcast_to(depth.astype(np.float32), shape),
        np.broadcast_to(color.astype(np.float32), (*shape, 3)),
    )


def _color(a: NDArray[np.float64], hue: int | None = None) -> Array:
    """Return a color that is neither dark nor gray: of any hue, or near one of those of the overtones."""
    turn = a[0] if hue is None else (hue + 0.3 * (a[0] - 0.5)) / len(_OVERTONES_HZ)
    phase = 2 * math.pi * (turn + np.array([0, 1 / 3, 2 / 3]))
    return np.asarray(0.55 + 0.35 * np.cos(phase) + 0.1 * a[1], np.float32)


def _path(random: Random, number: int, time_n: NDArray[np.float64]) -> Array:
    """Return the center of a shape in each frame, (n, 2): a straight way. The two shapes keep to opposite sides."""
    side = 2 * math.pi * (random("side", 1)[0] + number / 2)
    a = random(f"path {number}", 3)
    middle = 0.5 + (0.18 + 0.06 * a[0]) * np.array([math.cos(side), math.sin(side)])
    angle, reach = 2 * math.pi * a[1], 0.15 + 0.07 * a[2]
    along = (2 * time_n / max(time_n[-1], 1e-9) - 1)[:, None]
    return np.asarray(middle + along * reach * np.array([math.cos(angle), math.sin(angle)]), np.float32)


def _shape(
    random: Random, name: str, kind: int, hue: int, path_n2: Array, time_n: Array, size: int
) -> _Surface:
    """Draw a shape in a window that moves with it, which is much quicker than in whole frames."""
    a = random(name, 12)
    radius, bulge, base = 0.11 + 0.05 * float(a[0]), 0.5 + 0.5 * float(a[3]), 1.0 + 1.2 * float(a[4])
    turn_n = 2 * math.pi * (a[1] + 0.25 * (a[2] - 0.5) * time_n)
    side = 2 * math.ceil(_WIDEST * radius * size) + 2
    corner_n2 = np.floor(path_n2 * size).astype(int) - side // 2
    place_n2w = corner_n2[:, :, None] + np.arange(side)
    offset_n2w = ((place_n2w + 0.5) / size - path_n2[:, :, None]).astype(np.float32)
    x, y = offset_n2w[:, 0, None, :], offset_n2w[:, 1, :, None]
    distance = np.hypot(x, y)
    angle = np.arctan2(y, x) - turn_n[:, None, None].astype(np.float32)
    gauge = distance / (radius * _outline(kind, angle))
    depth = base - bulge * radius * (1 - np.minimum(gauge, 1) ** 2)
    stripes = np.sin(distance * np.cos(angle) * (2 * math.pi * (2 + 3 * float(a[5])) / radius))
    color = _color(a[6:9], hue) * (0.8 + 0.2 * stripes[..., None])
    alpha = np.clip((1 - gauge) * (radius * size) + 0.5, 0, 1)  # an edge one pixel wide
    whole = _empty((len(path_n2), size, size))
    for n, (rows, columns) in enumerate(place_n2w[:, ::-1]):
        inside = np.ix_((rows >= 0) & (rows < size), (columns >= 0) & (columns < size))
        top, left = max(int(rows[0]), 0), max(int(columns[0]), 0)
        part = alpha[n][inside]
        there = n, slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
        whole.alpha_nhw[there], whole.depth_nhw[there] = part, depth[n][inside]
        whole.color_nhw3[there] = color[n][inside]
    return whole


def _empty(shape: tuple[int, ...]) -> _Surface:
    alpha, depth, color = np.zeros(shape), np.full(shape, 9), np.zeros((*shape, 3))
    return _Surface(*(values.astype(np.float32) for values in (alpha, depth, color)))


def _outline(kind: int, angle: Array) -> Array:
    """Return the radius of a shape of size 1 in each direction."""
    name = KINDS[kind]
    if name in ("square", "triangle", "hexagon"):
        sector = 2 * math.pi / {"triangle": 3, "square": 4, "hexagon": 6}[name]
        return math.cos(sector / 2) / np.cos(np.mod(angle, sector) - sector / 2) * 1.15
    if name == "star":
        return np.asarray(0.7 + 0.5 * np.abs(np.mod(5 * angle / (2 * math.pi), 1) * 2 - 1))
    if name == "cross":
        return np.asarray(0.55 + 0.65 * np.cos(2 * angle) ** 4)
    if name == "ellipse":
        return 1 / np.sqrt((np.cos(angle) / 1.4) ** 2 + (np.sin(angle) / 0.6) ** 2)
    if name == "flower":
        return np.asarray(0.85 + 0.25 * np.cos(6 * angle))
    return np.ones_like(angle)


def _pose(random: Random, action: int, time_n: NDArray[np.float64]) -> Array:
    """Return the key points of the figure, (n, points, 2), in sides of the frame."""
    a = random("pose", 8)
    height, side = 0.5 + 0.12 * a[0], 1.0 if a[1] < 0.5 else -1.0
    phase = 2 * math.pi * (a[2] + time_n * (0.35 + 0.25 * a[3]))
    swing, rest = np.sin(phase), np.zeros_like(phase)
    up = (1 - np.cos(phase)) / 2
    arms, elbows = [rest + 0.25, rest - 0.25], [rest, rest]
    hips, knees = [rest + 0.12, rest - 0.12], [rest, rest]
    x, y = 0.5 + 0.25 * (a[4] - 0.5) + rest, 0.55 + 0.06 * (a[5] - 0.5) + rest
    name = ACTIONS[action]
    if name == "walk":
        arms, elbows = [0.6 * swing, -0.6 * swing], [rest + 0.4, rest + 0.4]
        hips, knees = [-0.55 * swing, 0.55 * swing], [-0.4 * (1 + swing), -0.4 * (1 - swing)]
        x = x + 0.05 * (time_n - time_n.mean())
    elif name == "wave":
        arms, elbows = [2.2 + rest, rest - 0.25], [0.9 * swing, rest]
    elif name == "jump":
        y = y - 0.16 * height * up
        arms, knees = [0.3 + 2.2 * up, -0.3 - 2.2 * up], [-0.5 * (1 - up), -0.5 * (1 - up)]
    elif name == "squat":
        hips, knees = [1.1 * up, 1.1 * up], [-2.0 * up, -2.0 * up]
        arms, y = [1.4 * up, 1.4 * up], y + 0.16 * height * up
    else:
        hips, arms = [-0.15 + rest, -0.3 + 1.5 * up], [-0.5 * up, 0.6 * up]
        knees = [rest, -0.7 * (1 - up)]
    points = np.zeros((len(time_n), len(KEYPOINTS), 2))
    points[:, 2] = np.stack([x, y], 1)

    def step(start: int, end: int, angle: NDArray[np.float64], length: float) -> None:
        direction = np.stack([side * np.sin(angle), np.cos(angle)], 1)
        points[:, end] = points[:, start] + length * height * direction

    step(2, 1, rest + math.pi, 0.36)
    step(1, 0, rest + math.pi, 0.16)
    for i, (upper, lower) in enumerate(((3, 4), (5, 6))):
        step(1, upper, arms[i], 0.19)
        step(upper, lower, arms[i] + elbows[i], 0.19)
    for i, (upper, lower) in enumerate(((7, 8), (9, 10))):
        step(2, upper, hips[i], 0.22)
        step(upper, lower, hips[i] + knees[i], 0.22)
    return points.astype(np.float32)


def _figure(random: Random, points_np2: Array, grid: tuple[Array, Array]) -> _Surface:
    a = random("figure", 6)
    height = float(np.abs(points_np2[0, 1] - points_np2[0, 2]).max()) / 0.36
    base = 1.0 + 1.2 * float(a[0])
    left, right = _color(a[1:4]), 0.7 * _color(a[1:4])
    parts = [(points_np2[:, 0], points_np2[:, 0], _HEAD_RADIUS * height, left)]
    for i, (start, end) in enumerate(_LIMBS):
        paint = left if i in _LEFT else right
        parts.append((points_np2[:, start], points_np2[:, end], _LIMB_RADIUS * height, paint))
    shape = (len(points_np2), *grid[0].shape[1:])
    window, grid = _window(points_np2, (_HEAD_RADIUS + _LIMB_RADIUS) * height, grid)
    inside = (shape[0], *grid[0].shape[1:])
    alpha, depth = np.zeros(inside, np.float32), np.full(inside, 9, np.float32)
    color = np.zeros((*inside, 3), np.float32)
    for from_n2, to_n2, radius, paint in parts:
        distance = _to_segment(from_n2, to_n2, grid)
        mine = base - 0.8 * radius * (1 - np.minimum(distance / radius, 1) ** 2)
        coverage = np.clip((radius - distance) * shape[1] + 0.5, 0, 1).astype(np.float32)
        nearer = (coverage > 0) & (mine < depth) & (coverage >= 0.5) | (coverage > alpha)
        depth = np.where(nearer, mine, depth)
        color = np.where(nearer[..., None], paint, color)
        alpha = np.maximum(alpha, coverage)
    whole = _empty(shape)
    whole.alpha_nhw[window], whole.depth_nhw[window], whole.color_nhw3[window] = alpha, depth, color
    return whole


def _window(
    points_np2: Array, margin: float, grid: tuple[Array, Array]
) -> tuple[tuple[slice, slice, slice], tuple[Array, Array]]:
    """Return the part of the frames that holds all points, and its grid. It makes drawing quick."""
    size = grid[0].shape[-1]
    low = np.floor((points_np2.min(axis=(0, 1)) - margin) * size).astype(int).clip(0, size - 1)
    high = np.ceil((points_np2.max(axis=(0, 1)) + margin) * size).astype(int).clip(1, size)
    window = slice(None), slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))
    return window, (grid[0][window], grid[1][window])


def _to_segment(start_n2: Array, end_n2: Array, grid: tuple[Array, Array]) -> Array:
    """Return the distance of every pixel to a segment, (n, h, w)."""
    x, y = grid[0] - start_n2[:, 0, None, None], grid[1] - start_n2[:, 1, None, None]
    dx, dy = ((end_n2 - start_n2)[:, i, None, None] for i in range(2))
    share = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-9), 0, 1)
    return np.asarray(np.hypot(x - share * dx, y - share * dy))


def _compose(layers: list[_Surface]) -> tuple[Array, Array, NDArray[np.int8]]:
    """Paint the layers from far to near. Return the colors, the depth and the number of the nearest layer."""
    near = [float(np.min(layer.depth_nhw)) for layer in layers[1:]]
    order = [0, *(1 + np.argsort(near)[::-1])]
    color, depth = layers[0].color_nhw3.copy(), layers[0].depth_nhw.copy()
    top = np.zeros(depth.shape, np.int8)
    for number in order[1:]:
        layer = layers[number]
        alpha = layer.alpha_nhw[..., None]
        color = alpha * layer.color_nhw3 + (1 - alpha) * color
        covered = layer.alpha_nhw >= 0.5
        depth = np.where(covered, layer.depth_nhw, depth)
        top[covered] = number
    return color, depth, top


def _normals(depth_nhw: Array, top_nhw: NDArray[np.int8], size: int) -> Array:
    """Return unit normals (n, h, w, 3) from differences of the depth between pixels of the same object."""
    slopes = []
    for axis in (2, 1):
        same = np.diff(top_nhw, axis=axis) == 0
        ahead = np.where(same, np.diff(depth_nhw, axis=axis) * size, 0)
        before, after = ([(0, 0)] * axis + [one] + [(0, 0)] * (2 - axis) for one in ((1, 0), (0, 1)))
        count = np.pad(same, before).astype(np.float32) + np.pad(same, after)
        slopes.append((np.pad(ahead, before) + np.pad(ahead, after)) / np.maximum(count, 1))
    normals = np.stack([*slopes, np.ones_like(slopes[0])], axis=-1)
    return np.asarray((normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32))


def _boxes(alpha_nhw: Array) -> Array:
    """Return the box of an object in every frame, (n, 4); NaN where it is out of the frame."""
    boxes = np.full((len(alpha_nhw), 4), np.nan, np.float32)
    for n, covered in enumerate(alpha_nhw >= 0.5):
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        if len(rows):
            boxes[n] = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return boxes


def _seen(points_np2: Array, top_nhw: NDArray[np.int8], size: int) -> Array:
    """Return the key points in pixels, with 1 where the figure is the nearest object there."""
    pixels = points_np2 * size
    place = np.floor(pixels).astype(np.int64)
    inside = ((place >= 0) & (place < size)).all(axis=-1)
    clipped = np.clip(place, 0, size - 1)
    frame = np.arange(len(pixels))[:, None]
    seen = inside & (top_nhw[frame, clipped[..., 1], clipped[..., 0]] == 3)
    return np.concatenate([pixels, seen[..., None]], axis=-1).astype(np.float32)


def _sound(random: Random, kind: int, hue: int, height_n: Array, rate: float) -> NDArray[np.int16]:
    """Return the tone of a shape: its kind decides the pitch, which rises with the shape, its color an overtone."""
    a = random("sound", 2)
    length = round(len(height_n) / rate * SOUND_HZ)
    at_t = np.interp(np.arange(length) / SOUND_HZ, np.arange(len(height_n)) / rate, height_n)
    octave_t = kind / _TONES_PER_OCTAVE + _GLIDE_OCTAVES * (0.5 - at_t)
    phase_t = 2 * math.pi * np.cumsum(_LOWEST_TONE_HZ * 2**octave_t) / SOUND_HZ
    wave_t = np.sin(phase_t) + 0.3 * np.sin(2 * phase_t) + 0.1 * np.sin(3 * phase_t)
    wave_t += 0.4 * np.sin(2 * math.pi * _OVERTONES_HZ[hue] * np.arange(length) / SOUND_HZ)
    hiss_t = np.random.Generator(np.random.Philox(key=int(a[0] * 2**53))).standard_normal(length)
    return np.asarray(np.rint((0.25 + 0.3 * a[1]) * 14_000 * wave_t + 60 * hiss_t).astype(np.int16))
