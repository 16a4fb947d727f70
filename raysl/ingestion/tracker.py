"""Follow the patch of a clip that moves most, by normalized correlation.

Wang and Gupta 2015 take patches where much moves and follow them with a correlation filter. Here the patch is a square
of a third of the frame where the difference of two frames is largest; in each next frame it is searched for near its
last place, in both directions of time, and is lost when nothing there is like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Gray = NDArray[np.float32]

# The frames are compared with their shorter side in this many pixels.
_SIDE = 48
_PATCH, _REACH = _SIDE // 3, _SIDE // 8
# The patch is lost below this correlation.
_LIKE = 0.6


def track(frames_hwc: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Return the track of a clip: float32 (1, n, 4) with top, left, height and width in pixels, NaN where it is lost.

    (0, n, 4) for a clip in which nothing moves.
    """
    height, width = frames_hwc[0].shape[:2]
    scale = _SIDE / min(height, width)
    size = max(_SIDE, round(width * scale)), max(_SIDE, round(height * scale))
    gray = [Image.fromarray(frame).convert("L").resize(size, Image.Resampling.BOX) for frame in frames_hwc]
    gray_nhw = np.stack([np.asarray(frame, np.float32) for frame in gray])
    moved_nhw = np.abs(np.diff(gray_nhw, axis=0))
    windows = np.lib.stride_tricks.sliding_window_view(moved_nhw, (_PATCH, _PATCH), axis=(1, 2))
    summed = windows.mean(axis=(3, 4))
    if summed.size == 0 or summed.max() < 1:
        return np.zeros((0, len(frames_hwc), 4), np.float32)
    number, top, left = np.unravel_index(int(summed.argmax()), summed.shape)
    places = np.full((len(frames_hwc), 2), np.nan, np.float32)
    places[number] = top, left
    for step in (1, -1):
        at = int(number)
        while 0 <= at + step < len(frames_hwc):
            found = _find(gray_nhw[at], gray_nhw[at + step], places[at].astype(int))
            if found is None:
                break
            at += step
            places[at] = found
    boxes = np.column_stack([places, np.full((len(places), 2), _PATCH, np.float32)]) / scale
    boxes[np.isnan(places[:, 0])] = np.nan
    return np.asarray(boxes[None], np.float32)


def _find(before_hw: Gray, after_hw: Gray, place_2: NDArray[np.int64]) -> tuple[int, int] | None:
    """Return the place of a patch in another frame; None when nothing near is like it."""
    top, left = place_2
    patch = before_hw[top : top + _PATCH, left : left + _PATCH]
    low_y, low_x = max(0, top - _REACH), max(0, left - _REACH)
    near = after_hw[low_y : top + _REACH + _PATCH, low_x : left + _REACH + _PATCH]
    windows = np.lib.stride_tricks.sliding_window_view(near, patch.shape)
    centered = windows - windows.mean(axis=(2, 3), keepdims=True)
    wanted = patch - patch.mean()
    norms = np.sqrt((centered**2).sum(axis=(2, 3)) * (wanted**2).sum())
    likeness = (centered * wanted).sum(axis=(2, 3)) / np.maximum(norms, 1e-6)
    y, x = np.unravel_index(int(likeness.argmax()), likeness.shape)
    return (int(low_y + y), int(low_x + x)) if likeness[y, x] >= _LIKE else None
