"""Tables of images: every kind of label column, files that disagree, and every format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from raysl.ingestion import splits, tables
from raysl.ingestion.sources import SourceLocation, UnitSize, open_source
from tests.ingestion.reading import SMALL, jpeg, labels, opened, put, refused


def images(count: int) -> list[dict[str, Any]]:
    return [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(count)]


def table(values: Any, names: list[str] | None = None, column: str = "label") -> pa.Table:
    made = pa.table({"image": images(len(values)), column: values})
    if names:
        features = {column: {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write(path: Path, values: Any, names: list[str] | None = None, column: str = "label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(values, names, column), path, row_group_size=max(2, len(values) // 10))
    return path


def test_hugging_face_layout(tmp_path: Path) -> None:
    found, rows = opened(write(tmp_path / "x.parquet", [1, 0, 1, 1, 0], ["cat", "dog", "emu"]))
    assert found.classes == {"cat": 2, "dog": 3, "emu": 0}
    assert [row.label for row in rows] == ["dog", "cat", "dog", "dog", "cat"]
    assert rows[2][:3] == (jpeg(2), "dog", "x.parquet, row group 1, row 0 (2.jpg)")
    assert found.labels == f"the column 'label' of {tmp_path / 'x.parquet'}"


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (pa.array([0, 1, 0], pa.uint8()), ["0", "1"]),
        (pa.array(["dog", "cat", "dog"]), ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog"], pa.large_string()), ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ["cat", "dog"]),
        (pa.array([True, False, True]), ["false", "true"]),
        (pa.array([0.0, 1.0, 0.0]), ["0", "1"]),
        (pa.array([0, 1, 0]).cast(pa.decimal128(20)), ["0", "1"]),
        (pa.array([0, 1, 0]).cast(pa.float16()), ["0", "1"]),
        (pa.array([b"dog", b"cat", b"dog"]), ["cat", "dog"]),
        (pa.array([" dog", "cat", "dog "]), ["cat", "dog"]),
        (pa.array([b"\xff", b"cat", b"dog"]), []),
        (pa.array([[3], [10], [3]]), ["3", "10"]),
        (pa.array([[3], [], [3]]), []),
        (pa.array([1, 2, 3]), ["1", "2", "3"]),
        (pa.array([7, 900_000, 7]), ["7", "900000"]),
        (pa.array([2**64 - 1, 5, 5], pa.uint64()), ["5", str(2**64 - 1)]),
        (pa.array([-1, -1, -1]), []),
        (pa.array([None, None, None], pa.int64()), []),
        (pa.nulls(3), []),
        (pa.array([0, -1, 1]), []),
        (pa.array([0, None, 1]), []),
        (pa.array(["a", "", "b"]), []),
        (pa.array([0.0, float("nan"), 1.0]), []),
        (pa.array([0.5, 1.0, 0.0]), []),
        (pa.array([1e30, 1.0, 0.0]), []),
        (pa.array([[0, 1], [1], [0]]), []),
        (pa.array([{"a": 1}] * 3), []),
    ],
)
def test_label_columns(tmp_path: Path, values: pa.Array, classes: list[str]) -> None:
    found, rows = opened(write(tmp_path / "x.parquet", values))
    assert list(found.classes) == classes
    assert len(rows) == 3
    assert "'label'" in found.labels
    assert found.labels.startswith("the column" if classes else "none")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([0, -1, 1], "has an image without one, and 2 images have one"),
        ([-1, -1], "no row has one (all are null, empty or -1)"),
        ([0.5, 1.0], "holds fractions, such as 0.5"),
        ([b"\xff", b"a"], "holds text that is not in UTF-8"),
        ([[0, 1], [1]], "holds several values for each image"),
        (list(range(3000)), "3,000 values in 3,000 rows, which are names of images"),
    ],
)
def test_why_a_column_is_not_taken(tmp_path: Path, values: Any, why: str) -> None:
    found, _ = opened(write(tmp_path / "x.parquet", values))
    assert why in found.labels


def test_columns_are_guessed_or_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [0, 1], column="target")
    assert list(opened(path)[0].classes) == ["0", "1"]
    path = write(tmp_path / "b.parquet", ["pug", "cat"], column="breed")
    found, _ = opened(path)
    assert "is named like a label; its columns are image, breed (--label-column names one)" in found.labels
    assert list(opened(path, label_column="breed")[0].classes) == ["cat", "pug"]
    assert "has no column 'x', which --label-column names" in refused(path, label_column="x")
    pq.write_table(pa.table({"left": [jpeg(1)], "right": [jpeg(2)], "label": [0]}), tmp_path / "c.parquet")
    assert "Name one with --image-column" in refused(tmp_path / "c.parquet")
    assert opened(tmp_path / "c.parquet", image_column="right")[1][0].image == jpeg(2)
    assert "the label" not in labels(tmp_path / "c.parquet", image_column="left", labels="none").values()


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [1], ["cat"])
    assert "names 1 classes and has an image with label 1" in refused(path)


@pytest.mark.parametrize("layout", ["{}-00000-of-00001", "{}", "data/{}/0000", "my{}"])
def test_splits_by_name(tmp_path: Path, layout: str) -> None:
    write(tmp_path / f"{layout.format('train')}.parquet", [0, 1, 2])
    write(tmp_path / f"{layout.format('test')}.parquet", [3])
    mine = "my" if layout.startswith("my") else ""
    assert f"{mine}test, {mine}train" in refused(tmp_path)
    assert list(labels(f"{tmp_path}#{mine}test").values()) == ["3"]
    assert f"Its splits: {mine}test, {mine}train" in refused(f"{tmp_path}#validation")


def test_files_of_one_split_are_joined_by_the_names_of_classes(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / "train-00001-of-00003.parquet", [0, 1], ["dog", "emu"])
    pq.write_table(table([0], ["cat", "dog"]).slice(0, 0), tmp_path / "train-00002-of-00003.parquet")
    found, rows = opened(tmp_path)
    assert found.classes == {"cat": 1, "dog": 2, "emu": 1}
    assert [row.label for row in rows] == ["cat", "dog", "dog", "emu"]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (table([0, 1], column="x"), "labels in 'label' in the first, images in the column 'image' and no"),
        (pa.table({"image": ["a.png"], "label": [0]}), "names of files in the column 'image'"),
        (table(["cat", "dog"]), "holds numbers in the first and names in the second"),
        (table([0, 1], ["cat", "dog"]), "one names its classes in the column 'label' and the other"),
    ],
    ids=["no label", "other image", "other type", "no names"],
)
def test_files_that_disagree_are_both_named(tmp_path: Path, second: pa.Table, says: str) -> None:
    write(tmp_path / "a.parquet", [0, 1])
    pq.write_table(second, tmp_path / "b.parquet")
    message = refused(tmp_path)
    assert "The tables 'a.parquet' and 'b.parquet' disagree" in message
    assert says in message


def write_arrow(made: pa.Table, path: Path, new: Callable[..., Any] = pa.ipc.new_file) -> None:
    with pa.OSFile(str(path), "wb") as sink, new(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "x.arrow", "x.feather"])
def test_arrow(tmp_path: Path, name: str) -> None:
    made = table([1, 0, 1, 1, 0], ["cat", "dog"])
    if name.startswith("data"):
        write_arrow(made, tmp_path / name, pa.ipc.new_stream)
        put(tmp_path, "dataset_info.json", "state.json", data=b"{}")
    elif name.endswith("arrow"):
        write_arrow(made, tmp_path / name)
    else:
        pyarrow.feather.write_feather(made, tmp_path / name)
    found, rows = opened(tmp_path)
    assert found.classes == {"cat": 2, "dog": 3}
    assert [row.image for row in rows] == [jpeg(i) for i in range(5)]
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert "Cannot read the table" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "file_name,label\nphotos/a.jpg,dog\nphotos/b c.jpg,cat\n"),
        ("list.tsv", "path\tclass\nphotos/a.jpg\tdog\nphotos/b c.jpg\tcat\n"),
        ("list.jsonl", '{"img": "photos/a.jpg", "y": "dog"}\n{"img": "photos/b c.jpg", "y": "cat"}\n'),
    ],
)
def test_tables_of_file_names(tmp_path: Path, name: str, content: str) -> None:
    put(tmp_path, "photos/a.jpg", "photos/b c.jpg")
    put(tmp_path, name, data=content.encode())
    assert labels(tmp_path / name) == {"photos/a.jpg": "dog", "photos/b c.jpg": "cat"}


@pytest.mark.parametrize(
    ("content", "files"),
    [
        ("filename,label\n1.jpg,0\nx/2.jpg,1\n", ["images/1.jpg", "images/x/2.jpg"]),
        ("id,label\n1,0\n2,1\n", ["train/1.jpg", "train/2.jpg", "test/3.jpg"]),
        ("id,label\n007,0\n010,1\n", ["train/007.jpg", "train/010.jpg"]),
        ("id_code,label\na1,0\nb2,1\n", ["part_1/a1.png", "part_2/b2.jpg"]),
        ("image,label\nimages/1,0\n2,1\n", ["images/1.jpg", "images/2.jpg"]),
    ],
)
def test_names_without_a_folder_or_a_suffix(tmp_path: Path, content: str, files: list[str]) -> None:
    put(tmp_path, *files)
    put(tmp_path, "list.csv", data=content.encode())
    assert labels(tmp_path / "list.csv") == dict(zip(files, "01", strict=False))
    before = open_source(SourceLocation(str(tmp_path / "list.csv"))).source.stamp()
    put(tmp_path, files[0], data=b"another")
    assert open_source(SourceLocation(str(tmp_path / "list.csv"))).source.stamp() != before


def test_a_name_that_may_be_of_several_files_is_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "train/1.jpg", "test/1.jpg", "train/2.jpg")
    put(tmp_path, "list.csv", data=b"filename,label\n1.jpg,0\n2.jpg,1\n")
    put(tmp_path, "twice.csv", data=b"filename,label\n1,0\n1.jpg,0\n")
    assert labels(tmp_path / "list.csv") == {"train/1.jpg": "0", "train/2.jpg": "1"}
    assert opened(tmp_path / "list.csv")[0].layout == "one table (csv) of names of files, read as train/*"
    assert labels(tmp_path / "twice.csv") == {"1": "0", "1.jpg": "0"}
    put(tmp_path, "test/2.jpg")
    put(tmp_path, "train.csv", data=b"filename,label\n1.jpg,0\n2.jpg,1\n")
    assert labels(tmp_path / "train.csv") == {"train/1.jpg": "0", "train/2.jpg": "1"}
    put(tmp_path, "ids.csv", data=b"id,label\n8,0\n9,1\n")
    assert "no column of encoded images" in refused(tmp_path / "ids.csv")


def not_in_utf8(values: list[str]) -> pa.Array:
    return pa.array([value.encode("latin1") for value in values]).view(pa.string())


def test_text_that_is_not_in_utf8_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    put(tmp_path, "list.jsonl", data='{"image": "caf\xe9.jpg", "label": 0}\n'.encode("latin1"))
    assert "list.jsonl': it is not in UTF-8" in refused(tmp_path / "list.jsonl")
    put(tmp_path / "in", "a.jpg", "metadata.jsonl", data=(tmp_path / "list.jsonl").read_bytes())
    assert "metadata.jsonl': it is not in UTF-8" in refused(tmp_path / "in")
    names = not_in_utf8(["a.jpg", "caf\xe9.jpg"])
    pq.write_table(pa.table({"file_name": names, "label": [0, 1]}), tmp_path / "list.parquet")
    assert "Cannot read the Parquet file" in refused(tmp_path / "list.parquet")
    put(tmp_path / "by", "a.jpg")
    pq.write_table(pa.table({"file_name": names, "label": [0, 1]}), tmp_path / "by" / "metadata.parquet")
    assert "Cannot read the table 'metadata.parquet'" in refused(tmp_path / "by")
    structs = pa.StructArray.from_arrays([pa.array([jpeg(), jpeg()]), names], ["bytes", "path"])
    write_arrow(pa.table({"image": structs}), tmp_path / "x.arrow")
    assert "Cannot read the table" in refused(tmp_path / "x.arrow")


def test_false_offsets_in_an_arrow_file_are_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 90, 5], np.int32))
    names = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a.jpg")])
    write_arrow(pa.table({"file_name": names}), tmp_path / "x.arrow")
    assert "Cannot read the table" in refused(tmp_path / "x.arrow")


@pytest.mark.parametrize("first", ["null", "  null", '{"image": "a.jpg"}\nnull', "3", "[]"])
def test_a_line_of_json_that_is_no_object_is_refused(tmp_path: Path, first: str) -> None:
    put(tmp_path, "a.jpg")
    put(tmp_path, "list.jsonl", data=f'{first}\n{{"image": "a.jpg"}}\n'.encode())
    assert "Cannot read the table" in refused(tmp_path / "list.jsonl")
    put(tmp_path, "list.jsonl", data=b' [{"image": "a.jpg"}]')
    assert "it is one JSON list: write each object of it on a line of its own" in refused(
        tmp_path / "list.jsonl"
    )


def test_file_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "secret.jpg", "other.jpg", "in/a.jpg")
    text = f"path,label\na.jpg,0\n../secret.jpg,1\n{tmp_path}/other.jpg,1\ngone.jpg,0\n/nowhere/a.jpg,0\n"
    put(tmp_path, "in/list.csv", data=text.encode())
    _, rows = opened(tmp_path / "in" / "list.csv")
    assert [bool(row.image) for row in rows] == [True, False, False, False, False]
    assert all("--follow-links" in row.reason for row in rows[1:3])
    assert {row.reason for row in rows[3:]} == {"does not exist"}
    put(tmp_path, "in/own.csv", data=f"path,label\n{tmp_path}/in/a.jpg,0\n".encode())
    assert labels(tmp_path / "in" / "own.csv") == {"a.jpg": "0"}
    _, rows = opened(tmp_path / "in" / "list.csv", follow_links=True)
    assert [bool(row.image) for row in rows] == [True, True, True, False, False]


def test_links_that_lead_out_of_the_folder_of_a_table(tmp_path: Path) -> None:
    put(tmp_path, "secret.jpg", "in/a.jpg", "in/b/c.jpg")
    for name, target in (("out.jpg", "../secret.jpg"), ("up", ".."), ("same.jpg", "a.jpg"), ("d", "b")):
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "link").symlink_to("in")
    put(tmp_path, "in/list.csv", data=b"path\na.jpg\nsame.jpg\nd/c.jpg\nout.jpg\nup/secret.jpg\n")
    for table in (tmp_path / "in" / "list.csv", tmp_path / "link" / "list.csv"):
        _, rows = opened(table)
        assert [bool(row.image) for row in rows] == [True, True, True, False, False]
        assert "--follow-links" in rows[3].reason
        assert all(row.image for row in opened(table, follow_links=True)[1])


def test_images_that_are_missing_or_of_another_form(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows_of = pa.array([{"bytes": None, "path": "far/away.jpg"}, None], kind)
    pq.write_table(pa.table({"image": rows_of}), tmp_path / "x.parquet")
    _, rows = opened(tmp_path / "x.parquet")
    assert [row.image for row in rows] == [None, None]
    assert "far/away.jpg" in rows[0].path
    pq.write_table(pa.table({"a": [1]}), tmp_path / "y.parquet")
    assert "columns are a" in refused(tmp_path / "y.parquet")
    pq.write_table(pa.table({"images": [images(2)]}), tmp_path / "z.parquet")
    assert "no column of encoded images: its columns are " in refused(tmp_path / "z.parquet")
    nested = pa.array([{f"field {i}": i for i in range(50)}])
    pq.write_table(pa.table({"a": [1], "objects": nested}), tmp_path / "w.parquet")
    said = "a (int64), objects (struct<field 0: int64, field 1: int64...). Name"
    assert said in refused(tmp_path / "w.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file_name;label\n0.jpg;a\n1.jpg;b\n", ["a", "b"]),
        ("\ufefffile_name, label\r\n0.jpg, a\r\n1.jpg, b\r\n", ["a", "b"]),
        ("label, file_name \na, 0.jpg \nb, 1.jpg\n", ["a", "b"]),
        ("filename,label\n./0.jpg,1\n1.jpg,10\n", ["1", "10"]),
        ("filename,label\n0.jpg,001\n1.jpg, 010\n", ["1", "10"]),
        ("filename,label\n0.jpg, 1\n1.jpg,01\n", ["01", "1"]),
        ("path|class\n0.jpg|x\n1.jpg|\n", None),
        ("path,label,note\n0.jpg,a,x\0\n1.jpg,b,\0\0\0\n", ["a", "b"]),
        (b"\xff\xfe" + "path,label\n0.jpg,a\n1.jpg,b\n".encode("utf-16-le"), ["a", "b"]),
    ],
)
def test_forms_of_csv(tmp_path: Path, text: str | bytes, expected: list[str] | None) -> None:
    put(tmp_path, "0.jpg", "1.jpg")
    put(tmp_path, "list.csv", data=text.encode() if isinstance(text, str) else text)
    found, rows = opened(tmp_path / "list.csv")
    assert all(row.image for row in rows)
    assert (list(found.classes) or None) == expected


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("path,label\n0.jpg,caf\xe9\n".encode("latin1"), "'label' is not in UTF-8"),
        (gzip.compress(b"path,label\n0.jpg,a\n", mtime=0), "is compressed with gzip"),
        (
            "path,label\n0.jpg,a\n".encode("utf-16-le"),
            "it is not a text in UTF-8 but, for example, a spreadsheet",
        ),
        ("path,label\n0.jpg,a\n".encode("utf-16-be"), "for example, a spreadsheet"),
        (b"PK\x03\x04 of xlsx", "for example, a spreadsheet"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 of xls", "for example, a spreadsheet"),
        (b"0.jpg,a\n1.jpg,b\n", "The first line of a table of text must name the columns"),
        (b"label," + b",".join(b"pixel%d" % i for i in range(784)) + b"\n", "... (785 in all)"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    put(tmp_path, "list.csv", data=data)
    assert says in refused(tmp_path / "list.csv")


def test_a_folder_of_hive_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"split={split}" / "label=cat" / "0.parquet", [0], column="number")
    assert "test, train" in refused(tmp_path)
    assert set(labels(f"{tmp_path}#train").values()) == {"cat"}


def test_a_folder_with_a_table_alone_names_it(tmp_path: Path) -> None:
    put(tmp_path, "list.csv", data=b"path,label\n/photos/0.jpg,a\n")
    assert f"Give the table as the source: '{tmp_path}/list.csv'" in refused(tmp_path)


def test_file_names_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "a/0.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    names = ["a\\0.jpg", "https://x.invalid/1.jpg", "A" * 5000, "a/2.jpg", "A" * 300 + ".jpg", "circle.jpg"]
    pq.write_table(pa.table({"image": names}), tmp_path / "list.parquet")
    _, rows = opened(tmp_path / "list.parquet")
    said = ["", "is on the web", "is no name of a file", "does not exist", "name too long", "symbolic links"]
    assert rows[0].image == jpeg()
    assert all(part in row.reason for row, part in zip(rows, said, strict=True))


def test_a_file_in_several_rows_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "0.jpg")
    put(tmp_path, "list.csv", data=b"file_name,label\n0.jpg,a\n0.jpg,b\n")
    assert "names the file '0.jpg' in several rows" in refused(tmp_path / "list.csv")


def test_files_in_several_tables_are_compared_by_their_place(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / f"label={name}").mkdir()
        pq.write_table(pa.table({"file_name": ["1.jpg"]}), tmp_path / f"label={name}" / "part.parquet")
    assert len(opened(tmp_path)[1]) == 2
    put(tmp_path, "list.csv", data=b"file_name,label\na.jpg,x\n./a.jpg,y\n")
    assert "names the file './a.jpg' in several rows" in refused(tmp_path / "list.csv")


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([jpeg()]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "label", "label"]), tmp_path / "x.parquet")
    assert "several columns called 'label'" in refused(tmp_path / "x.parquet")


def test_labels_in_the_names_of_folders(tmp_path: Path) -> None:
    for name in ("a b", "c"):
        folder = tmp_path / f"label={name}".replace(" ", "%20")
        folder.mkdir()
        pq.write_table(pa.table({"image": [jpeg()]}), folder / "part-0.parquet")
    found, rows = opened(tmp_path)
    assert (found.classes, [row.label for row in rows]) == ({"a b": 1, "c": 1}, ["a b", "c"])


@pytest.mark.parametrize("names", [("-1", "1"), ("-1.0", "1.0"), ("-1", "1.0")])
def test_folders_of_two_classes_with_signs(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / f"label={name}" / "0.parquet", [0], column="number")
    assert set(labels(tmp_path).values()) == {*names}
    write(tmp_path / "label=0" / "0.parquet", [0], column="number")
    assert set(labels(tmp_path).values()) == {None}


@pytest.mark.parametrize("value", ["__HIVE_DEFAULT_PARTITION__", "-1", "-1.0", "-1."])
def test_folders_of_rows_without_a_label(tmp_path: Path, value: str) -> None:
    for name in ("a", value):
        (tmp_path / f"label={name}").mkdir()
        pq.write_table(pa.table({"image": [jpeg()]}), tmp_path / f"label={name}" / "part-0.parquet")
    found, rows = opened(tmp_path)
    assert (found.classes, [row.label for row in rows]) == ({}, [None, None])
    assert "part-0.parquet has an image without one, and 1 image has one" in found.labels


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    found, _ = opened(write(tmp_path / "x.parquet", [2, 0, 1, 1], ["crane", "dog", "crane"]))
    assert found.classes == {"crane (0)": 1, "dog": 2, "crane (2)": 1}


def test_save_to_disk_of_several_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name, column in (("data-00000-of-00001", "image"), ("cache-1", "indices")):
            made = pa.table({column: [jpeg(len(split))]})
            write_arrow(made, tmp_path / split / f"{name}.arrow", pa.ipc.new_stream)
    assert [row.image for row in opened(f"{tmp_path}#test")[1]] == [jpeg(4)]


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
def test_types_of_polars(tmp_path: Path, name: str) -> None:
    image, label = pa.array([jpeg()], pa.binary_view()), pa.array(["a"], pa.string_view())
    made = pa.table({"image": image, "label": label})
    if name.endswith(".arrow"):
        write_arrow(made, tmp_path / name)
    else:
        pq.write_table(made, tmp_path / name)
    assert [(row.image, row.label) for row in opened(tmp_path)[1]] == [(jpeg(), "a")]


def test_damaged_files(tmp_path: Path) -> None:
    put(tmp_path, "x.parquet", data=b"PAR1 and nothing else")
    assert "Download or copy it again" in refused(tmp_path / "x.parquet")
    assert "does not exist" in refused(tmp_path / "nowhere.parquet")


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path) -> None:
    zeros = pa.table({"image": pa.array([bytes(1 << 20)] * 600)})
    pq.write_table(zeros, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    assert "may not fit into memory" in refused(tmp_path / "x.parquet")


def test_tables_and_images_in_one_folder(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/1.jpg")
    pq.write_table(pa.table({"file_name": ["cat/1.jpg"], "caption": ["x"]}), tmp_path / "metadata.parquet")
    assert set(labels(tmp_path).values()) == {"cat", "dog"}
    (tmp_path / "b" / "assets").mkdir(parents=True)
    put(tmp_path / "b", "assets/logo.jpg")
    write(tmp_path / "b" / "data" / "train-00000-of-00001.parquet", list(range(20)))
    found, rows = opened(tmp_path / "b")
    assert len(rows) == 20
    assert found.left_out.kinds["images beside the tables"] == (1, "assets/logo.jpg")


def test_a_column_of_splits(tmp_path: Path) -> None:
    put(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    put(tmp_path, "list.csv", data=b"path,label,Split\n0.jpg,a, train\n1.jpg,b,Test\n2.jpg,c,\n")
    found, rows = opened(tmp_path / "list.csv")
    told = "all values of the column 'Split' together; list.csv#train reads one of: Test, train"
    assert told in found.table("list.csv")
    assert [row.path for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    found, rows = opened(f"{tmp_path}/list.csv#test")
    assert [(row.path, row.label) for row in rows] == [("1.jpg", "b")]
    assert (found.images, found.classes, found.split, found.splits) == (
        1,
        {"b": 1},
        "Test",
        ("Test", "train"),
    )
    assert "Its splits: Test, train" in refused(f"{tmp_path}/list.csv#val")
    assert splits(str(tmp_path / "list.csv")) == (f"{tmp_path}/list.csv#train", f"{tmp_path}/list.csv#test")
    put(tmp_path, "plain.csv", data=b"path,label\n0.jpg,a\n1.jpg,b\n")
    assert "together" not in opened(tmp_path / "plain.csv")[0].table("plain.csv")


def test_rows_of_a_split_keep_their_names_and_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("train", "a"), ("test", "b"), ("test", "a"), ("train", "b"), (None, "a"), ("test", "b")]
    columns = dict(zip(("fold", "label"), map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table({"image": [jpeg(20 * i) for i in range(6)], **columns})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    every = {row.path: row.image for row in opened(tmp_path / "t.parquet")[1]}
    counts = Mock(side_effect=tables.Table.counted, autospec=True)
    monkeypatch.setattr(tables.Table, "counted", lambda self: counts(self))
    found, some = opened(f"{tmp_path}/t.parquet#test", UnitSize(1, 1 << 20))
    assert found.images == 3
    assert [(row.path, row.image) for row in some] == [list(every.items())[i] for i in (1, 2, 5)]
    assert counts.call_count == 1


def test_a_table_is_opened_once_and_its_splits_are_read_if_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        table = pa.table({"image": [jpeg(number)] * 2, "split": ["train", "val"]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    opening = Mock(side_effect=tables.opened)
    reading = Mock(side_effect=tables.Table.column, autospec=True)
    monkeypatch.setattr(tables, "opened", opening)
    monkeypatch.setattr(tables.Table, "column", lambda self, name: reading(self, name))
    one = open_source(SourceLocation.parse(str(tmp_path)))
    assert (opening.call_count, reading.call_count) == (3, 0)
    next(one.source.units(SMALL))
    assert one.source.found.splits == ("train", "val")
    assert splits(str(tmp_path)) == (str(tmp_path), str(tmp_path))


def test_negative_numbers_are_no_labels_in_a_column_with_leading_zeros(tmp_path: Path) -> None:
    put(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    put(tmp_path, "list.csv", data=b"path,label\n0.jpg,1\n1.jpg,01\n2.jpg,-1\n")
    assert "has an image without one" in opened(tmp_path / "list.csv")[0].labels
