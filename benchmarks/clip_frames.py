"""Compare stored frames with stored video, and watch the memory of a long video: what a row of clips should hold.

    python -m benchmarks.clip_frames --videos FOLDER

For one clip of every video in a folder: bytes and CPU time for three frames in any order, from JPEG files as raysl
stores them and from an H.264 stream of the same frames with a key frame each second. Then the resident memory while a
drawn video of ten minutes is cut into clips. It needs the extra `video`.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import tyro

from raysl.ingestion.sources import Row, SourceLocation, UnitSize, open_source, read
from raysl.ingestion.video import Sampling, clips
from raysl.stream.decode import decode

_REPEATS = 40
_FPS = 8


@dataclass(frozen=True)
class Flags:
    """What is measured.

    Args:
        videos: folder of videos.
    """

    videos: Path


def h264(frames: list[bytes]) -> bytes:
    """Return the frames as a video with a key frame each second."""
    file = io.BytesIO()
    pictures = [decode(frame).permute(1, 2, 0).numpy() for frame in frames]
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.height, stream.width = (side // 2 * 2 for side in pictures[0].shape[:2])
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", _FPS
        for number, picture in enumerate(pictures):
            even = np.ascontiguousarray(picture[: stream.height, : stream.width])
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def seek(data: bytes, numbers: list[int]) -> None:
    """Decode frames of a video by seeking."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number in numbers:
            container.seek(int(number / _FPS / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time >= number / _FPS - 1e-3:
                    frame.to_ndarray(format="rgb24")
                    break


def cpu_ms(work: Callable[[list[int]], Any], count: int) -> float:
    """Return the CPU time of three random frames in milliseconds."""
    rng = np.random.default_rng(0)
    started = time.process_time()
    for _ in range(_REPEATS):
        work(rng.choice(count, 3, replace=False).tolist())
    return (time.process_time() - started) / _REPEATS * 1e3


def frames_of(flags: Flags) -> None:
    """Print a line for each video."""
    source = open_source(SourceLocation(str(flags.videos)))
    rows = {
        row.path.partition("#")[0]: row
        for unit in source.source.units(UnitSize(1, 1))
        for row in read(source.kind, unit)
    }
    for name, row in rows.items():
        if row.clip is None:
            continue
        frames = row.clip["frames"]
        video = h264(frames)
        jpeg_ms = cpu_ms(lambda numbers, frames=frames: [decode(frames[n]) for n in numbers], len(frames))  # type: ignore[misc]
        video_ms = cpu_ms(partial(seek, video), len(frames))
        print(
            f"{name}: {len(frames)} frames, JPEG {sum(map(len, frames)):,} bytes and {jpeg_ms:.1f} ms, "
            f"H.264 {len(video):,} bytes and {video_ms:.1f} ms"
        )


def memory() -> None:
    """Print the resident memory along a drawn video of ten minutes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for number in range(6000):
                pixels = np.full((96, 128, 3), number % 200, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        resident, started = [], time.process_time()
        for _ in clips(Row(None, None, ""), Sampling(_FPS, 8.0, 128), lambda: path.open("rb")):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)
        print(
            f"{len(resident)} clips in {time.process_time() - started:.1f} CPU seconds; resident MB after the first, "
            f"the tenth and the last: {resident[0]}, {resident[9]}, {resident[-1]}"
        )


if __name__ == "__main__":
    frames_of(tyro.cli(Flags))
    memory()
