"""Folders of masks are left out, and classes that are called like masks are not."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from raysl.ingestion import layout
from raysl.ingestion.found import LeftOut
from raysl.ingestion.listing import File, Survey
from tests.ingestion.reading import labels, opened, put


@pytest.mark.parametrize(
    "classes",
    [
        ("with_mask", "without_mask", "mask_weared_incorrect"),
        ("surgical mask", "n95"),
        ("white_label", "red"),
        ("no mask", "mask"),
    ],
)
@pytest.mark.parametrize("file", ["1.jpg", "{}_1.png"])
def test_classes_called_like_masks(tmp_path: Path, classes: tuple[str, ...], file: str) -> None:
    put(tmp_path, *(f"{name}/{file.format(name)}" for name in classes))
    assert set(labels(tmp_path).values()) == set(classes)


@pytest.mark.parametrize("mask", ["masks/{}.png", "masks/cat/{}.png", "train_masks/{}_mask.gif"])
def test_masks_are_named_after_their_images(tmp_path: Path, mask: str) -> None:
    for i in range(30):
        put(tmp_path, f"cat/{i}.jpg", f"dog/{i + 30}.jpg", mask.format(i))
    found, _ = opened(tmp_path)
    assert found.classes == {"cat": 30, "dog": 30}
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 30
    assert {"cat", "dog", mask.partition("/")[0]} == set(labels(tmp_path, labels="folders").values())


def test_masks_inside_class_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path, f"{name}/images/1.png", f"{name}/masks/1.png")
    assert labels(tmp_path) == {"cat/images/1.png": "cat", "dog/images/1.png": "dog"}
    assert len(labels(tmp_path, labels="folders")) == 4


@pytest.mark.parametrize("others", [("flickr", "phone"), ("beagle", "poodle"), ("video_frames", "img")])
@pytest.mark.parametrize("config", [{}, {"labels": "none"}])
def test_photos_beside_images_inside_class_folders_stay(
    tmp_path: Path, others: tuple[str, str], config: dict[str, Any]
) -> None:
    for name, folder in itertools.product(("cat", "dog"), ("images", *others)):
        put(tmp_path, *(f"{name}/{folder}/{i}.jpg" for i in range(3)))
    found, rows = opened(tmp_path, **config)
    assert len(rows) == 18
    assert not found.left_out.kinds
    put(tmp_path, *(f"cat/{folder}/0.png" for folder in ("masks", "heat", "thumbs")), "cat/aerial/7.png")
    found, rows = opened(tmp_path, **config)
    assert len(rows) == 19
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 3


@pytest.mark.parametrize(
    ("pattern", "split", "config"),
    [
        ("{}/{}/1.png", "", {"labels": "none"}),
        ("{}/lung/{}/1.png", "", {}),
        ("{}/lung/{}/1.png", "", {"labels": "none"}),
        ("{}/train/{}/1.png", "#train", {}),
    ],
)
@pytest.mark.parametrize("loose", [0, 9])
def test_masks_deeper_in_class_folders(
    tmp_path: Path, pattern: str, split: str, config: dict[str, Any], loose: int
) -> None:
    for name in ("cat", "dog"):
        put(tmp_path, *(pattern.format(name, kind) for kind in ("images", "masks")))
        if split and not loose:
            put(tmp_path, *(f"{name}/test/{kind}/2.png" for kind in ("images", "masks")))
    put(tmp_path, *(f"{i + 10}.png" for i in range(loose)))
    found, rows = opened(f"{tmp_path}{'' if loose else split}", **config)
    assert [row.path for row in rows if "/" in row.path] == [
        pattern.format(name, "images") for name in ("cat", "dog")
    ]
    assert len(rows) == 2 + loose
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 2


def test_masks_do_not_count_as_folders_without_labels(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{kind}/1.png" for name in ("cat", "dog") for kind in ("images", "masks/left")))
    found, _ = opened(tmp_path)
    assert "the folders inside class folders (2) give no labels" in found.labels
    put(tmp_path, "cat/depth/1.png")
    assert "as cat/images/1.png" in opened(tmp_path)[0].labels


def _calls(classes: int) -> int:
    """Return the number of calls of functions that the layout of some classes with masks takes."""
    kinds = ("images", "masks")
    files = [File(f"{name:05}/{kind}/1.png", 1, 1) for name in range(classes) for kind in kinds]
    survey, calls = Survey.of(files, lambda path: b""), itertools.count()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event.endswith("call"):
            next(calls)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = layout.recognize(survey, lambda splits: "", "auto", LeftOut())
        kept = [found.label(file.path) for file in files if "images" in file.path]
    finally:
        sys.setprofile(before)
    assert len(set(kept)) == classes
    return next(calls)


def test_the_work_grows_with_the_number_of_classes() -> None:
    """And not with its square."""
    assert _calls(400) < 5 * _calls(100)


def test_labels_folders_keeps_folders_beside_images(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "masks/1.png")
    assert set(labels(tmp_path, labels="folders").values()) == {"images", "masks"}
