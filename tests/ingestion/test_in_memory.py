"""Images in memory as sources: their pixels and labels arrive, and what is no image is named."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import datasets

import raysl
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion import in_memory, ingest, objects
from raysl.ingestion.sources import UnitSize
from raysl.stream.decode import decode
from tests.ingestion.reading import jpeg

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
LABELS = [1, 0, 2, 1, 0]


def pixels(made: DataSet) -> NDArray[np.uint8]:
    """Pixels of all images, (n, h, w, 3)."""
    files = made.read(np.arange(made.num_images), ("image",))["image"].to_pylist()
    return np.stack([decode(file).permute(1, 2, 0).numpy() for file in files])


class Photos(Dataset[Any]):
    """A data set as those of torchvision."""

    classes = ("cat", "ape", "dog")

    def __init__(self, change: Callable[[Image.Image], Any] = lambda image: image) -> None:
        self.change = change

    def __len__(self) -> int:
        return len(RGB)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        return self.change(Image.fromarray(RGB[index])), LABELS[index], "more"


def tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images.copy())


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (RGB, "an array of 5 images", RGB),
        (GRAY, "an array of 5 images", GRAY[..., None]),
        (GRAY[..., None], "an array of 5 images", GRAY[..., None]),
        (tensor(RGB).permute(0, 3, 1, 2), "a tensor of 5 images", RGB),
        (tensor(GRAY), "a tensor of 5 images", GRAY[..., None]),
        (list(RGB), "a list of 5 images", RGB),
        (list(GRAY), "a list of 5 images", GRAY[..., None]),
        ([tensor(one).permute(2, 0, 1) for one in RGB], "a list of 5 images", RGB),
        ([Image.fromarray(one) for one in RGB], "a list of 5 images", RGB),
        ([Image.fromarray(one) for one in GRAY], "a list of 5 images", GRAY[..., None]),
    ],
)
def test_the_pixels_of_images_in_memory_arrive(tmp_path: Path, source: Any, name: str, expected: Any) -> None:
    made = ingest(source, str(tmp_path / "out"))
    np.testing.assert_array_equal(pixels(made), np.broadcast_to(expected, RGB.shape))
    assert (made.manifest.source, made.has_labels) == (name, False)
    assert made.paths() == [f"item {number}" for number in range(5)]
    assert made.folder.list() == ["manifest.json", "shards"]


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        (RGB, np.array(LABELS)),
        ((RGB, LABELS), None),
        ((tensor(RGB).permute(0, 3, 1, 2), torch.tensor(LABELS)), None),
        (list(RGB), torch.tensor(LABELS)),
        (list(zip(map(Image.fromarray, RGB), LABELS, strict=True)), None),
        ([(one, np.int64(label)) for one, label in zip(RGB, LABELS, strict=True)], None),
        ([(one, torch.tensor(label)) for one, label in zip(RGB, LABELS, strict=True)], None),
    ],
)
def test_labels_of_images_in_memory(tmp_path: Path, source: Any, labels: Any) -> None:
    made = raysl.ingest(source, tmp_path / "out", labels=labels)
    assert (made.labels().tolist(), made.manifest.classes) == (LABELS, ("0", "1", "2"))
    np.testing.assert_array_equal(pixels(made), RGB)


def test_a_data_set_of_torch_names_its_classes(tmp_path: Path) -> None:
    for source, expected in ((Photos(), [0, 1, 2, 3, 4]), (Subset(Photos(), [3, 1]), [3, 1])):
        made = ingest(source, str(tmp_path / str(len(expected))))
        assert made.manifest.classes == ("cat", "ape", "dog")
        assert made.labels().tolist() == [LABELS[number] for number in expected]
        np.testing.assert_array_equal(pixels(made), RGB[expected])
    assert made.manifest.source == "torch.Subset of 2 items"


def test_the_image_folder_of_torchvision(tmp_path: Path) -> None:
    for number, label in enumerate(LABELS):
        folder = tmp_path / "in" / Photos.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB[number]).save(folder / f"{number}.png")
    made = ingest(datasets.ImageFolder(tmp_path / "in"), str(tmp_path / "out"))
    assert made.manifest.source == "torchvision.ImageFolder of 5 items"
    assert (made.manifest.classes, made.labels().tolist()) == (("ape", "cat", "dog"), [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(pixels(made), RGB[[0, 3, 1, 4, 2]])


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    source = Photos()
    source.classes = (["crane", "bird"], "dog", ("crane", "bird"))  # type: ignore[assignment]
    made = ingest(source, str(tmp_path / "out"))
    assert made.manifest.classes == ("crane, bird (0)", "dog", "crane, bird (2)")


def test_images_of_classes_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ingest((RGB, LABELS), str(tmp_path / "whole"))
    monkeypatch.setattr(in_memory, "_PIECE", UnitSize(2, 1 << 20))
    for number, source in enumerate([(RGB, LABELS), list(zip(RGB, LABELS, strict=True))]):
        made = ingest(source, str(tmp_path / str(number)))
        assert made.manifest.fingerprint == whole.manifest.fingerprint
        assert made.paths() == whole.paths()


def test_a_long_data_set_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(in_memory, "_PIECE", UnitSize(2, 1 << 20))
    monkeypatch.setattr(objects, "_LINE_EVERY_S", -1.0)
    with caplog.at_level("INFO", "raysl.ingestion"):
        ingest(Photos(), str(tmp_path / "out"))
    told = [text for text in caplog.messages if text.startswith("Reading ") and "Photos of 5 items: " in text]
    assert [text.partition("items: ")[2].partition(" images")[0] for text in told] == ["2", "4", "5"]


def test_a_file_that_is_not_decoded_yet_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(70))
    drafted = Image.open(tmp_path / "a.jpg")
    drafted.draft("L", (8, 8))
    changed = Image.open(tmp_path / "a.jpg")
    changed.putpixel((0, 0), (255, 0, 0))
    made = ingest([Image.open(tmp_path / "a.jpg"), jpeg(3), drafted, changed], str(tmp_path / "out"))
    files = made.read(np.arange(4), ("image",))["image"].to_pylist()
    assert files[:2] == [jpeg(70), jpeg(3)]
    assert all(file.startswith(b"\x89PNG") for file in files[2:])
    assert decode(files[3])[:, 0, 0].tolist() == [255, 0, 0]


def test_an_image_with_damaged_notes_is_taken_with_its_changes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0damaged")
    changed = Image.open(tmp_path / "a.png")
    changed.putpixel((0, 0), (255, 0, 0))
    made = ingest([Image.open(tmp_path / "a.png"), changed], str(tmp_path / "out"))
    assert pixels(made)[:, 0, 0, 0].tolist() == [0, 255]


def test_images_of_other_modes_are_converted_as_files_are(tmp_path: Path) -> None:
    modes: list[tuple[str, Any]] = [
        ("I;16", 51 * 257),
        ("RGBA", (51, 51, 51, 255)),
        ("LA", (51, 255)),
        ("P", 51),
    ]
    made = ingest([Image.new(mode, (4, 4), value) for mode, value in modes], str(tmp_path / "out"))
    assert (pixels(made)[:3] == 51).all()
    transparent = ingest([Image.new("RGBA", (4, 4))], str(tmp_path / "transparent"))
    assert (pixels(transparent) == 255).all()


def test_the_same_images_again_are_found_and_others_refused(tmp_path: Path) -> None:
    dest = str(tmp_path / "out")
    made = ingest((RGB, LABELS), dest)
    again = ingest((RGB.copy(), list(LABELS)), dest)
    assert again.manifest == made.manifest
    assert again.folder.list() == ["labels.parquet", "manifest.json", "shards"]
    for other in ((255 - RGB, LABELS), (RGB, LABELS[::-1]), RGB):
        with pytest.raises(UserError, match="another source of the same name, 'an array of 5 images'"):
            ingest(other, dest)
    assert again.folder.list() == ["labels.parquet", "manifest.json", "shards"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (RGB / 255, r"^The source is an array of type float64 .*: give uint8 .*round\(\)\.astype\('uint8'\)"),
        (
            tensor(RGB).permute(0, 3, 1, 2) / 255,
            r"a tensor of type torch\.float32 .*to\(torch\.uint8\).* ToTensor",
        ),
        (RGB.astype(np.uint16), "of type uint16 .*: give uint8"),
        (tensor(RGB), r"shape \(5, 8, 9, 3\): give .* channels first"),
        (RGB[0], r"\(8, 9, 3\), which is one image"),
        (GRAY[0], r"\(8, 9\), which is one image"),
        (RGB[:0], "is empty"),
        ([RGB[0], RGB[1] / 255], r"^Item 1 of a list of 2 images is an array of type float64"),
        ([RGB[0], RGB], r"^Item 1 of a list of 2 images is an array of type uint8 and shape \(5,"),
        ([RGB[0], "a.jpg"], "^Item 1 of a list of 2 images is a path, and item 0 is an image"),
        (
            [(RGB[0], 1), (RGB[1], 0.5)],
            "^Item 1 of a list of 2 images has the label 0.5, which holds fractions",
        ),
        ([(RGB[0], [1, 2])], "has the label .*several values"),
        ([(RGB[0], Image.new("L", (3, 3)))], "which is an image and no class"),
        ([RGB[0], (RGB[1], 1)], "^Item 1 of a list of 2 images holds a label, and item 0 none"),
        ((RGB, [1, 2]), "^labels= holds 2 labels for an array of 5 images"),
        (
            Photos(lambda image: torch.from_numpy(np.array(image)) / 255),
            "^Item 0 of .*Photos of 5 items is a tensor",
        ),
        (Photos(lambda image: image.seek(3)), "^Item 0 of .*Photos.* cannot be read: EOFError"),
        (Photos(lambda image: {"image": image}), "is of the type dict. Each item must be an image"),
        (Photos, "is of the type builtins.type. Give a path, an array"),
        (iter(RGB), "Give a path, an array"),
        (io.BytesIO(), "Give a path, an array"),
        (Image.new("L", (3, 3)), "Give a path, an array"),
    ],
)
def test_what_is_no_image_is_named_and_nothing_is_written(tmp_path: Path, source: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ingest(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_labels_are_given_once(tmp_path: Path) -> None:
    for source, says in (
        (list(zip(RGB, LABELS, strict=True)), "^Item 0 of .* holds a label, and labels= is given too"),
        (str(tmp_path), "a source that is a path"),
    ):
        (tmp_path / "a.jpg").write_bytes(jpeg())
        with pytest.raises(UserError, match=says):
            raysl.ingest(source, tmp_path / "out", labels=LABELS)
    none = raysl.ingest([(RGB[0], {"boxes": 3})], tmp_path / "none", labels="none")
    assert not none.has_labels
