"""Every kind of source: what is recognised, in which order it is read, which labels and names come out."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysl.errors import UserError
from raysl.ingestion.sources import Place, Row, Source, UnitSize, idx, open_source, read
from raysl.stream.decode import decode

SMALL = UnitSize(3, 1 << 20)


def jpeg(grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, data: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if data is None else data)


def opened(uri: object, size: UnitSize = SMALL) -> tuple[Source, list[Row]]:
    """The source after its listing, and all its rows."""
    kind, source = open_source(Place.parse(str(uri)))
    units = list(source.units(size))
    rows = [list(read(kind, unit)) for unit in units]
    assert [len(unit_rows) for unit_rows in rows] == [unit.num_images for unit in units]
    return source, [row for unit_rows in rows for row in unit_rows]


def refused(uri: object) -> str:
    with pytest.raises(UserError) as error:
        opened(uri)
    return str(error.value)


class TestFolder:
    def test_class_folders_are_labels_in_sorted_order(self, tmp_path: Path) -> None:
        for name in (
            "zebra/1.jpg",
            "zebra/0.PNG",
            "ape/5.jpeg",
            "ape/.hidden.jpg",
            ".git/x.jpg",
        ):
            put(tmp_path / name)
        (tmp_path / "empty").mkdir()
        source, rows = opened(tmp_path)
        assert source.labelled
        assert source.classes == ("ape", "zebra")
        assert [(row.path, row.label) for row in rows] == [
            ("ape/5.jpeg", 0),
            ("zebra/0.PNG", 1),
            ("zebra/1.jpg", 1),
        ]

    @pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["a.jpg", "x/b.jpg"], ["x/y/a.jpg", "x/z/b.jpg"]])
    def test_other_layouts_have_no_labels(self, tmp_path: Path, names: list[str]) -> None:
        for name in names:
            put(tmp_path / name)
        source, rows = opened(tmp_path)
        assert not source.labelled
        assert source.classes == ()
        assert [row.path for row in rows] == names

    def test_units_keep_to_count_and_bytes(self, tmp_path: Path) -> None:
        for i in range(5):
            put(tmp_path / f"{i}.jpg", bytes(100))
        _, source = open_source(Place.parse(str(tmp_path)))
        assert [unit.num_images for unit in source.units(UnitSize(2, 1000))] == [2, 2, 1]
        assert [unit.num_images for unit in source.units(UnitSize(10, 250))] == [2, 2, 1]
        assert [unit.num_images for unit in source.units(UnitSize(10, 10))] == [1] * 5

    def test_a_folder_of_splits_is_read_one_split_at_a_time(self, tmp_path: Path) -> None:
        put(tmp_path / "train" / "cat" / "0.jpg")
        put(tmp_path / "val" / "cat" / "1.jpg")
        assert "train, val" in refused(tmp_path)
        source, rows = opened(f"{tmp_path}#val")
        assert source.name == f"{tmp_path}#val"
        assert source.classes == ("cat",)
        assert [row.path for row in rows] == ["cat/1.jpg"]
        assert "no split 'test'" in refused(f"{tmp_path}#test")

    def test_files_that_are_no_images_by_name_are_listed_and_change_nothing(self, tmp_path: Path) -> None:
        for name in ("README", "ape/0.jpg", "ape/notes.txt", "zebra/1.jpg", "zebra/deep/labels.csv"):
            put(tmp_path / name)
        source, rows = opened(tmp_path)
        assert source.classes == ("ape", "zebra")
        assert [(row.path, row.label) for row in rows if row.image] == [("ape/0.jpg", 0), ("zebra/1.jpg", 1)]
        others = {row.path: row.reason for row in rows if not row.image}
        assert list(others) == ["README", "ape/notes.txt", "zebra/deep/labels.csv"]
        assert all("not named as an image" in reason for reason in others.values())

    def test_a_uri_reads_like_a_path(self, tmp_path: Path) -> None:
        put(tmp_path / "a b" / "é.jpg")
        local, uri = opened(tmp_path)[1], opened(f"local://{tmp_path}")[1]
        assert local == uri

    def test_the_stamp_tells_a_change(self, tmp_path: Path) -> None:
        put(tmp_path / "a.jpg")
        put(tmp_path / "b.txt")
        stamp = open_source(Place.parse(str(tmp_path)))[1].stamp
        before = stamp()
        os.utime(tmp_path / "b.txt", ns=(1, 1))
        assert stamp() == before
        os.utime(tmp_path / "a.jpg", ns=(1, 1))
        assert stamp() != before

    def test_a_file_that_vanished_is_a_row_with_a_reason(self, tmp_path: Path) -> None:
        put(tmp_path / "a.jpg")
        kind, source = open_source(Place.parse(str(tmp_path)))
        (unit,) = source.units(SMALL)
        (tmp_path / "a.jpg").unlink()
        (row,) = read(kind, unit)
        assert row.image is None
        assert "FileNotFoundError" in row.reason


def write_parquet(path: Path, labels: list[Any], names: list[str] | None = None, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64()), **columns})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)


class TestParquet:
    def test_hugging_face_layout(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "data.parquet", [1, 0, 1, 1, 0], ["cat", "dog"])
        source, rows = opened(tmp_path / "data.parquet")
        assert source.classes == ("cat", "dog")
        assert [row.label for row in rows] == [1, 0, 1, 1, 0]
        assert [row.image for row in rows] == [jpeg(i) for i in range(5)]
        assert rows[3].path.endswith("row group 1, row 1 (3.jpg)")

    def test_plain_binary_without_labels(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"jpg": [jpeg(), jpeg()], "caption": ["a", "b"]}), tmp_path / "x.parquet")
        source, rows = opened(tmp_path)
        assert not source.labelled
        assert [(row.image, row.label) for row in rows] == [(jpeg(), None)] * 2

    def test_a_null_image_is_a_row_with_a_reason(self, tmp_path: Path) -> None:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        images = pa.array([{"bytes": None, "path": "far/away.jpg"}, None], kind)
        pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
        rows = opened(tmp_path)[1]
        assert [row.image for row in rows] == [None, None]
        assert "far/away.jpg" in rows[0].path

    @pytest.mark.parametrize("layout", ["{}-00000-of-00001.parquet", "{}.parquet", "data/{}/0000.parquet"])
    def test_splits_by_name(self, tmp_path: Path, layout: str) -> None:
        write_parquet(tmp_path / layout.format("train"), [0, 1, 2])
        write_parquet(tmp_path / layout.format("test"), [3])
        assert "test, train" in refused(tmp_path)
        assert [row.label for row in opened(f"{tmp_path}#test")[1]] == [3]
        assert "Its splits: test, train" in refused(f"{tmp_path}#validation")

    def test_the_only_split_needs_no_name(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-00000-of-00002.parquet", [0])
        write_parquet(tmp_path / "train-00001-of-00002.parquet", [1])
        source, rows = opened(tmp_path)
        assert source.name == f"{tmp_path}#train"
        assert [row.label for row in rows] == [0, 1]

    def test_no_image_column(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
        assert "columns are a" in refused(tmp_path)

    def test_damaged_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
        assert "Download or copy it again" in refused(tmp_path / "x.parquet")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


class TestWebDataset:
    def test_members_are_grouped_by_key(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "b.tar", {"x/2.cls": b"0", "x/2.json": b"{}", "x/2.jpg": jpeg(2)})
        write_tar(
            tmp_path / "a.tar",
            {
                "1.jpg": jpeg(1),
                "1.cls": b"7\n",
                "0.png": jpeg(0),
                "0.txt": b"x",
                "0.cls": b"3",
                "readme.txt": b"x",
            },
        )
        source, rows = opened(tmp_path)
        assert source.classes is None
        assert [(row.image, row.label) for row in rows] == [(jpeg(1), 7), (jpeg(0), 3), (jpeg(2), 0)]
        assert rows[0].path == "a.tar/1.jpg"

    def test_single_archive_without_labels(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
        assert [row.label for row in opened(tmp_path / "a.tar")[1]] == [None, None]

    def test_splits_by_name(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "imagenet-train-000.tar", {"1.jpg": jpeg(1)})
        write_tar(tmp_path / "imagenet-val-000.tar", {"2.jpg": jpeg(2)})
        assert "train, val" in refused(tmp_path)
        assert opened(f"{tmp_path}#val")[1][0].image == jpeg(2)

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar.gz").write_bytes(b"")
        assert "compressed" in refused(tmp_path / "a.tar.gz")
        write_tar(tmp_path / "bad" / "c.tar", {"1.jpg": jpeg(1), "1.cls": b"cat"})
        assert "b'cat'" in refused(tmp_path / "bad")
        write_tar(tmp_path / "cut" / "d.tar", {"1.jpg": bytes(5000)})
        os.truncate(tmp_path / "cut" / "d.tar", 2000)
        assert "Cannot read the archive" in refused(tmp_path / "cut")


def write_idx(folder: Path, prefix: str, count: int, packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((1, 5, 4), np.uint8)
    files = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x803, count, 5, 4) + images.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x801, count) + bytes(i % 3 for i in range(count)),
    }
    for name, data in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


class TestIdx:
    @pytest.mark.parametrize("packed", [True, False])
    def test_grey_images_and_labels(self, tmp_path: Path, packed: bool) -> None:
        write_idx(tmp_path, "train", 7, packed)
        write_idx(tmp_path, "t10k", 2, packed)
        assert "test, train" in refused(tmp_path)
        source, rows = opened(f"{tmp_path}#train")
        assert source.classes is None
        assert [row.label for row in rows] == [0, 1, 2, 0, 1, 2, 0]
        for i, row in enumerate(rows):
            assert row.image is not None
            image = decode(row.image)
            assert image.shape == (3, 5, 4)
            assert (image == i).all()
        assert len(opened(f"{tmp_path}#test")[1]) == 2

    def test_fashion_mnist_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(idx, "FASHION_MNIST", tmp_path / "fashion-mnist")
        assert "apt-get install dataset-fashion-mnist" in refused("fashion-mnist#train")
        write_idx(tmp_path / "fashion-mnist", "train", 4, True)
        source, _ = opened("fashion-mnist#train")
        assert source.classes is not None
        assert source.classes[9] == "Ankle boot"

    def test_damaged_files(self, tmp_path: Path) -> None:
        write_idx(tmp_path, "train", 7, False)
        os.truncate(tmp_path / "train-images-idx3-ubyte", 100)
        assert "ends too early" in refused(f"{tmp_path}#train")
        (tmp_path / "train-images-idx3-ubyte").write_bytes(b"no")
        assert "not an IDX file" in refused(f"{tmp_path}#train")


class TestCifar10:
    def _write(self, folder: Path, names: list[str]) -> None:
        folder.mkdir()
        pixels = np.zeros((10_000, 3072), np.uint8)
        pixels[:, :1024] = 200
        for name in names:
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3] * 10_000}))

    def test_one_batch(self, tmp_path: Path) -> None:
        self._write(tmp_path / "cifar-10-batches-py", ["test_batch"])
        source, rows = opened(tmp_path)
        assert source.name.endswith("cifar-10-batches-py#test")
        assert source.classes is not None
        assert source.classes[3] == "cat"
        assert len(rows) == 10_000
        assert rows[5].label == 3
        assert rows[5].image is not None
        assert decode(rows[5].image)[:, 31, 31].tolist() == [200, 0, 0]
        assert "Its splits: test" in refused(f"{tmp_path}#train")

    def test_a_pickle_runs_no_code(self, tmp_path: Path) -> None:
        self._write(tmp_path / "x", [])
        (tmp_path / "x" / "test_batch").write_bytes(pickle.dumps(os.getcwd))
        assert "no part of CIFAR-10" in refused(tmp_path / "x")

    def test_missing_batches(self, tmp_path: Path) -> None:
        self._write(tmp_path / "x", [])
        (tmp_path / "x" / "data_batch_1").write_bytes(b"")
        assert "lacks data_batch_2" in refused(tmp_path / "x")


def test_a_missing_source_and_an_unknown_kind(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused(tmp_path / "nowhere.parquet")
    assert "does not exist" in refused("no-such-name")
    (tmp_path / "a.zip").write_bytes(b"")
    message = refused(tmp_path / "a.zip")
    assert "no known kind" in message
    assert "WebDataset" in message


def test_a_path_may_hold_a_hash_and_a_split_may_not_be_named_twice(tmp_path: Path) -> None:
    put(tmp_path / "a#b" / "0.jpg")
    assert len(opened(tmp_path / "a#b")[1]) == 1
    with pytest.raises(UserError, match="configuration says"):
        Place.parse("shapes:10#train", "test")


def test_names_are_looked_up_in_raysl_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.setenv("RAYSL_DATA", str(tmp_path))
    assert Place.parse("birds#train") == Place(str(tmp_path / "birds"), "train")
    assert Place.parse("shapes:10").uri == "shapes:10"
