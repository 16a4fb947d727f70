"""A procedural video set: moving shapes with tones and an articulated figure, in any number, without a download.

Each clip is a pure function of (seed, split, index); see `raysl.ingestion.clip_drawing`. The class is the action of the
figure. Tracks, the sounding object, key points, depth and normals are columns; see `raysl.dataset.clips`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysl.dataset.clips import COLUMNS, DEPTH_SCALE, TRUTH, jpeg, thumbnail
from raysl.ingestion import png
from raysl.ingestion.clip_drawing import ACTIONS, KEYPOINTS, KINDS, Drawn, draw
from raysl.ingestion.found import Found
from raysl.ingestion.sources import Confidence, Row, SourceLocation, Unit, UnitSize, numbered

if TYPE_CHECKING:
    from raysl.rng import ImageRng

SUMMARY = "clips:N for drawn clips"

# Default, smallest and largest value of each.
_OPTIONS = {"seed": (0, 0, 2**62), "size": (64, 32, 256), "frames": (24, 2, 240)}
_RATE = 8.0
_UNIT_CLIPS = 256


def recognize(location: SourceLocation) -> Confidence:
    return Confidence.IS if location.uri.partition(":")[0].partition("?")[0] == "clips" else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True

    def __init__(self, location: SourceLocation) -> None:
        self._count, self._options, self._split = numbered(location, "clips", "clips", _OPTIONS)
        splits = ("train", "test")
        self.found = Found("drawn clips", "the action of the figure", splits, self._split, noun="clips")
        options = "&".join(f"{name}={value}" for name, value in self._options.items())
        self.name = f"clips:{self._count}?{options}#{self._split}"
        self.clips = {
            "columns": [*COLUMNS, *TRUTH],
            "frames_per_s": _RATE,
            "keypoints": list(KEYPOINTS),
            "kinds": list(KINDS),
        }

    def stamp(self) -> str:
        return self.name

    def units(self, size: UnitSize) -> Iterator[Unit]:
        self.found.classes = dict.fromkeys(ACTIONS, self._count // len(ACTIONS))
        self.found.images = self._count
        step = min(size.num_images, _UNIT_CLIPS)
        for first in range(0, self._count, step):
            count = min(step, self._count - first)
            yield Unit(count, {"first": first, "count": count, "split": self._split, **self._options})


def read(unit: Unit) -> Iterator[Row]:
    # It imports torch, which takes more memory than all else in ingest.
    from raysl.rng import ImageRng

    spec = unit.spec
    for index in range(spec["first"], spec["first"] + spec["count"]):
        name = f"clips/{spec['split']}"
        one = ImageRng(spec["seed"], np.zeros(1, np.int64), np.array([index], np.int64), name)
        drawn = draw(partial(_numbers, one), spec["size"], spec["frames"], _RATE)
        frames = [jpeg(pixels_hwc) for pixels_hwc in drawn.frames_nhwc]
        columns = _columns(drawn, frames)
        yield Row(frames[len(frames) // 2], ACTIONS[drawn.action], f"clips, clip {index}", clip=columns)


def _numbers(one: ImageRng, name: str, count: int) -> NDArray[np.float64]:
    return one.uniform_array(name, count)[0]  # type: ignore[no-any-return]


def _columns(drawn: Drawn, frames: list[bytes]) -> dict[str, Any]:
    depth = Image.fromarray(np.rint(drawn.depth_hw * DEPTH_SCALE).astype(np.uint16))
    file = io.BytesIO()
    depth.save(file, "PNG")
    normals = np.rint(127.5 * (1 + drawn.normals_hw3)).astype(np.uint8)
    return {
        "frames": frames,
        "times": (np.arange(len(frames)) / _RATE).tolist(),
        "thumbnails": b"".join(map(thumbnail, drawn.frames_nhwc)),
        "tracks": drawn.tracks_kn4.ravel(),
        "sound": drawn.sound_t.astype("<i2").tobytes(),
        "sounding": drawn.sounding,
        "kind": drawn.kind,
        "keypoints": drawn.keypoints_np3.ravel(),
        "depth": file.getvalue(),
        "normals": png.encode(normals[None])[0],
    }
