"""From a video file to clips, with PyAV: frames at a stated rate, their times, the sound, and the track of what moves.

A video is read once for its frames and once for its sound, side by side, so memory is bounded by one clip. A frame is
never repeated: a slow or uneven video gives fewer frames with their true times.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysl.dataset.clips import COLUMNS, SOUND_HZ, jpeg, thumbnail
from raysl.ingestion import tracker
from raysl.ingestion.sources import ReadConfig, Row
from raysl.stream.formats import DecodeError, package

Pixels = NDArray[np.uint8]
# A video that ends this share of its stated length early has been cut off.
_MISSING = 0.1
# Shorter gaps in the time stamps of the sound are due to their rounding.
_GAP_S = 0.05


class Sampling(NamedTuple):
    """How a video becomes clips; see `ReadConfig`."""

    fps: float
    clip_s: float
    frame_size: int


def sampled(config: ReadConfig) -> tuple[dict[str, Any], list[float]]:
    """Return what the manifest says about the clips, and the values of a Sampling."""
    sampling = Sampling(config.fps, config.clip_s, config.frame_size)
    return {"columns": list(COLUMNS), **sampling._asdict(), "sound_hz": SOUND_HZ}, list(sampling)


def clips(row: Row, sampling: Sampling, open_file: Callable[[], BinaryIO] | None = None) -> Iterator[Row]:
    """Yield the clips of a video, and a row with the reason for a part that cannot be read.

    The bytes of the file are the image of the row, or `open_file` opens it for reading, seekable.
    """
    if open_file is None:
        if row.image is None:
            yield row
            return
        open_file = partial(io.BytesIO, row.image)
    try:
        av = package("av", "av", "a video")
    except DecodeError as error:
        yield row._replace(image=None, reason=str(error).replace("'images'", "'video'"))
        return
    frames: list[tuple[float, Pixels]] = []
    found, several, end_s, why = False, False, 0.0, ""
    with open_file() as file, open_file() as sound_file:
        try:
            sound = _Sound(av, sound_file)
            for time_s, pixels_hwc in _frames(av, file, sampling):
                end_s = time_s + 1 / sampling.fps
                if frames and time_s >= frames[0][0] + sampling.clip_s - 1e-6:
                    if len(frames) > 1:
                        found = True
                        yield _clip(row, frames, time_s, sound)
                    frames, several = [], True
                frames.append((time_s, pixels_hwc))
        except DecodeError as error:
            why = str(error)
        except av.error.FFmpegError as error:
            why = f"damaged or cut off{f' after {end_s:.1f} s' if end_s else ''}: {error.strerror or error}"
        if len(frames) > 1:
            found = True
            yield _clip(row, frames, end_s, sound)
    if why or not found:
        one = "has one frame in each clip: raise --fps or --clip-s" if several else "holds one frame"
        why = why or (one if frames else "holds no frames")
        yield row._replace(image=None, reason=why)


def _opened(av: Any, file: BinaryIO) -> Any:
    # Titles in old files are often not in UTF-8.
    return av.open(file, metadata_errors="replace")


def _frames(av: Any, file: BinaryIO, sampling: Sampling) -> Iterator[tuple[float, Pixels]]:
    """Yield (time, pixels) of the frames that are kept, upright and resized. Raises DecodeError."""
    with _opened(av, file) as container:
        if not container.streams.video:
            raise DecodeError("holds no video" + (", only sound" if container.streams.audio else ""))
        stream = container.streams.video[0]
        aspect = float(stream.sample_aspect_ratio or 1)
        stated_s = float(container.duration or 0) / av.time_base
        if stream.average_rate:  # FFmpeg takes the duration of a cut AVI file from its size.
            stated_s = max(stated_s, stream.frames / float(stream.average_rate))
        start_s, due, last_s = None, 0, 0.0
        for number, frame in enumerate(container.decode(stream)):
            time_s = frame.time
            if time_s is None:
                time_s = number / float(stream.average_rate or sampling.fps)
            start_s = time_s if start_s is None else start_s
            last_s = time_s - start_s
            if last_s * sampling.fps + 1e-4 >= due:
                due = math.floor(last_s * sampling.fps + 1e-4) + 1
                yield last_s, _upright(frame, aspect, sampling.frame_size)
        # Matroska counts the duration from 0, also of a recording that starts later.
        if stated_s > 2 and (start_s or 0) + last_s < (1 - _MISSING) * stated_s - 1:
            raise DecodeError(f"is cut off: {last_s:.1f} s of {stated_s:.1f} s could be read")


def _upright(frame: Any, aspect: float, frame_size: int) -> Pixels:
    """Return a frame in square pixels, as a player shows it, with its shorter side at most `frame_size`.

    `aspect` is the width of a pixel of the file divided by its height.
    """
    width, height = frame.width * aspect, float(frame.height)
    factor = min(1.0, frame_size / min(width, height))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    pixels_hwc = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    # FFmpeg states by how much the frame is turned counter-clockwise to stand upright.
    return np.ascontiguousarray(np.rot90(pixels_hwc, round(frame.rotation / 90)))


def _silence(count: int) -> Iterator[NDArray[np.int16]]:
    """Yield samples in small pieces, because a damaged time stamp may ask for hours."""
    for start in range(0, count, SOUND_HZ):
        yield np.zeros(min(SOUND_HZ, count - start), np.int16)


class _Sound:
    """The sound of a video, read in the order of time: 16 kHz, mono."""

    def __init__(self, av: Any, file: BinaryIO) -> None:
        self._chunks = self._read(av, file)
        self._have = np.zeros(0, np.int16)
        self._at = 0  # number of the first sample in `_have`, from the beginning of the video
        self.there = False

    def _read(self, av: Any, file: BinaryIO) -> Iterator[NDArray[np.int16]]:
        try:
            with _opened(av, file) as container:
                if not container.streams.audio:
                    return
                resampler = av.AudioResampler(format="s16", layout="mono", rate=SOUND_HZ)
                video = container.streams.video[0]
                start_s = float((video.start_time or 0) * video.time_base)
                next_s = None
                for frame in container.decode(container.streams.audio[0]):
                    time_s = frame.time
                    if next_s is None:
                        next_s = time_s or 0.0
                        self._at = round((next_s - start_s) * SOUND_HZ)
                    elif time_s is not None and time_s - next_s > _GAP_S:
                        for part in resampler.resample(None):
                            yield part.to_ndarray()[0]
                        resampler = av.AudioResampler(format="s16", layout="mono", rate=SOUND_HZ)
                        yield from _silence(round((time_s - next_s) * SOUND_HZ))
                        next_s = time_s
                    next_s += frame.samples / frame.sample_rate
                    for part in resampler.resample(frame):
                        yield part.to_ndarray()[0]
                for part in resampler.resample(None):
                    yield part.to_ndarray()[0]
        except av.error.FFmpegError:
            return  # the rest of the clip is silent

    def between(self, start_s: float, end_s: float) -> NDArray[np.int16] | None:
        """Return the samples of the next part, silent where there are none; None for a video without sound."""
        first, end = round(start_s * SOUND_HZ), round(end_s * SOUND_HZ)
        while self._at + len(self._have) < end:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self.there = True
            skipped = max(0, first - self._at)
            if skipped >= len(self._have):
                self._at += len(self._have)
                self._have = chunk
            else:
                self._have, self._at = np.concatenate([self._have[skipped:], chunk]), self._at + skipped
        if not self.there:
            return None
        samples = np.zeros(end - first, np.int16)
        low, high = max(first, self._at), min(end, self._at + len(self._have))
        if low < high:
            samples[low - first : high - first] = self._have[low - self._at : high - self._at]
        return samples


def _clip(row: Row, frames: list[tuple[float, Pixels]], end_s: float, sound: _Sound) -> Row:
    start_s = frames[0][0]
    samples = sound.between(start_s, end_s)
    pixels = [pixels_hwc for _, pixels_hwc in frames]
    columns: dict[str, Any] = {
        "frames": [*map(jpeg, pixels)],
        "times": [time_s - start_s for time_s, _ in frames],
        "thumbnails": b"".join(map(thumbnail, pixels)),
        "tracks": tracker.track(pixels).ravel(),
        "sound": None if samples is None else samples.astype("<i2").tobytes(),
    }
    middle, name = columns["frames"][len(frames) // 2], f"{row.path}#{start_s:.2f}-{end_s:.2f}"
    return row._replace(image=middle, path=name, clip=columns)
