"""Folders of videos: every container, uneven times, rotation, sound, and what is broken."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.dataset.clips import COLUMNS, SOUND_HZ, Clips
from raysl.errors import UserError
from raysl.ingestion.found import Found
from raysl.ingestion.sources import ReadConfig, Row, SourceLocation, UnitSize, open_source, read
from raysl.ingestion.tracker import track
from raysl.stream.decode import decode
from tests.ingestion.reading import jpeg, write_tar

av = pytest.importorskip("av")

# Container, codec and codec of the sound. FFmpeg's wheels write no Theora, so the ogv holds VP8.
FORMATS = [
    ("mp4", "libx264", "aac"),
    ("mov", "mpeg4", "aac"),
    ("mkv", "libx264", "libmp3lame"),
    ("avi", "mjpeg", "pcm_s16le"),
    ("webm", "libvpx-vp9", "libopus"),
    ("ogv", "libvpx", "libopus"),
]


def make(
    path: Path,
    codec: str = "libx264",
    sound: str = "",
    times: Sequence[float] = tuple(np.arange(20) / 10),
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    hz: float = 440.0,
    title: str = "",
) -> Path:
    """Write a video whose gray level is 10 times the second, with a white mark in the upper left and a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="ogg" if path.suffix == ".ogv" else None) as container:
        container.metadata.update({"title": title} if title else {})
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream(sound, rate=48_000) if sound else None
        if audio is not None:
            audio.layout = "stereo"
        for time_s in times:
            pixels = np.full((size[1], size[0], 3), int(min(40 + 60 * time_s, 220)), np.uint8)
            pixels[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(time_s * 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            seconds = np.arange(round((times[-1] + 0.1) * 48_000)) / 48_000
            wave = (8000 * np.sin(2 * np.pi * hz * seconds)).astype(np.int16)
            tone = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
            tone.sample_rate, tone.pts = 48_000, 0
            resampler = av.AudioResampler(format=audio.format, layout="stereo", rate=48_000)
            for part in resampler.resample(tone) + resampler.resample(None):
                part.pts = None
                for piece in _pieces(part, audio):
                    container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return path


def _pieces(frame: Any, audio: Any) -> list[Any]:
    fifo = av.AudioFifo()
    fifo.write(frame)
    pieces = list(fifo.read_many(audio.codec_context.frame_size or 1024))
    rest = fifo.read(0, partial=True)
    return pieces if rest is None else [*pieces, rest]


def rows_of(source: Path, config: ReadConfig | None = None, split: str = "") -> tuple[Found, list[Row]]:
    one = open_source(SourceLocation(str(source), split, config or ReadConfig()))
    units = list(one.source.units(UnitSize(3, 1 << 30)))
    return one.source.found, [row for unit in units for row in read(one.kind, unit)]


def clips_of(source: Path, config: ReadConfig | None = None) -> tuple[Clips, list[Row]]:
    """The clips of a source, and the rows that are none."""
    _, rows = rows_of(source, config)
    good = [row for row in rows if row.clip is not None]
    table = pa.Table.from_pylist([dict(row.clip or {}) for row in good], pa.schema(list(COLUMNS.items())))
    return Clips(table), [row for row in rows if row.clip is None]


@pytest.mark.parametrize(("ending", "codec", "sound"), FORMATS)
def test_every_container_is_read(ending: str, codec: str, sound: str, tmp_path: Path) -> None:
    make(tmp_path / f"a.{ending}", codec, sound)
    make(tmp_path / f"b.{ending}", codec)
    clips, bad = clips_of(tmp_path, ReadConfig(fps=5))
    assert not bad
    assert len(clips) == 2
    for row in range(2):
        np.testing.assert_allclose(clips.times(row), np.arange(10) / 5, atol=0.04)
        for number in (0, 5, 9):
            pixels = decode(clips.frame(row, number)).float()
            assert pixels.shape == (3, 48, 64)
            assert abs(float(pixels[:, 30:, 30:].mean()) - (40 + 12 * number)) < 8
            assert float(pixels[:, 4:10, 4:10].mean()) > 230
    sound_t = clips.sound(0).astype(float)
    assert abs(len(sound_t) / SOUND_HZ - 2) < 0.05
    assert abs(np.abs(np.fft.rfft(sound_t)).argmax() / len(sound_t) * SOUND_HZ - 440) < 3
    assert len(clips.sound(1)) == 0


def test_uneven_times_are_true_and_no_frame_is_repeated(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", times=(0, 0.1, 0.2, 0.9, 1.0, 1.5))
    clips, _ = clips_of(tmp_path, ReadConfig(fps=5))
    np.testing.assert_allclose(clips.times(0), [0, 0.2, 0.9, 1.0, 1.5], atol=0.02)


def test_a_recording_that_starts_late_is_not_cut_off(tmp_path: Path) -> None:
    make(tmp_path / "a.mkv", times=tuple(100 + np.arange(20) / 10))
    clips, bad = clips_of(tmp_path, ReadConfig(fps=5))
    assert not bad
    np.testing.assert_allclose(clips.times(0), np.arange(10) / 5, atol=0.04)


@pytest.mark.parametrize(("rotation", "corner"), [(90, "low left"), (180, "low right"), (-90, "up right")])
def test_a_video_is_turned_as_a_player_shows_it(rotation: int, corner: str, tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", rotation=rotation)
    clips, _ = clips_of(tmp_path)
    pixels = decode(clips.frame(0, 0)).float().mean(0)
    height, width = pixels.shape
    assert (height, width) == ((64, 48) if abs(rotation) == 90 else (48, 64))
    up, low = pixels[:8], pixels[-8:]
    ends = {"up left": up[:, :8], "up right": up[:, -8:], "low left": low[:, :8], "low right": low[:, -8:]}
    assert max(ends, key=lambda name: float(ends[name].mean())) == corner


def test_a_long_video_becomes_clips_with_their_part_of_the_sound(tmp_path: Path) -> None:
    make(tmp_path / "a.mkv", sound="libmp3lame", times=tuple(np.arange(52) / 10))
    _, rows = rows_of(tmp_path, ReadConfig(fps=10, clip_s=2, frame_size=24))
    assert [row.path for row in rows] == ["a.mkv#0.00-2.00", "a.mkv#2.00-4.00", "a.mkv#4.00-5.20"]
    clips, _ = clips_of(tmp_path, ReadConfig(fps=10, clip_s=2, frame_size=24))
    assert [clips.num_frames(row) for row in range(3)] == [20, 20, 12]
    assert [len(clips.sound(row)) for row in range(3)] == [32_000, 32_000, 19_200]
    assert all(np.abs(clips.sound(row)[4000:18_000]).mean() > 2000 for row in range(3))
    assert decode(clips.frame(0, 0)).shape == (3, 24, 32)
    assert rows[1].image == clips.frame(1, 10)


def test_a_gap_in_the_sound_is_silent(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16_000)
        audio.layout = "mono"
        for number in range(40):
            pixels = np.full((48, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        for tenth in (*range(10), *range(25, 40)):
            tone = np.full((1, 1600), 5000, np.int16)
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, tenth * 1600
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    clips, bad = clips_of(tmp_path, ReadConfig(fps=10, clip_s=2))
    assert not bad
    sound_t = np.concatenate([clips.sound(row) for row in range(2)])
    assert len(sound_t) == 64_000
    assert (sound_t[200:15_800] == 5000).all()
    assert not sound_t[16_200:39_800].any()
    assert (sound_t[40_200:63_800] == 5000).all()


def test_class_folders_splits_and_single_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("jump", "walk"):
            make(tmp_path / split / name / "a.mp4", times=(0, 0.2, 0.4))
    (tmp_path / "notes.txt").write_text("x")
    found, rows = rows_of(tmp_path, split="test")
    assert found.splits == ("test", "train")
    assert found.classes == {"jump": 1, "walk": 1}
    assert [(row.label, row.path.partition("#")[0]) for row in rows] == [
        ("jump", "test/jump/a.mp4"),
        ("walk", "test/walk/a.mp4"),
    ]
    assert len(clips_of(tmp_path / "train" / "jump" / "a.mp4")[0]) == 1
    with pytest.raises(UserError, match="several splits"):
        open_source(SourceLocation(str(tmp_path)))


def test_videos_in_archives_and_tables_become_clips(tmp_path: Path) -> None:
    data = {name: make(tmp_path / "in" / f"{name}.mp4", times=(0, 0.2, 0.4)).read_bytes() for name in "ab"}
    (tmp_path / "in" / "b.mp4").write_bytes(b"damaged")
    damaged = {"a": data["a"], "b": b"damaged"}
    members = {f"{name}.mp4": content for name, content in damaged.items()}
    labels = {"a.cls": b"1", "b.cls": b"0"}
    write_tar(tmp_path / "shard.tar", {**members, **labels, "a.jpg": jpeg()})
    write_tar(tmp_path / "folders.tar", {f"x/{name}": content for name, content in members.items()})
    struct = [{"bytes": content, "path": None} for content in damaged.values()]
    feature = {"info": {"features": {"film": {"_type": "Video"}}}}
    columns = {"film": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
    with_feature = pa.schema(columns, metadata={"huggingface": json.dumps(feature)})
    pq.write_table(pa.table({"film": struct, "label": [1, 0]}, with_feature), tmp_path / "hf.parquet")
    pq.write_table(pa.table({"video": list(damaged.values()), "label": [1, 0]}), tmp_path / "plain.parquet")
    (tmp_path / "in" / "list.csv").write_text("file_name,label\na.mp4,1\nb.mp4,0\n")
    (tmp_path / "list.csv").write_text("path,label\na,1\nb,0\n")
    for source in ("shard.tar", "folders.tar", "hf.parquet", "plain.parquet", "in/list.csv", "list.csv"):
        one = open_source(SourceLocation(str(tmp_path / source)))
        found, rows = rows_of(tmp_path / source)
        assert found.noun == "videos"
        assert "image" not in found.layout + found.labels, source
        assert one.source.encoded_here
        assert one.source.clips["columns"] == list(COLUMNS)
        assert found.classes == ({"x": 2} if source == "folders.tar" else {"0": 1, "1": 1}), source
        good, bad = rows
        assert good.path.endswith("#0.00-0.53")
        assert good.clip is not None
        assert (bad.image, bad.clip) == (None, None)
        assert "damaged or cut off" in bad.reason
    _, (image,) = rows_of(tmp_path / "shard.tar", ReadConfig(image_column="jpg"))
    assert image.clip is None


def _truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_a_title_that_is_not_in_utf8_does_no_harm(tmp_path: Path) -> None:
    path = make(tmp_path / "a.avi", "mjpeg", "pcm_s16le", title="caf__")
    path.write_bytes(path.read_bytes().replace(b"caf__", b"caf\xe9s"))
    clips, bad = clips_of(tmp_path)
    assert (len(clips), len(clips.sound(0)) > 0, bad) == (1, True, [])


def test_a_name_that_is_not_in_utf8_does_no_harm(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4").rename(tmp_path / os.fsdecode(b"\xff.mp4"))
    clips, bad = clips_of(tmp_path)
    assert (len(clips), bad) == (1, [])


def test_clips_of_one_frame_are_listed_with_what_makes_them_longer(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    clips, bad = clips_of(tmp_path, ReadConfig(fps=5, clip_s=0.1))
    assert len(clips) == 0
    assert [row.reason for row in bad] == ["has one frame in each clip: raise --fps or --clip-s"]


def test_broken_videos_are_listed_with_their_reason(tmp_path: Path) -> None:
    noise = tuple(np.arange(60) / 10)
    make(tmp_path / "01 whole.mp4")
    make(tmp_path / "02 cut.mp4", times=noise)
    _truncated(tmp_path / "02 cut.mp4", 0.5)
    make(tmp_path / "03 cut.avi", "mjpeg", times=noise)
    _truncated(tmp_path / "03 cut.avi", 0.4)
    (tmp_path / "04 empty.mp4").write_bytes(b"")
    (tmp_path / "05 text.mov").write_text("this is not a video " * 50)
    (tmp_path / "06 zeros.mkv").write_bytes(bytes(5000))
    make(tmp_path / "07 one.mp4", times=(0,))
    with av.open(str(tmp_path / "08 sound.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    data = bytearray(make(tmp_path / "09 head.webm", "libvpx-vp9").read_bytes())
    data[:200] = bytes(200)
    (tmp_path / "09 head.webm").write_bytes(data)
    (tmp_path / "10 page.mp4").write_text("<!DOCTYPE html><html><body>404</body></html>")
    clips, bad = clips_of(tmp_path)
    reasons = {row.path[:2]: row.reason for row in bad}
    assert sorted(reasons) == ["02", "03", "04", "05", "06", "07", "08", "09", "10"]
    for number in ("02", "04", "05", "06", "09", "10"):
        assert "damaged or cut off" in reasons[number]
    assert "cut off" in reasons["03"]
    assert reasons["07"] == "holds one frame"
    assert reasons["08"] == "holds no video, only sound"
    assert all(len(reason) < 120 and "\n" not in reason for reason in reasons.values())
    # What could be read of a video that was cut off is kept.
    assert len(clips) == 2
    assert clips.times(1)[-1] > 1


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path) -> None:
    peaks = []
    for count in (60, 600):
        path = make(tmp_path / f"{count}.mp4", times=tuple(np.arange(count) / 10), size=(96, 96))
        one = open_source(SourceLocation(str(path), config=ReadConfig(clip_s=2)))
        units = list(one.source.units(UnitSize(10, 1 << 30)))
        tracemalloc.start()
        seen = sum(1 for unit in units for _ in read(one.kind, unit))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == count / 20
    assert peaks[1] < 1.5 * peaks[0]


def test_a_patch_is_followed_until_it_is_lost() -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    texture = np.kron(texture[::2, ::2], np.ones((2, 2, 1), np.uint8))
    frames = []
    for number in range(12):
        frame = np.full((48, 48, 3), 90, np.uint8)
        frame[16 : 16 + 16, 2 * number : 2 * number + 16] = texture
        frames.append(frame)
    found = track(frames)
    assert found.shape == (1, 12, 4)
    assert np.abs(np.diff(found[0, :, 1]) - 2).max() <= 1
    assert np.abs(np.diff(found[0, :, 0])).max() <= 1
    assert track([frames[0]] * 5).shape == (0, 5, 4)
    lost = track([*frames, rng.integers(0, 255, (48, 48, 3)).astype(np.uint8)])
    assert np.isnan(lost[0]).any()
