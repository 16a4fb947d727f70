"""The indexed data set: what is read back, and what is said of a damaged one."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysl.dataset import DataSet, Manifest, Shard
from raysl.errors import UserError
from raysl.ingestion.shard import write
from raysl.ingestion.sources import Row
from raysl.storage import Folder
from tests.data import make_dataset

# Shard 0 has row groups of 4, 4 and 2 images, shard 1 of 4 and 1.
SIZES = (10, 5)


def make(folder: Path, labeled: bool = True) -> DataSet:
    """A data set whose image i holds the bytes "i" and whose label is i mod 3."""
    dest, base, shards = Folder(str(folder)), 0, []
    classes = ("a", "b", "c") if labeled else ()
    for unit, size in enumerate(SIZES):
        rows = (Row(str(i).encode(), "abc"[i % 3], f"{i}.png") for i in range(base, base + size))
        shards.append(write(dest, unit, base, rows, decoding=None, classes=classes, rows_per_group=4).shard)
        base += size
    manifest = Manifest("made", tuple(shards), classes, "f00d", 0)
    return DataSet.create(dest, manifest, [np.arange(sum(SIZES)) % 3])


def test_the_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    data_set = make(tmp_path)
    assert Manifest.from_json(json.loads(json.dumps(data_set.manifest.to_json()))) == data_set.manifest
    assert data_set.num_images == 15
    assert [shard.row_groups for shard in data_set.manifest.shards] == [(4, 4, 2), (4, 1)]
    assert data_set.row_group_starts.tolist() == [0, 4, 8, 10, 14, 15]
    assert pickle.loads(pickle.dumps(data_set)) == data_set


@pytest.mark.parametrize("copied_bytes", [0, 1 << 20], ids=["large images", "small images"])
@pytest.mark.parametrize(
    "indices", [[0], [14, 0, 7], [3, 3, 9, 3], [4, 5, 6, 12, 13, 2], list(range(14, -1, -1))]
)
def test_rows_come_in_the_order_that_was_asked_for(
    tmp_path: Path, indices: list[int], copied_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.dataset._COPIED_BYTES", copied_bytes)
    rows = make(tmp_path).read(np.array(indices))
    assert rows.column_names == ["index", "image", "label"]
    assert rows["index"].to_pylist() == indices
    assert rows["image"].to_pylist() == [str(i).encode() for i in indices]
    assert rows["label"].to_pylist() == [i % 3 for i in indices]


def test_rows_of_more_than_two_gigabytes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row groups share their images, so that they need little memory."""
    image = pa.array([bytes(32 << 20)] * 2, pa.binary())
    groups = [pa.table({"index": [2 * number, 2 * number + 1], "image": image}) for number in range(33)]
    monkeypatch.setattr(DataSet, "_row_groups", lambda self, needed, columns: (groups[i] for i in needed))
    monkeypatch.setattr("raysl.dataset._COPIED_BYTES", 1 << 40)
    data_set = DataSet(Folder("s"), Manifest("made", (Shard("0", (2,) * 33, 0),), (), "f00d", 0))
    assert data_set.read(np.arange(65, -1, -1), ("image",))["index"].to_pylist() == list(range(65, -1, -1))


def test_columns_are_chosen_and_labels_optional(tmp_path: Path) -> None:
    data_set = make(tmp_path, labeled=False)
    assert not data_set.has_labels
    assert data_set.read(np.array([2])).column_names == ["index", "image"]
    assert make(tmp_path / "b").read(np.array([2]), columns=("label",)).column_names == ["index", "label"]


def labels_in_shards(folder: Path) -> list[int]:
    return DataSet.open(str(folder)).read(np.arange(45)).column("label").to_pylist()  # type: ignore[no-any-return]


def test_labels_are_in_index_order(tmp_path: Path) -> None:
    data_set = make(tmp_path)
    assert data_set.labels().tolist() == [i % 3 for i in range(15)]
    (tmp_path / "labels.parquet").unlink()
    with pytest.raises(UserError, match=r"labels\.parquet' are missing"):
        data_set.labels()
    assert make_dataset(tmp_path / "old", 45).labels().tolist() == labels_in_shards(tmp_path / "old")


def test_paths(tmp_path: Path) -> None:
    data_set = make(tmp_path)
    assert data_set.paths() == [f"{i}.png" for i in range(15)]
    assert data_set.paths(np.array([12, 3])) == ["12.png", "3.png"]
    assert data_set.read(np.array([2]), ("path", "image")).column_names == ["index", "path", "image"]


def test_a_data_set_without_paths_names_its_images_by_index(tmp_path: Path) -> None:
    data_set = make_dataset(tmp_path / "old", 45)
    assert data_set.paths(np.array([44, 0])) == ["44", "0"]


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert make(tmp_path).bad_images() == []
    Folder(str(tmp_path)).write("bad_images.jsonl", b'{"path": "a\\u2028b", "reason": "r"}\n')
    assert make(tmp_path).bad_images() == [{"path": "a\u2028b", "reason": "r"}]


def swap_shards(folder: Path) -> None:
    first, second = folder / "shards" / "00000.parquet", folder / "shards" / "00001.parquet"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def cut_shard(folder: Path) -> None:
    (folder / "shards" / "00001.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize("damage", [swap_shards, cut_shard])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    data_set = make(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"Shard '00001\.parquet' .* is damaged"):
        data_set.read(np.array([12]))


@pytest.mark.parametrize("name", ["shards/00001.parquet", "labels.parquet"])
def test_no_flipped_bit_is_used(tmp_path: Path, name: str) -> None:
    whole = make(tmp_path / "whole")
    rows, labels = whole.read(np.arange(15), ("image", "path", "label")), whole.labels()
    content = (tmp_path / "whole" / name).read_bytes()
    refusals = []
    for bit in range(0, 8 * len(content), 37):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{bit}")
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / f"{bit}" / name).write_bytes(flipped)
        data_set = DataSet.open(str(tmp_path / f"{bit}"))
        try:
            assert data_set.read(np.arange(15), ("image", "path", "label")) == rows, bit
            assert (data_set.labels() == labels).all(), bit
        except UserError as error:
            refusals.append(str(error))
    assert refusals
    assert all(name.rpartition("/")[2] in text for text in refusals)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"shards": []}', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (None, "no manifest.json"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        DataSet.open(str(tmp_path))


def test_a_missing_shard_and_another_layout_are_refused(tmp_path: Path) -> None:
    data_set = make(tmp_path)
    (tmp_path / "shards" / "00000.parquet").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 shards"):
        DataSet.open(str(tmp_path))
    data_set.folder.write_json("manifest.json", {**data_set.manifest.to_json(), "format": 99})
    with pytest.raises(UserError, match="layout 99"):
        DataSet.open(str(tmp_path))


def test_a_uri_with_a_split_is_no_data_set() -> None:
    folder = Folder("memory://sets/cifar#train")
    folder.write("manifest.json", b"{}")
    assert not DataSet.exists_at(str(folder))
    # An address that the Hub's package would refuse; nothing is asked.
    assert not DataSet.exists_at("hf://datasets/uoft-cs/cifar10#train")


def test_a_local_folder_may_have_a_name_with_a_hash(tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "a#b", 3)
    assert DataSet.exists_at(str(made.folder))


def test_a_place_without_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in ("nothing", "file"):
        assert not DataSet.exists_at(str(tmp_path / place))
        with pytest.raises(UserError, match="No data set"):
            DataSet.open(str(tmp_path / place))
