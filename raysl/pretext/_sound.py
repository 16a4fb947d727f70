"""A frame of a clip and the sound around it, as two views that agree on a moment."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl.augment import SourceCrop
from raysl.dataset.clips import SOUND_HZ, Clips
from raysl.pretext import Chosen, Color, OfFrames, Plain, Transformed
from raysl.rng import ImageRng

# Windows of 32 ms, 100 in a second, in 64 bands on the mel scale: the decibels from -90 to 0 become 0 to 255.
_WINDOW, _HOP, BANDS = 512, 160, 64
_LOWEST_DB = -90.0


def _moments(clips: Clips, window_s: float, image_rng: ImageRng) -> NDArray[np.float64]:
    """Return the second at which the sound of a moment begins, (b, 2): the moment, and another one of the clip.

    All views of a clip draw the same. The other moment does not overlap the first where the clip is long enough.
    """
    draws_b2 = image_rng.shared("moment").uniform_array("start", 2)
    starts = np.zeros_like(draws_b2)
    for row, (first, second) in enumerate(draws_b2):
        last = max(clips.times(row)[-1] - window_s, 0.0)
        start = first * last
        before, after = max(start - window_s, 0.0), max(last - start - window_s, 0.0)
        if before + after > 0:
            other = second * (before + after)
            other = other if other < before else start + window_s + other - before
        else:
            other = last if start < last / 2 else 0.0
        starts[row] = start, other
    return starts


class MomentFrame(OfFrames):
    """The frame in the middle of the moment."""

    color: Color = "source"

    def __init__(self, source: SourceCrop, window_s: float) -> None:
        self.source = source
        self.window_s = window_s

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Choose the frame from each clip that is nearest to the middle of the sound."""
        starts_b = _moments(clips, self.window_s, image_rng)[:, 0]
        numbers = [
            int(np.abs(clips.times(row) - start - self.window_s / 2).argmin())
            for row, start in enumerate(starts_b)
        ]
        return Chosen(np.array(numbers, np.int64)[:, None])


class MomentSound(Plain):
    """Spectrograms (b, p, 1, bands, windows) of the moment and, with p = 2, of another moment of the clip."""

    clip_columns = ("times", "sound")
    color: Color = "none"

    def __init__(self, window_s: float, moments: int) -> None:
        self.window_s = window_s
        self.num_crops = moments
        self.shape = (1, BANDS, _num_windows(window_s))
        self.source = SourceCrop(BANDS, 1.0)

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Compute the spectrograms. A clip without sound is silent."""
        starts_bp = _moments(clips, self.window_s, image_rng)[:, : self.num_crops]
        crops = [
            [spectrogram(clips.sound(row), start, self.window_s) for start in starts_bp[row]]
            for row in range(len(clips))
        ]
        return Chosen(crops_bpchw=torch.from_numpy(np.array(crops, np.uint8)[:, :, None]))

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return silence, the sound of a still image."""
        return Transformed(
            torch.zeros(len(images_bchw), self.num_crops, *self.shape, dtype=torch.uint8), None
        )


def _num_windows(window_s: float) -> int:
    return max(1, round(window_s * SOUND_HZ / _HOP))


def spectrogram(sound_t: NDArray[np.int16], start_s: float, window_s: float) -> NDArray[np.uint8]:
    """Return the log-mel spectrogram of a part of the sound; the lowest band comes first.

    Args:
        sound_t: samples at 16 kHz; silence continues it.
        start_s: second at which the part begins.
        window_s: its length in seconds.

    Returns:
        uint8 (bands, windows).
    """
    count = _num_windows(window_s)
    first = round(start_s * SOUND_HZ)
    samples = np.zeros(count * _HOP + _WINDOW)
    found = sound_t[first : first + len(samples)]
    samples[: len(found)] = found / 32768.0
    parts = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[: count * _HOP : _HOP]
    power = np.abs(np.fft.rfft(parts * np.hanning(_WINDOW), axis=1)) ** 2 / (_WINDOW / 4) ** 2
    decibels = 10 * np.log10(np.maximum(_mel_bands() @ power.T, 1e-12))
    return np.rint(255 * np.clip(1 - decibels / _LOWEST_DB, 0, 1)).astype(np.uint8)


@functools.cache
def _mel_bands() -> NDArray[np.float64]:
    """Return triangular filters, equally wide on the mel scale: (bands, frequencies)."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SOUND_HZ / 2 / 700), BANDS + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    hz = np.fft.rfftfreq(_WINDOW, 1 / SOUND_HZ)
    # At low pitch a band is narrower than the distance of two frequencies: no band is empty.
    width = np.maximum(np.diff(edges_hz), SOUND_HZ / _WINDOW)
    rise = (hz[None] - edges_hz[1:-1, None]) / width[:-1, None] + 1
    fall = 1 - (hz[None] - edges_hz[1:-1, None]) / width[1:, None]
    return np.asarray(np.clip(np.minimum(rise, fall), 0, 1))
