"""Folders of image files: which layout is recognized, which labels and splits come out, and what is left out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raysl.errors import UserError
from raysl.ingestion import ingest, tables, tar
from raysl.ingestion.found import of_kind
from raysl.ingestion.listing import files_below
from raysl.ingestion.sources import ReadConfig, SourceLocation, UnitSize, open_source, read
from raysl.storage import Folder
from tests.ingestion.reading import SMALL, jpeg, labels, opened, put, refused, write_tar


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    put(tmp_path, "zebra/1.jpg", "zebra/0.PNG", "ape/5.jpeg", "ape/old/7.jpg", "ape/.hidden.jpg", ".git/x")
    (tmp_path / "empty").mkdir()
    found, rows = opened(tmp_path)
    assert found.classes == {"ape": 2, "zebra": 2}
    assert [(row.path, row.label) for row in rows] == [
        ("ape/5.jpeg", "ape"),
        ("ape/old/7.jpg", "ape"),
        ("zebra/0.PNG", "zebra"),
        ("zebra/1.jpg", "zebra"),
    ]
    assert found.labels.startswith("the first folder of each image, as ape/5.jpeg; the folders inside class")
    assert found.labels.endswith("inside class folders (1) give no labels")
    assert found.left_out.kinds["hidden files and folders"][0] == 2
    assert found.left_out.kinds["empty folders"] == (1, "empty")


def test_stray_files_beside_class_folders_are_left_out_and_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "ape/0.jpg", "ape/1.jpg", "zebra/1.jpg", "overview.jpg", "__MACOSX/ape/._0.jpg")
    put(tmp_path, "README", "ape/notes.txt", "list.csv", "all.tar.gz", "b.zip", "metadata.parquet", data=b"x")
    (tmp_path / "metadata.parquet").unlink()
    found, rows = opened(tmp_path)
    assert [row.path for row in rows] == ["ape/0.jpg", "ape/1.jpg", "zebra/1.jpg"]
    assert found.left_out.kinds == {
        "hidden files and folders": (1, "__MACOSX"),
        "images beside the class folders": (1, "overview.jpg"),
        "files of unknown kind": (1, "README"),
        "archives": (2, "all.tar.gz"),
        "tables": (1, "list.csv"),
        "text files": (1, "ape/notes.txt"),
    }


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a.jpg", "b.jpg"], "all images lie in one folder, as a.jpg"),
        (["a.jpg", "x/b.jpg"], "1 image lies beside the folders"),
        (["images/a.jpg", "images/b.jpg"], "the only folder is called 'images'"),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png"], "the only folder is called 'JPEGImages'"),
    ],
)
def test_images_without_labels_are_told_why(tmp_path: Path, names: list[str], why: str) -> None:
    put(tmp_path, *names)
    found, rows = opened(tmp_path)
    assert not found.classes
    assert all(row.label is None for row in rows)
    assert why in found.labels


@pytest.mark.parametrize("layout", ["", "Data/CLS-LOC/", "birds/birds/"])
def test_splits_and_what_lies_beside_them(tmp_path: Path, layout: str) -> None:
    for split in ("train", "val2017"):
        put(tmp_path, f"{layout}{split}/cat/{split}.jpg", f"{layout}{split}/dog/{split}.jpg")
    put(tmp_path, f"{layout}annotations/train.csv", f"{layout}__MACOSX/x", data=b"a,b\n")
    put(tmp_path, f"{layout}samples/1.jpg", f"{layout}stray.jpg")
    if not layout:
        said = refused(tmp_path)
        assert "holds several splits: train, val2017" in said
        assert said.endswith("#train'.")
    assert labels(f"{tmp_path}#train") == {
        f"{layout}train/cat/train.jpg": "cat",
        f"{layout}train/dog/train.jpg": "dog",
    }
    found, _ = opened(f"{tmp_path}#val2017")
    assert found.splits == ("train", "val2017")
    assert found.left_out.kinds["images in folders beside the splits"] == (1, f"{layout}samples/1.jpg")
    assert found.left_out.kinds["images beside the splits"] == (1, f"{layout}stray.jpg")
    assert "no split 'test'" in refused(f"{tmp_path}#test")
    assert "Did you mean 'val2017'?" in refused(f"{tmp_path}#val")
    assert "Did you mean 'train'?" in refused(f"{tmp_path}#trian")
    assert "names no split behind its '#'" in refused(f"{tmp_path}#")


def test_folders_that_only_end_like_splits_are_splits_together(tmp_path: Path) -> None:
    put(tmp_path, "seg_train/sea/1.jpg", "seg_test/sea/2.jpg")
    assert labels(f"{tmp_path}#seg_test") == {"seg_test/sea/2.jpg": "sea"}
    put(tmp_path / "b", "bullet_train/1.jpg", "bicycle/2.jpg")
    assert set(labels(tmp_path / "b").values()) == {"bullet_train", "bicycle"}


@pytest.mark.parametrize(("outer", "split"), [(("holdout", "train"), ""), (("fold_0", "fold_1"), "train/")])
def test_class_folders_with_the_same_folders_inside_are_told(
    tmp_path: Path, outer: tuple[str, ...], split: str
) -> None:
    ends = ("", "test/") if split else ("",)
    put(
        tmp_path,
        *(f"{at}/{end or split}{name}/1.jpg" for at in outer for end in ends for name in ("cat", "dog")),
    )
    found, _ = opened(f"{tmp_path}#train" if split else tmp_path)
    assert (
        "Every class folder holds the same folders (cat, dog): if these are the classes, give one"
        in found.labels
    )
    assert found.labels.endswith(f"such as {outer[0]}")
    assert {*labels(f"{tmp_path / outer[0]}{split and '#train'}").values()} == {"cat", "dog"}
    put(tmp_path, f"{outer[0]}/{split}bird/1.jpg")
    assert "same folders" not in opened(f"{tmp_path}#train" if split else tmp_path)[0].labels


def test_splits_inside_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg")
    assert "test, train" in refused(tmp_path)
    assert labels(f"{tmp_path}#test") == {"cat/test/2.jpg": "cat", "dog/test/4.jpg": "dog"}
    put(tmp_path, "dog/ground_truth/bad/4_mask.png")  # As in MVTec AD.
    found, rows = opened(f"{tmp_path}#test")
    assert [row.path for row in rows] == ["cat/test/2.jpg", "dog/test/4.jpg"]
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["train/train/a/0.jpg", "train/train/b/1.jpg", "test/test/a/2.jpg"],
            {"train/train/a/0.jpg": "a", "train/train/b/1.jpg": "b"},
        ),
        (["train/a/0.jpg", "test/0.jpg"], {"train/a/0.jpg": "a"}),
        (["trainA/0.jpg", "trainB/1.jpg", "testA/2.jpg", "train/3.jpg"], {"train/3.jpg": None}),
    ],
)
def test_one_split_is_read(tmp_path: Path, names: list[str], expected: dict[str, str | None]) -> None:
    put(tmp_path, *names)
    assert labels(f"{tmp_path}#train") == expected


def test_what_systems_and_editors_leave_behind(tmp_path: Path) -> None:
    put(tmp_path, "a/0.jpg", "b/1.jpg", "@eaDir/0.jpg", "$RECYCLE.BIN/0.jpg", "a/0.jpg~")
    put(tmp_path, "System Volume Information/0.jpg")
    found, rows = opened(tmp_path)
    assert [row.path for row in rows] == ["a/0.jpg", "b/1.jpg"]
    assert found.left_out.kinds["hidden files and folders"][0] == 4


def test_masks_and_thumbnails_of_images_that_lie_beside_them(tmp_path: Path) -> None:
    put(tmp_path, *(f"a/{name}.png" for name in ("0", "0_mask", "1", "1_mask", "1_mask_2", "with_mask")))
    put(tmp_path, "b/2.jpg", "thumbnails/2.jpg")
    found, rows = opened(tmp_path)
    assert [row.path for row in rows] == ["a/0.png", "a/1.png", "a/with_mask.png", "b/2.jpg"]
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 4
    assert len(opened(tmp_path, labels="folders")[1]) == 8


def test_tiny_imagenet(tmp_path: Path) -> None:
    put(tmp_path, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "test/images/t_0.JPEG")
    put(tmp_path, "train/n01/n01_boxes.txt", "wnids.txt", data=b"n01\n")
    put(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    table = b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    put(tmp_path, "val/val_annotations.txt", data=table)
    assert set(labels(f"{tmp_path}#train").values()) == {"n01", "n02"}
    assert labels(f"{tmp_path}#val") == {"val/images/val_0.JPEG": "n02", "val/images/val_1.JPEG": "n01"}
    assert labels(f"{tmp_path}#test") == {"test/images/t_0.JPEG": None}


def test_ilsvrc(tmp_path: Path) -> None:
    root = "ILSVRC/Data/CLS-LOC/"
    put(tmp_path / root, "train/n1/a.JPEG", "train/n2/b.JPEG", "val/c.JPEG", "val/d.JPEG")
    put(tmp_path, "ILSVRC/Annotations/CLS-LOC/val/c.xml", data=b"<annotation/>")
    assert set(labels(f"{tmp_path}#train").values()) == {"n1", "n2"}
    found, rows = opened(f"{tmp_path}#val")
    assert [row.path for row in rows] == [f"{root}val/c.JPEG", f"{root}val/d.JPEG"]
    assert "all images lie in one folder" in found.labels


@pytest.mark.parametrize(
    ("image", "mask", "note"),
    [
        ("{voc}JPEGImages/{}.jpg", "{voc}SegmentationClass/{}.png", "{voc}Annotations/{}.xml"),
        ("images/{}.jpg", "masks/{}.png", "labels/{}.txt"),
        ("train/images/{}.jpg", "", "train/labels/{}.txt"),
        ("images/train/{}.jpg", "", "labels/train/{}.txt"),
        ("train2017/{}.jpg", "", "annotations/instances_train2017.json"),
    ],
    ids=["VOC", "masks", "YOLO by split", "YOLO", "COCO"],
)
def test_layouts_with_several_objects_in_an_image(tmp_path: Path, image: str, mask: str, note: str) -> None:
    voc = "VOCdevkit/VOC2012/"
    for i in range(2):
        put(tmp_path, image.format(i, voc=voc), *([mask.format(i, voc=voc)] if mask else []))
        put(tmp_path, note.format(i, voc=voc), data=b"1 .5 .5 1 1")
    found, rows = opened(tmp_path)
    assert [row.path for row in rows] == [image.format(i, voc=voc) for i in range(2)]
    assert not found.classes
    assert "any number of objects in an image" in found.labels
    assert ("masks or other pictures of the same images" in found.left_out.kinds) == bool(mask)


def test_classes_beside_folders_of_masks(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/1.jpg", "masks/1.png", "annotations/trimaps/1.png")
    found, rows = opened(tmp_path)
    assert [row.label for row in rows] == ["cat", "dog"]
    assert found.left_out.kinds["masks or other pictures of the same images"][0] == 2


def test_img2dataset_as_files(tmp_path: Path) -> None:
    for part in ("00000", "00001"):
        put(tmp_path, f"{part}/{part}0000.jpg")
        put(tmp_path, f"{part}/{part}0000.txt", f"{part}/{part}0000.json", data=b"{}")
    found, rows = opened(tmp_path)
    assert len(rows) == 2
    assert "numbered parts with a text for each image" in found.labels


def test_hugging_face_metadata(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "train/b.jpg", "train/deep/c.jpg", "test/d.jpg")
    put(tmp_path, "train/metadata.csv", data=b"file_name,label\nb.jpg,cat\na.jpg,dog\ndeep/c.jpg,cat\n")
    put(tmp_path, "test/metadata.jsonl", data=b'{"file_name": "d.jpg", "text": "a dog"}\n')
    assert labels(f"{tmp_path}#train") == {
        "train/a.jpg": "dog",
        "train/b.jpg": "cat",
        "train/deep/c.jpg": "cat",
    }
    found, _ = opened(f"{tmp_path}#test")
    why = "no column of test/metadata.jsonl is named like a label; its columns are file_name, text"
    assert why in found.labels
    assert labels(f"{tmp_path}#test", label_column="text") == {"test/d.jpg": "a dog"}
    put(tmp_path, "train/e.jpg")
    found, _ = opened(f"{tmp_path}#train")
    assert not found.classes
    assert "train/e.jpg has an image without one" in found.labels


@pytest.mark.parametrize(
    ("table", "found_labels"),
    [
        ("file_name;label\n./0.jpg;a\n1.jpg; b\n", ["a", "b"]),
        ("image_file_name,label\n0.jpg,a\n1.jpg,b\n", ["a", "b"]),
        ("name,label\n0.jpg,a\n1.jpg,b\n", "has no column file_name; its columns are name, label"),
        ("file_name,label\n0.jpg,a\n0.jpg,b\n1.jpg,b\n", "names 0.jpg as 'a' and as 'b'"),
    ],
)
def test_tables_of_labels_beside_images(tmp_path: Path, table: str, found_labels: list[str] | str) -> None:
    put(tmp_path, "0.jpg", "1.jpg")
    put(tmp_path, "metadata.csv", data=table.encode())
    found, rows = opened(tmp_path)
    if isinstance(found_labels, str):
        assert found_labels in found.labels
        assert not found.classes
    else:
        assert [row.label for row in rows] == found_labels


def test_tables_of_labels_are_checked(tmp_path: Path) -> None:
    put(tmp_path, "a/images/0.jpg", "b/0.jpg", "c/0.jpg")
    put(tmp_path, "a/val_annotations.txt", data=b"0.jpg\n")
    assert "val_annotations.txt has one column" in opened(tmp_path / "a")[0].labels
    put(tmp_path, "b/metadata.csv", data=b"file_name,label, label\n0.jpg,1,2\n")
    assert "several columns called 'label'" in refused(tmp_path / "b")
    columns = {"file_name": ["0.jpg"], "label": ["cat"]}
    table = pa.table({name: pa.array(values, pa.string_view()) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "c" / "metadata.parquet")
    assert labels(tmp_path / "c") == {"0.jpg": "cat"}


def test_rows_of_a_table_without_a_file_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "0.jpg")
    put(tmp_path, "metadata.csv", data=b"file_name,label\n0.jpg,a\ngone.jpg,b\n")
    assert opened(tmp_path)[0].left_out.kinds["labels of files that are not there"] == (1, "gone.jpg")


@pytest.mark.parametrize("name", ["train.csv", "labels.jsonl"])
def test_a_table_that_may_hold_labels_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, "0.jpg")
    put(tmp_path, name, data=b"x")
    assert f"If {name} holds labels, give that table as the source" in opened(tmp_path)[0].labels


@pytest.mark.parametrize("folder", ["jpg", "img_align_celeba", "train_images", "my-photos"])
def test_a_folder_that_is_called_after_its_files_is_no_class(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"x/{folder}/0.jpg", f"x/{folder}/1.jpg")
    assert opened(tmp_path)[0].classes == {}


@pytest.mark.parametrize("masks", ["gtFine", "train_masks", "depth", "image-labels", "SegmentationClassAug"])
def test_folders_of_masks_are_no_classes(tmp_path: Path, masks: str) -> None:
    put(tmp_path, "cat/0.jpg", "dog/1.jpg", f"{masks}/0.png")
    found, _ = opened(tmp_path)
    assert found.classes == {"cat": 1, "dog": 1}
    assert found.left_out.kinds["masks or other pictures of the same images"] == (1, f"{masks}/0.png")


def test_a_split_in_another_case(tmp_path: Path) -> None:
    put(tmp_path, "Train/a/0.jpg", "Test/a/1.jpg")
    assert labels(f"{tmp_path}#train") == {"Train/a/0.jpg": "a"}


def test_labels_as_the_user_says(tmp_path: Path) -> None:
    put(tmp_path, "images/1.jpg", "extra/1.jpg", "a.jpg", "b.jpg")
    assert set(labels(tmp_path, labels="folders").values()) == {"images", "extra"}
    put(tmp_path / "c", "cat/1.jpg", "dog/1.jpg")
    assert set(labels(tmp_path / "c", labels="none").values()) == {None}


def test_files_without_a_telling_name_are_looked_at(tmp_path: Path) -> None:
    put(tmp_path, "f00d", "beef.jpg_large")
    put(tmp_path, "README", "x.unknown", data=b"words")
    found, rows = opened(tmp_path)
    assert [(row.path, row.image) for row in rows] == [("beef.jpg_large", jpeg()), ("f00d", jpeg())]
    assert found.left_out.kinds == {"files of unknown kind": (2, "README")}


def test_a_folder_without_images_is_told_what_it_holds(tmp_path: Path) -> None:
    assert "holds no images. It holds nothing" in refused(tmp_path)
    put(tmp_path, "a.txt", "b.txt", "c.wav", data=b"x")
    said = refused(tmp_path)
    assert "It holds 2 text files (a.txt); 1 audio file (c.wav). A source is one of" in said
    assert len(said) < 500 + len(str(tmp_path))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(folder)
    with open(os.path.join(folder, b"na\xefve.jpg"), "wb") as file:
        file.write(jpeg())
    put(tmp_path, "tea/1.jpg")
    found, rows = opened(tmp_path)
    assert [row.path for row in rows] == [r"caf\xe9/na\xefve.jpg", "tea/1.jpg"]
    assert [row.image for row in rows] == [jpeg(), jpeg()]
    assert r"caf\xe9 1" in found.table("x")
    said = refused(os.fsdecode(folder))
    assert f"'{tmp_path}/caf\\\\xe9' is not in UTF-8" in said
    assert said.endswith("Rename it.")


@pytest.mark.parametrize("name", [b"\xff.tar", b"\xff.parquet"])
def test_archives_and_tables_whose_names_are_not_utf_8_are_refused(tmp_path: Path, name: bytes) -> None:
    write_tar(tmp_path / "a.tar", {"cat/1.jpg": jpeg()})
    (tmp_path / "a.tar").rename(tmp_path / os.fsdecode(name))
    assert "is not in UTF-8" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a b", "50%", "c#", "d%20e", "é" * 100, "x" * 250])
def test_unusual_names_and_file_uris(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/1.jpg")
    assert labels(tmp_path) == {f"{name}/1.jpg": name}
    assert len(labels(tmp_path / name)) == 1
    assert labels((tmp_path / name).as_uri()) == labels(tmp_path / name)


def test_names_that_no_file_system_takes() -> None:
    assert "NUL" in refused("a\0b")
    assert "Cannot read" in refused("x" * 5000)


def test_folders_that_raysl_made_are_no_sources(tmp_path: Path) -> None:
    run, made = tmp_path / "run", tmp_path / "set"
    put(run / "features", "part.parquet", data=b"")
    record = {"config": {}, "data": {"uri": "/data/photos"}, "sessions": []}
    put(run, "metadata.json", data=json.dumps(record).encode())
    says = "is a run and no images: give a source of images or a data set, such as '/data/photos'"
    assert says in refused(run)
    ingest("shapes:3", str(made))
    assert "is a data set of raysl already" in refused(f"{made}#train")
    assert f"holds no images but several data sets of raysl; give one of them: {made}." in refused(tmp_path)
    # Other files of these names say nothing.
    put(tmp_path / "in", "a/0.jpg")
    put(tmp_path / "in", "metadata.json", "manifest.json", data=b"[1]")
    assert len(opened(tmp_path / "in")[1]) == 1


def test_counts_of_one_are_singular() -> None:
    said = {kind: of_kind(kind, 1) for kind in ("links that lead nowhere", "pipes, sockets and devices")}
    assert list(said.values()) == ["1 link that leads nowhere", "1 pipe, socket or device"]
    assert of_kind("hidden files and folders", 1) == "1 hidden file or folder"
    assert of_kind("images in formats that are not read", 1) == "1 image in formats that are not read"
    assert of_kind("links that lead nowhere", 2) == "2 links that lead nowhere"


def test_links(tmp_path: Path) -> None:
    put(tmp_path / "store", "1.jpg", "2.jpg")
    source = tmp_path / "in"
    put(source, "a/0.jpg")
    os.symlink(source / "a" / "0.jpg", source / "a" / "again.jpg")
    os.symlink(source, source / "a" / "loop")
    os.symlink(source / "gone.jpg", source / "a" / "gone.jpg")
    found, rows = opened(source)
    assert [row.path for row in rows] == ["a/0.jpg", "a/again.jpg"]
    assert found.left_out.kinds == {
        "links to folders that are read already": (1, "a/loop"),
        "links that lead nowhere": (1, "a/gone.jpg"),
    }
    os.symlink(tmp_path / "store", source / "b")
    message = refused(source)
    assert "1 link out of the source" in message
    assert "'b' to" in message
    assert "--follow-links" in message
    assert len(opened(source, follow_links=True)[1]) == 4


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found, rows = opened(tmp_path)
    assert len(rows) == 1
    assert found.left_out.kinds == {"pipes, sockets and devices": (1, "pipe.jpg")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "b").chmod(0)
    assert "b' may not be read" in refused(tmp_path)
    (tmp_path / "b").chmod(0o700)


def test_units_keep_to_count_and_bytes(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.jpg" for i in range(5)), data=bytes(100))
    source = open_source(SourceLocation.parse(str(tmp_path))).source
    assert [unit.num_images for unit in source.units(UnitSize(2, 1000))] == [2, 2, 1]
    assert [unit.num_images for unit in source.units(UnitSize(10, 250))] == [2, 2, 1]
    assert [unit.num_images for unit in source.units(UnitSize(10, 10))] == [1] * 5


def test_a_uri_reads_like_a_path(tmp_path: Path) -> None:
    put(tmp_path, "a b/é.jpg", "c/1.jpg")
    assert opened(tmp_path)[1] == opened(f"local://{tmp_path}")[1]


def test_the_stamp_changes_with_the_images(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.txt")

    def stamp() -> str:
        return open_source(SourceLocation.parse(str(tmp_path))).source.stamp()

    before = stamp()
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    assert stamp() == before
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert stamp() != before


def test_a_file_that_vanished_is_a_row_with_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    one = open_source(SourceLocation.parse(str(tmp_path)))
    (unit,) = one.source.units(SMALL)
    (tmp_path / "a.jpg").unlink()
    (row,) = read(one.kind, unit)
    assert row.image is None
    assert row.reason == "does not exist"


def test_the_table_of_what_was_found(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg")
    put(tmp_path, "train/cat/notes.txt", data=b"x")
    found, _ = opened(f"{tmp_path}#train")
    assert found.table("photos#train") == "\n".join(
        [
            "  source    photos#train",
            "  layout    class folders in the split 'train'",
            "  split     train  (not read: test)",
            "  images    3 in 2 classes: cat 2, dog 1",
            "  labels    the folder of each image, as train/cat/1.jpg",
            "  left out  1 text file, as train/cat/notes.txt",
        ]
    )


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "birds/1.jpg")
    monkeypatch.setenv("RAYSL_DATA", str(tmp_path))
    assert SourceLocation.parse("birds#train") == SourceLocation(str(tmp_path / "birds"), "train")
    assert SourceLocation.parse("shapes:10").uri == "shapes:10"
    with pytest.raises(UserError, match="configuration says"):
        SourceLocation.parse("shapes:10#train", "test")
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_files_are_read_without_torch_which_takes_600_mb(tmp_path: Path) -> None:
    put(tmp_path, "ape/0.jpg")
    program = (
        "import sys\n"
        "from raysl.ingestion import pipeline, shard\n"
        "from raysl.ingestion.sources import SourceLocation, UnitSize, open_source, read\n"
        f"opened = open_source(SourceLocation.parse({str(tmp_path)!r}))\n"
        "units = list(opened.source.units(UnitSize(9, 9999)))\n"
        "assert len(list(read(opened.kind, units[0]))) == 1\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_store_that_fails_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Folder(f"memory://{tmp_path}")
    place.write("a.csv", b"image,label\nx.png,cat\n")
    place.write("b.tar", b"an archive")
    for name in ("find", "open"):
        method, turns = getattr(MemoryFileSystem, name), itertools.count()

        def every_second(*given: Any, method: Any = method, turns: Any = turns, **named: Any) -> Any:
            if next(turns) % 2 == 0:
                raise OSError("Couldn't connect to server")
            return method(*given, **named)

        monkeypatch.setattr(MemoryFileSystem, name, every_second)
    assert [file.path for file in files_below(str(place))] == ["a.csv", "b.tar"]
    with tables.opened(str(place), "a.csv") as table:
        assert len(table.groups) == 1
    with tar.opened(str(place), "b.tar") as (stream, kind):
        assert (stream.read(), kind) == (b"an archive", "")


def test_accents_apart_from_their_letters_are_the_same_names(tmp_path: Path) -> None:
    """As on a Mac: a folder's class, and the files that tables beside the images and lists of images name."""
    together, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (together, apart):
        root = tmp_path / ascii(name).strip("'").replace("\\", "")
        put(root, f"{name}/{name}.jpg", "tea/1.jpg")
        dataset = ingest(str(root), str(tmp_path / f"set-{root.name}"))
        assert dataset.manifest.classes == (together, "tea")
        assert dataset.labels().tolist() == [0, 1]
        other = apart if name == together else together
        put(root / "flat", f"{name}.jpg")
        (root / "flat/metadata.csv").write_text(f"file_name,label\n{other}.jpg,a\n")
        (root / "flat/list.csv").write_text(f"file_name,label\n{other}.jpg,b\n")
        for source, label in (("flat", "a"), ("flat/list.csv", "b")):
            found, (row,) = opened(root / source)
            assert (row.label, row.reason) == (label, "")
            assert "labels of files that are not there" not in found.left_out.kinds


@pytest.mark.parametrize("config", [ReadConfig(label_column="kind"), ReadConfig(image_column="kind")])
def test_a_column_of_which_nothing_is_read_is_refused(tmp_path: Path, config: ReadConfig) -> None:
    put(tmp_path, "ape/0.jpg", "zebra/1.jpg")
    with pytest.raises(
        UserError, match="-column 'kind' names a column of a table, and no such column is read"
    ):
        open_source(SourceLocation(str(tmp_path), config=config))


def test_a_table_of_labels_that_names_no_file_here_is_named(tmp_path: Path) -> None:
    put(tmp_path, "images/1.jpg")
    put(tmp_path, "metadata.csv", data=b"file_name,label\n1.jpg,cat\n")
    found, _ = opened(tmp_path)
    assert "It names 1.jpg, which is not there" in found.labels
    assert labels(tmp_path / "metadata.csv") == {"images/1.jpg": "cat"}
