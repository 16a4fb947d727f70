"""Images that are not ordinary, from the folder to the data set: one rule for all of them, said and recorded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion import IngestConfig, ingest, tasks
from raysl.stream.decode import decode
from raysl.stream.pixels import DecodeConfig


@pytest.fixture(autouse=True)
def listen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_MOST_HERE", 100)
    caplog.set_level(logging.INFO, "raysl.ingestion")
    _heard.append(caplog)


_heard: list[pytest.LogCaptureFixture] = []


def ingested(folder: Path, name: str = "out", **decoding: Any) -> tuple[DataSet, str]:
    """The data set of a folder, in shards of two images, and what was said."""
    _heard[-1].clear()
    config = IngestConfig(shard_images=2, decoding=DecodeConfig(**decoding))
    data_set = ingest(str(folder / "in"), str(folder / name), config)
    return data_set, "\n".join(_heard[-1].messages)


def put(folder: Path, name: str, image: npt.NDArray[Any], **options: Any) -> None:
    (folder / "in").mkdir(exist_ok=True)
    Image.fromarray(image).save(folder / "in" / name, **options)


def levels(data_set: DataSet) -> list[int]:
    """The red value of the first pixel of each image."""
    files = data_set.read(np.arange(data_set.num_images), ("image",)).column("image").to_pylist()
    return [int(decode(file)[0, 0, 0]) for file in files]


@pytest.mark.parametrize(("value", "what"), [(7.5, "all are 7.5"), (np.nan, "none is finite")])
def test_values_without_a_range_are_said_to_become_black(tmp_path: Path, value: float, what: str) -> None:
    put(tmp_path, "0.tif", np.full((4, 4), value, np.float32))
    data_set, said = ingested(tmp_path)
    assert levels(data_set) == [0]
    assert f"float values: {what}, and become 0, black" in said
    assert "Ingesting 1 image ..." in said


def test_one_range_for_all_frames_of_signed_and_float_values(tmp_path: Path) -> None:
    for i, value in enumerate((0.1, 0.2, 0.4, 0.0, 1.0)):
        put(tmp_path, f"{i}.tif", np.full((4, 4), value, np.float32))
    put(tmp_path, "a.tif", np.full((4, 4), -1000, np.int32))
    put(tmp_path, "b.tif", np.full((4, 4), 1000, np.int32))
    data_set, said = ingested(tmp_path)
    assert levels(data_set) == [26, 51, 102, 0, 255, 0, 255]
    assert (
        "5 images (the first: 0.tif) of float values: 0 to 1, the range of all of them, become 0 to 255; NaN"
        in said
    )
    assert "int32 values: -1000 to 1000, the range of all of them, become 0 to 255 (" in said
    assert "Ingesting 7 images ..." in said
    assert data_set.manifest.decoding["ranges"] == {"float": [0.0, 1.0], "int32": [-1000.0, 1000.0]}
    assert DataSet.open(str(tmp_path / "out")).manifest == data_set.manifest


def test_a_given_range(tmp_path: Path) -> None:
    for i, value in enumerate((0, 1000, 4000)):
        put(tmp_path, f"{i}.png", np.full((4, 4), value, np.uint16))
    data_set, said = ingested(tmp_path)
    assert levels(data_set) == [0, 4, 16]
    assert "the largest value found is 4000 (--range" in said
    assert "of them came out" not in said
    data_set, said = ingested(tmp_path, "ranged", range=(0.0, 4000.0))
    assert levels(data_set) == [0, 64, 255]
    assert "0 to 4000 become 0 to 255, as --range says" in said
    assert data_set.manifest.decoding["range"] == [0.0, 4000.0]


def test_a_background_and_its_change(tmp_path: Path) -> None:
    put(tmp_path, "a.png", np.zeros((4, 4, 4), np.uint8))
    data_set, said = ingested(tmp_path, background="#0a0b0c")
    assert levels(data_set) == [10]
    assert "1 image (the first: a.png) with transparent parts: put on #0a0b0c" in said
    assert "1 of them came out in one color" in said
    with pytest.raises(UserError, match="another --background"):
        ingested(tmp_path)


def test_pages_are_counted_or_become_images(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((4, 4), 50 * k, np.uint8)) for k in range(4)]
    put(tmp_path, "a.png", np.full((4, 4), 7, np.uint8))
    pages[0].save(_made(tmp_path / "in") / "b.tif", save_all=True, append_images=pages[1:])
    put(tmp_path, "c.png", np.full((4, 4), 9, np.uint8))
    data_set, said = ingested(tmp_path)
    assert levels(data_set) == [7, 0, 9]
    assert "1 file (the first: b.tif) with several pages or frames" in said
    assert "3 others left out" in said
    every, _ = ingested(tmp_path, "every", frames="all")
    assert levels(every) == [7, 0, 50, 100, 150, 9]
    assert every.read(np.arange(6), ("image",)).column("index").to_pylist() == list(range(6))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_ordinary_files_stay_as_they_are_and_bad_ones_are_listed(tmp_path: Path) -> None:
    ramp = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    put(tmp_path, "a.jpg", ramp, exif=_exif(6))
    put(tmp_path, "b.png", ramp)
    put(tmp_path, "large.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "in" / "page.jpg").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    data_set, _ = ingested(tmp_path, max_pixels=64)
    stored = data_set.read(np.arange(2), ("image",)).column("image").to_pylist()
    assert stored == [(tmp_path / "in" / name).read_bytes() for name in ("a.jpg", "b.png")]
    reasons = {row["path"]: row["reason"] for row in data_set.bad_images()}
    assert set(reasons) == {"large.png", "page.jpg"}
    assert "9 x 9 pixels" in reasons["large.png"]
    assert "web page" in reasons["page.jpg"]
    assert data_set.manifest.decoding["changed"] == {}


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif
