"""Clips: rows of a data set that hold the frames of a short video, with their times and perhaps the sound.

A clip is a row like an image. Its column `image` is the frame in its middle, so whatever works on images works on
clips. The manifest says that the rows are clips and lists their further columns:

    frames      the frames in the order of time, JPEG
    times       time of each frame in seconds; the clip starts at 0
    thumbnails  gray copies of the frames, 16 x 16 pixels, one byte each: motion and likeness without decoding
    tracks      boxes of the objects that are followed: (objects, frames, 4), see `Clips.tracks`
    sound       samples from second 0 on, 16 kHz, mono, int16, little-endian; null for a clip without sound

The columns in `TRUTH` are for probes. Only the procedural set `clips:N` has them; no method may learn from them.

    sounding    number of the tracked object that makes the sound
    kind        number of its shape
    keypoints   (frames, points, 3): x and y in pixels of the frame, and 1 where the point is seen, otherwise 0; the
                manifest names the points
    depth       PNG, 16 bits: depth of every pixel of `image`, 10,000 for each side of the frame
    normals     PNG, RGB: surface normal of every pixel of `image`; 127.5 * (1 + n), x right, y down, z to the viewer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

COLUMNS: dict[str, pa.DataType] = {
    "frames": pa.list_(pa.binary()),
    "times": pa.list_(pa.float64()),
    "thumbnails": pa.binary(),
    "tracks": pa.list_(pa.float32()),
    "sound": pa.binary(),
}
TRUTH: dict[str, pa.DataType] = {
    "sounding": pa.int32(),
    "kind": pa.int32(),
    "keypoints": pa.list_(pa.float32()),
    "depth": pa.binary(),
    "normals": pa.binary(),
}
SOUND_HZ = 16_000
DEPTH_SCALE = 10_000
THUMBNAIL = 16


def jpeg(pixels_hwc: NDArray[np.uint8]) -> bytes:
    """Return a frame for the column `frames`."""
    return simplejpeg.encode_jpeg(  # type: ignore[no-any-return]
        np.ascontiguousarray(pixels_hwc), quality=95, colorspace="RGB", colorsubsampling="444"
    )


def thumbnail(pixels_hwc: NDArray[np.uint8]) -> bytes:
    """Return the gray copy of a frame for the column `thumbnails`."""
    gray = Image.fromarray(pixels_hwc).convert("L")
    return gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()


@dataclass(frozen=True)
class Clips:
    """Rows of a data set of clips, as `DataSet.read` returns them. Each method needs the column of its name; `frame`
    needs `frames`, and `tracks` and `keypoints` need `times` too.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _value(self, column: str, row: int) -> Any:
        return self.table.column(column)[row]

    def frame(self, row: int, number: int) -> bytes:
        """Return a frame as JPEG."""
        return self._value("frames", row).values[int(number)].as_py()  # type: ignore[no-any-return]

    def num_frames(self, row: int) -> int:
        """Return the number of frames of a clip, from the column `times`."""
        return len(self._value("times", row))

    def times(self, row: int) -> NDArray[np.float64]:
        """Return the time of each frame in seconds: float64 (n,)."""
        return self._value("times", row).values.to_numpy()  # type: ignore[no-any-return]

    def thumbnails(self, row: int) -> NDArray[np.uint8]:
        """Return the gray copies of the frames: uint8 (n, 16, 16)."""
        data = self._value("thumbnails", row).as_py()
        return np.frombuffer(data, np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL)

    def tracks(self, row: int) -> NDArray[np.float32]:
        """Return the boxes of followed objects: float32 (objects, n, 4), with top, left, height and width in pixels.

        A box is NaN in frames where its object is not seen. A clip may have no tracks.
        """
        values = self._value("tracks", row).values.to_numpy()
        return values.reshape(-1, self.num_frames(row), 4)  # type: ignore[no-any-return]

    def sound(self, row: int) -> NDArray[np.int16]:
        """Return the samples of the sound, int16 (t,) at 16 kHz; empty for a clip without sound."""
        data = self._value("sound", row).as_py()
        return np.frombuffer(data or b"", "<i2").astype(np.int16)

    def keypoints(self, row: int) -> NDArray[np.float32]:
        """Return the key points of the figure: float32 (n, points, 3), with x, y and 1 where the point is seen."""
        values = self._value("keypoints", row).values.to_numpy()
        return values.reshape(self.num_frames(row), -1, 3)  # type: ignore[no-any-return]
