"""Folders of masks are left out, and classes that are called like masks are not."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_labels_folders_keeps_folders_beside_images(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "masks/1.png")
    assert set(labels(tmp_path, labels="folders").values()) == {"images", "masks"}
