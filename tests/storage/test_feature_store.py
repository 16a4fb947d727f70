"""Features on disk are read exactly, whoever wrote them, or are refused in one sentence."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from raysl.errors import UserError
from raysl.storage import Folder
from raysl.storage.feature_files import FINISHED, STARTED, FeatureForm, part_file, write_part
from raysl.storage.feature_store import FeatureStore
from raysl.storage.records import write_record
from tests.clustering.blobs import blobs, write

ROWS = blobs(12)
LISTS = [list(map(float, row)) for row in ROWS]
FLOATS = pa.list_(pa.float32())


def table_at(folder: Path, values: Any, index: Any = None, **more: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    index = list(range(len(values))) if index is None else index
    pq.write_table(pa.table({"index": index, "f": values, **more}), folder / "a.parquet")
    return str(folder)


def test_shards_differ_by_one_row_and_hold_every_row_once(tmp_path: Path) -> None:
    rows_nd = blobs(101)
    store = FeatureStore.open(write(tmp_path, rows_nd, files=3, rows_per_group=13))
    assert (store.num_rows, store.dim, store.layer, store.num_values) == (101, 6, "pooled", 606)
    np.testing.assert_array_equal(store.load(), rows_nd)
    for count in (1, 2, 5, 101):
        shards = store.shards(count)
        lengths = [sum(piece.num_rows for piece in pieces) for pieces in shards]
        assert sum(lengths) == 101
        assert max(lengths) - min(lengths) <= 1
        read = [batch for pieces in shards for piece in pieces for batch in store.batches(piece, 5 * 24)]
        assert np.concatenate([indices for indices, _ in read]).tolist() == list(range(101))
        np.testing.assert_array_equal(np.concatenate([values for _, values in read]), rows_nd)
    with pytest.raises(UserError, match="a shard would be empty"):
        store.shards(102)


def test_files_are_not_kept_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    uri = write(tmp_path, blobs(40), files=20)
    before = opened()
    store = FeatureStore.open(uri)
    assert len({group.file for group in store.groups}) == 20
    assert opened() == before


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float32(), 6),
        pa.list_(pa.float16()),
        pa.list_(pa.int32()),
        pa.large_list(pa.int8()),
        pa.list_(pa.uint8()),
        pa.list_(pa.uint8(), 6),
    ],
)
def test_lists_of_other_programs(tmp_path: Path, kind: pa.DataType) -> None:
    expected = np.abs(np.round(ROWS)).astype(np.float32)
    if pa.types.is_float16(kind.value_type):
        flat = pa.array(expected.astype(np.float16).ravel())
        values: pa.Array = pa.ListArray.from_arrays(pa.array(np.arange(13) * 6, pa.int32()), flat)
    else:
        values = pa.array(expected.astype(int).tolist()).cast(kind)
    uri = table_at(tmp_path, values, pa.array(range(12), pa.uint32()), name=[f"{i}.jpg" for i in range(12)])
    store = FeatureStore.open(uri)
    assert (store.dim, store.layer, store.has_paths) == (6, "f", False)
    np.testing.assert_array_equal(store.load(), expected)


def test_tensors_of_fixed_shape(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(ROWS)
    np.testing.assert_array_equal(FeatureStore.open(table_at(tmp_path, tensors)).load(), ROWS)


def bad(at: int, value: Any) -> list[Any]:
    return [value if i == at else row for i, row in enumerate(LISTS)]


@pytest.mark.parametrize(
    ("values", "index", "expected"),
    [
        (pa.array(bad(0, None), FLOATS), None, "first row .* has no numbers"),
        (pa.array(bad(0, []), FLOATS), None, "first row .* has no numbers"),
        (pa.array(bad(7, None), FLOATS), None, r"index 7 .* has no numbers \(null\) in place of 6"),
        (pa.array(bad(7, None), pa.list_(pa.float32(), 6)), None, r"index 7 .* no numbers \(null\)"),
        (pa.array(bad(7, []), FLOATS), None, "index 7 .* has 0 numbers in place of 6"),
        (pa.array(bad(7, [1.0]), FLOATS), None, "index 7 .* has 1 numbers in place of 6"),
        (pa.array(bad(7, [None] * 6), FLOATS), None, "null in place of a number"),
        (pa.array([[]] * 12, FLOATS), None, "first row .* has no numbers"),
        (pa.array([["a"]] * 12), None, r"no column of lists of numbers.*f \(list<"),
        (pa.array([[True]] * 12), None, "no column of lists of numbers"),
        (pa.array(range(12)), None, "no column of lists of numbers"),
        (LISTS, [f"img{i}" for i in range(12)], "'index' .* is string"),
        (LISTS, [float(i) for i in range(12)], "'index' .* is double"),
        (LISTS, [None] * 12, "'index' .* is null"),
        (LISTS, [None, *range(11)], "nulls, negative numbers"),
        (LISTS, [-1, *range(11)], "nulls, negative numbers"),
        (LISTS, pa.array([2**64 - 1, *range(11)], pa.uint64()), "numbers of more than 63 bits"),
    ],
)
def test_tables_without_features_are_refused(tmp_path: Path, values: Any, index: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        FeatureStore.open(table_at(tmp_path, values, index)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["index", "f"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    columns = {"index": pa.array(range(12)), "f": pa.array(LISTS, FLOATS)}
    made = pa.Table.from_arrays([*columns.values(), columns[name]], [*columns, name])
    pq.write_table(made, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"several columns called '{name}'"):
        FeatureStore.open(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_numbers_without_a_square_are_refused(tmp_path: Path, value: float) -> None:
    rows_nd = blobs(20)
    rows_nd[12, 3] = value
    store = FeatureStore.open(write(tmp_path, rows_nd, files=1, rows_per_group=20))
    ((piece,),) = store.shards(1)
    with pytest.raises(UserError, match="index 12"):
        store.check(piece, *next(store.batches(piece)))


def test_files_of_different_lengths_and_layers(tmp_path: Path) -> None:
    write(tmp_path, blobs(20, dim=6), files=1)
    with pytest.raises(UserError, match="Did you mean 'pooled'"):
        FeatureStore.open(str(tmp_path), "poled")
    narrow = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float32)), 4)
    pq.write_table(pa.table({"index": [0, 1], "pooled": narrow}), tmp_path / "zzz.parquet")
    with pytest.raises(UserError, match=r"4 in zzz\.parquet"):
        FeatureStore.open(str(tmp_path))
    with pytest.raises(UserError, match=r"several layers: f, g\. Choose one with --layer"):
        FeatureStore.open(table_at(tmp_path / "two", LISTS, g=LISTS))


def test_missing_unfinished_and_empty_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No finished features"):
        FeatureStore.open(str(tmp_path / "none"))
    write(tmp_path / "half", blobs(20))
    (tmp_path / "half" / STARTED).write_text("{}")
    with pytest.raises(UserError, match="No finished features"):
        FeatureStore.open(str(tmp_path / "half"))
    write(tmp_path / "empty", blobs(20), files=1)
    none = pq.read_table(tmp_path / "empty" / "000.parquet").slice(0, 0)
    pq.write_table(none, tmp_path / "empty" / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet has no rows"):
        FeatureStore.open(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"is a file\. Give the folder"):
        FeatureStore.open(str(tmp_path / "half" / "000.parquet"))


def made(folder: Path, rows_nd: NDArray[np.float32]) -> str:
    """Write features as raysl does, in two parts, with paths."""
    parts = [(0, 50), (50, 100)]
    for first, end in parts:
        paths = pa.array([f"cats/{i}.jpg" for i in range(first, end)])
        write_part(Folder(str(folder)), (first, end), "res4", rows_nd[first:end], FeatureForm(), paths)
    write_record(Folder(str(folder)), FINISHED, {"parts": parts, "teacher": "T"})
    return str(folder)


def test_paths_come_along_and_open_in_pandas(tmp_path: Path) -> None:
    uri = made(tmp_path, blobs(100))
    store = FeatureStore.open(uri)
    assert store.has_paths
    assert repr(store) == f"FeatureStore({uri!r}: 100 rows of 6 numbers, layer 'res4')"
    pieces = store.shards(3)[1]
    paths = store.paths(pieces)
    assert paths is not None
    assert paths.to_pylist() == [f"cats/{i}.jpg" for i in range(33, 66)]
    frame = pq.read_table(f"{uri}/{part_file((50, 100))}").to_pandas()
    assert frame["path"][0] == "cats/50.jpg"
    assert len(frame["res4"][0]) == 6


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (pa.array(["a"] * 12), ["a"] * 12),
        (pa.array(["a"] * 12).dictionary_encode(), ["a"] * 12),
        (pa.array(["a"] * 12, pa.large_string()), ["a"] * 12),
        (pa.array([b"\xff"] * 12), None),
        (pa.array([{"a": 1}] * 12), None),
        (pa.nulls(12), None),
    ],
)
def test_a_column_path_of_other_programs_is_read_if_it_is_text(
    tmp_path: Path, paths: pa.Array, expected: list[str] | None
) -> None:
    store = FeatureStore.open(table_at(tmp_path, LISTS, path=paths))
    found = store.paths(store.shards(1)[0])
    assert (found and found.to_pylist()) == expected


def test_files_of_other_programs_that_are_written_again_are_other_features(tmp_path: Path) -> None:
    uri = write(tmp_path, blobs(40))
    before = FeatureStore.open(uri)
    (tmp_path / "notes.txt").touch()
    assert FeatureStore.open(uri).identity() == before.identity()
    write(tmp_path, blobs(40, seed=1))
    for file in tmp_path.glob("*.parquet"):
        os.utime(file, (1, 1))
    now = FeatureStore.open(uri)
    assert now.num_rows == before.num_rows
    assert now.identity() != before.identity()


def test_features_of_raysl_are_known_by_their_origin_wherever_they_lie(tmp_path: Path) -> None:
    stores = []
    for name in ("a", "b"):
        uri = made(tmp_path / name, blobs(100))
        write_record(
            Folder(uri), FINISHED, {"parts": [(0, 50), (50, 100)], "encoder": "E", "fingerprint": "F"}
        )
        stores.append(FeatureStore.open(uri))
    assert stores[0].identity() == stores[1].identity()


def test_damage_is_never_used(tmp_path: Path) -> None:
    """Truncated, flipped, empty and absent files are named, or the flipped bit changes nothing."""
    rows_nd = blobs(100)
    uri = made(tmp_path, rows_nd)
    generator = np.random.default_rng(0)
    for name in (part_file((0, 50)), FINISHED):
        file = tmp_path / name
        data = file.read_bytes()
        for size in (0, len(data) // 2, len(data) - 3):
            file.write_bytes(data[:size])
            check_damaged(uri, name)
        file.unlink()
        if name != FINISHED:
            check_damaged(uri, name)
        for bit in generator.integers(0, 8 * len(data), 60).tolist():
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with contextlib.suppress(UserError):
                store = FeatureStore.open(uri)
                assert (store.load() == rows_nd).all()
                assert store.metadata["teacher"] == "T"
        file.write_bytes(data)


def check_damaged(uri: str, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is damaged") as caught:
        FeatureStore.open(uri).load()
    assert "make the features again" in str(caught.value)


def test_numbers_beyond_half_precision_are_kept(tmp_path: Path) -> None:
    """An untrained ResNet-101 reaches 204,653 in res4 at 224 pixels."""
    folder, parts = Folder(str(tmp_path)), ((0, 2), (2, 4))
    small_nd, large_nd = np.full((2, 3), 65504, np.float32), np.full((2, 3), -204653, np.float32)
    for part, values_nd in zip(parts, (small_nd, large_nd), strict=True):
        write_part(folder, part, "res4:3", values_nd, FeatureForm("float16"))
    schemas = [pq.read_schema(f"{tmp_path}/{part_file(part)}") for part in parts]
    assert [str(schema.field("res4:3").type.value_type) for schema in schemas] == ["halffloat", "float"]
    store = FeatureStore.open(str(folder))
    np.testing.assert_array_equal(store.load(), np.concatenate([small_nd, large_nd]))
    assert store.itemsize == 4


@pytest.mark.parametrize("module", ["raysl.storage.feature_store", "raysl.clustering.kmeans_worker"])
def test_actors_are_free_of_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in ('torch', 'faiss') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
