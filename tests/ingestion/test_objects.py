"""Python objects as sources: lists of files, Hugging Face datasets and Ray Datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torch.utils.data import Subset

from raysl.errors import UserError
from raysl.ingestion import IngestConfig, ingest, pipeline
from raysl.stream.decode import decode
from tests.ingestion.reading import jpeg, put


def test_a_list_of_files(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    files = [str(tmp_path / name) for name in ("b.jpg", "a.jpg")]
    plain = ingest(files, str(tmp_path / "plain"))
    assert plain.paths() == files
    assert plain.manifest.source == "a list of 2 files"
    assert ingest(files[:1], str(tmp_path / "one")).manifest.source == "a list of 1 file"
    assert not plain.has_labels
    labeled = ingest([(Path(files[0]), 1), (files[1], 0)], str(tmp_path / "labeled"))
    assert labeled.labels().tolist() == [1, 0]
    assert labeled.folder.list() == ["labels.parquet", "manifest.json", "shards"]


class Files(list[Any]):
    """A data set of torch of files and the numbers of their classes."""

    classes = ("cat", "ape", "dog")


def test_a_data_set_of_files_names_its_classes(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    for number, source in enumerate(
        (
            Files([(tmp_path / "b.jpg", 2, "more"), (str(tmp_path / "a.jpg"), np.int64(0), "more")]),
            Subset(Files([(tmp_path / "b.jpg", 2), (tmp_path / "a.jpg", 0)]), [0, 1]),  # type: ignore[arg-type]
        )
    ):
        made = ingest(source, str(tmp_path / str(number)))
        assert (made.manifest.classes, made.labels().tolist()) == (Files.classes, [2, 0])
    named = ingest(Files([(tmp_path / "b.jpg", "x"), (tmp_path / "a.jpg", "y")]), str(tmp_path / "named"))
    assert (named.manifest.classes, named.labels().tolist()) == (("x", "y"), [0, 1])


@pytest.mark.parametrize("other", [Image.new("L", (3, 3)), 3, (Image.new("L", (3, 3)), 1)])
def test_a_list_of_files_and_images_is_refused(tmp_path: Path, other: Any) -> None:
    put(tmp_path, "a.jpg")
    kind = "int" if other == 3 else "Image"
    says = f"^Item 1 of a list of 2 files is of the type {kind}, .* All items must be paths, or all images"
    with pytest.raises(UserError, match=says):
        ingest([tmp_path / "a.jpg", other], str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds a label, and labels= is given too"):
        ingest([(tmp_path / "a.jpg", 1)], str(tmp_path / "out"), labels=[1])


class NAType:
    """As the value of pandas for what is missing."""


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        ((0, 1.0, np.int64(1), "0"), ("0", "1")),
        ((True, np.False_, "a", "a"), ("a", "false", "true")),
        ((0, float("nan"), 1, 1), ()),
        ((0, NAType(), 1, 1), ()),
        ((0, 1, -1, None), ()),
    ],
)
def test_labels_of_a_list_follow_the_rules_of_tables(
    tmp_path: Path, given: tuple[Any, ...], classes: tuple[str, ...]
) -> None:
    put(tmp_path, *(f"{i}.jpg" for i in range(4)))
    files = [(tmp_path / f"{i}.jpg", label) for i, label in enumerate(given)]
    assert ingest(files, str(tmp_path / "out")).manifest.classes == classes


@pytest.mark.parametrize(("label", "says"), [(0.5, "0.5, which holds fractions"), ([1, 2], "several values")])
def test_a_label_of_a_list_that_names_no_class_is_refused(tmp_path: Path, label: Any, says: str) -> None:
    put(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=says):
        ingest([(tmp_path / "a.jpg", label)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    none = IngestConfig(labels="none")
    assert not ingest([(tmp_path / "a.jpg", label)], str(tmp_path / "none"), none).has_labels


def test_a_list_that_names_missing_files_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    files = [(tmp_path / name, name[0]) for name in ("a.jpg", "gone.jpg", "lost.jpg")]
    with pytest.raises(UserError, match=r"^2 files of the list of 3 do not exist.*/gone\.jpg'"):
        ingest(files, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"^1 file of the list of 2 does not exist"):
        ingest(files[:2], str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"holds the folder .*Give the files in it"):
        ingest([tmp_path / "a.jpg", tmp_path], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_ray_dataset(tmp_path: Path) -> None:
    import ray

    put(tmp_path / "in", "cat/1.jpg", "dog/2.jpg", data=jpeg(70))
    encoded = ray.data.from_items([{"image": jpeg(i), "label": "ab"[i]} for i in range(2)])
    made = ingest(encoded, str(tmp_path / "encoded"))
    assert made.read(np.arange(2))["image"].to_pylist() == [jpeg(0), jpeg(1)]
    assert made.manifest.classes == ("a", "b")
    pixels = [{"image": np.full((4, 5, 3), 9 * i, np.uint8), "label": i} for i in range(2)]
    made = ingest(ray.data.from_items(pixels), str(tmp_path / "pixels"))
    image = decode(made.read(np.array([1]))["image"][0].as_py())
    assert image.shape == (3, 4, 5)
    assert (image == 9).all()


def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    put(tmp_path, "file.jpg", data=jpeg(3))
    images = [{"bytes": jpeg(1), "path": None}, {"bytes": jpeg(2), "path": None}, str(tmp_path / "file.jpg")]
    rows = datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1]}, features)
    made = ingest(rows.select([2, 1]), str(tmp_path / "out"))
    assert made.manifest.classes == ("cat", "dog")
    assert made.labels().tolist() == [1, 0]
    assert made.read(np.arange(2))["image"].to_pylist() == [jpeg(3), jpeg(2)]


def test_a_data_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    put(tmp_path, "a.jpg", "b.jpg")
    monkeypatch.chdir(tmp_path)
    named = pandas.DataFrame({"file": ["b.jpg", Path("a.jpg"), "gone.jpg"], "species": ["x", "y", "y"]})
    made = ingest(named, "named", IngestConfig(label_column="species"))
    assert made.paths() == [str(tmp_path / "b.jpg"), str(tmp_path / "a.jpg")]
    assert (made.labels().tolist(), made.manifest.num_bad) == ([0, 1], 1)
    assert made.manifest.source == "pandas.DataFrame of 3 rows"
    assert ingest(named, "named", IngestConfig(label_column="species")).manifest == made.manifest
    rows = pandas.DataFrame({"image": [jpeg(1), None, jpeg(2)], "label": [1, 0, 0]}, index=[7, 7, 7])
    made = ingest(rows, "rows")
    assert made.read(np.arange(2))["image"].to_pylist() == [jpeg(1), jpeg(2)]
    assert [row["path"] for row in made.bad_images()] == ["item 1"]
    assert made.labels().tolist() == [1, 0]
    structs = pandas.DataFrame(
        {"picture": [{"bytes": jpeg(1), "path": "a"}, {"bytes": jpeg(2), "path": None}]}
    )
    assert ingest(structs, "structs").paths() == ["item 0 (a)", "item 1"]
    for source, says in (
        (
            pandas.DataFrame({"label": [3]}),
            "^The table 'pandas.DataFrame of 1 row' has no column of encoded images",
        ),
        (
            pandas.DataFrame({"file": ["a.jpg", 3]}),
            "^The column 'file' of pandas.DataFrame of 2 rows cannot be read",
        ),
        (pandas.concat([named, named["file"]], axis=1), "several columns called 'file'"),
    ):
        with pytest.raises(UserError, match=says):
            ingest(source, "refused")
    with pytest.raises(UserError, match=r"labels= is given with a pandas\.DataFrame"):
        ingest(named, "refused", labels=[1, 2, 3])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("labels", [None, ["x", "y"]])
def test_the_same_list_again_is_found_until_a_file_changes(tmp_path: Path, labels: Any) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    files, dest = [tmp_path / "a.jpg", tmp_path / "b.jpg"], str(tmp_path / "out")
    made = ingest(files, dest, labels=labels)
    assert ingest(np.array([str(file) for file in files]), dest, labels=labels).manifest == made.manifest
    put(tmp_path, "b.jpg", data=jpeg(90))
    with pytest.raises(UserError, match=r"holds a data set of another source of the same name.* or files"):
        ingest(files, dest, labels=labels)


def test_an_interrupted_list_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    files, dest = [tmp_path / "a.jpg", tmp_path / "b.jpg"], str(tmp_path / "out")
    finish = pipeline._finish
    monkeypatch.setattr(pipeline, "_finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingest(files, dest)
    monkeypatch.setattr(pipeline, "_finish", finish)
    with caplog.at_level("INFO", "raysl.ingestion"):
        assert ingest(files, dest).num_images == 2
    assert "1 of 1 shards are done" in caplog.text


def test_what_was_given_is_printed_and_no_file_of_raysl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    with caplog.at_level("INFO", "raysl.ingestion"):
        ingest(files, str(tmp_path / "plain"))
        assert (
            "  source    a list of 2 files\n  images    2\n  labels    none, because none were given"
            in caplog.text
        )
        ingest([(file, file.stem) for file in files], str(tmp_path / "pairs"))
        assert "  labels    given with the images" in caplog.text
    with caplog.at_level("INFO", "raysl.ingestion"), pytest.raises(UserError):
        ingest([(files[0], "x"), (files[1], None), (files[1], "y")], str(tmp_path / "twice"))
    assert "_source" not in caplog.text
    assert "parquet" not in caplog.text


def test_a_column_of_splits_of_an_object_is_told_without_a_split_to_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [jpeg(1), jpeg(2)], "split": ["train", "test"]})
    with caplog.at_level("INFO", "raysl.ingestion"):
        ingest(frame, str(tmp_path / "out"))
    assert "all values of the column 'split' together\n" in caplog.text


def test_other_objects_are_refused(tmp_path: Path) -> None:
    for source, says in (
        ({"train": []}, "one of its values"),
        (42, "type builtins.int"),
        ([], "is empty"),
        ([3], "Each item must be an image"),
    ):
        with pytest.raises(UserError, match=says):
            ingest(source, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_table_of_pyarrow(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg(1), jpeg(2)], "label": ["cat", "dog"]})
    made = ingest(table, str(tmp_path / "out"))
    assert made.manifest.source == "pyarrow.Table of 2 rows"
    assert made.labels().tolist() == [0, 1]
