"""Features on disk are divided by rows, and what cannot be clustered is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.clustering.actor_pool import share
from raysl.clustering.feature_rows import Rows, disjoint, sample
from raysl.clustering.lloyd import fit
from raysl.clustering.options import KMeansConfig
from raysl.errors import UserError
from tests.clustering.blobs import blobs, write


def test_shards_differ_by_one_row_and_hold_every_row_once(tmp_path: Path) -> None:
    rows_nd = blobs(101)
    rows = Rows.open(write(tmp_path, rows_nd, files=3, rows_per_group=13))
    assert (rows.num_rows, rows.dim, rows.column) == (101, 6, "pooled")
    for shards in (1, 2, 5, 101):
        divided = rows.divide(shards)
        lengths = [sum(piece.num_rows for piece in pieces) for pieces in divided]
        assert sum(lengths) == 101
        assert max(lengths) - min(lengths) <= 1
        read = [batch for pieces in divided for piece in pieces for batch in rows.batches(piece, 5 * 24)]
        assert np.concatenate([indices for indices, _ in read]).tolist() == list(range(101))
        np.testing.assert_array_equal(np.concatenate([values for _, values in read]), rows_nd)


def test_files_are_not_kept_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    uri = write(tmp_path, blobs(40), files=20)
    before = opened()
    rows = Rows.open(uri)
    assert len({group.file for group in rows.groups}) == 20
    assert opened() == before


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a shard would be empty"):
        Rows.open(write(tmp_path, blobs(3), files=1)).divide(4)


def test_more_clusters_than_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="k is 10 and there are 9 rows"):
        fit(write(tmp_path, blobs(9)), KMeansConfig(k=10))
    with pytest.raises(UserError, match="there are 5 rows"):
        fit(str(tmp_path), KMeansConfig(k=6, max_rows=5))


def table(values: Any) -> pa.Table:
    return pa.table({"index": np.arange(len(values)), "pooled": values})


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    write(tmp_path / "fixed", blobs(20, dim=6), files=1)
    narrow = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float32)), 4)
    pq.write_table(table(narrow), tmp_path / "fixed" / "zzz.parquet")
    with pytest.raises(UserError, match=r"4 in zzz\.parquet"):
        Rows.open(str(tmp_path / "fixed"))
    (tmp_path / "free").mkdir()
    lists = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0]], pa.list_(pa.float32()))
    pq.write_table(table(lists), tmp_path / "free" / "0.parquet")
    rows = Rows.open(str(tmp_path / "free"))
    with pytest.raises(UserError, match="not 2 numbers long"):
        list(rows.batches(rows.divide(1)[0][0]))


def test_files_that_are_missing_empty_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No finished features"):
        Rows.open(str(tmp_path / "none"))
    write(tmp_path / "half", blobs(20))
    (tmp_path / "half" / "source.json").write_text("{}")
    with pytest.raises(UserError, match="No finished features"):
        Rows.open(str(tmp_path / "half"))
    write(tmp_path / "empty", blobs(20), files=1)
    pq.write_table(
        pq.read_table(tmp_path / "empty" / "000.parquet").slice(0, 0), tmp_path / "empty" / "1.parquet"
    )
    with pytest.raises(UserError, match=r"1\.parquet has no rows"):
        Rows.open(str(tmp_path / "empty"))
    write(tmp_path / "cut", blobs(20), files=1)
    file = tmp_path / "cut" / "000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        Rows.open(str(tmp_path / "cut"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_numbers_that_have_no_square(tmp_path: Path, value: float) -> None:
    rows_nd = blobs(20)
    rows_nd[12, 3] = value
    rows = Rows.open(write(tmp_path, rows_nd, files=1))
    piece = rows.divide(1)[0][0]
    with pytest.raises(UserError, match="index 12"):
        rows.check(piece, *next(rows.batches(piece)))


def test_layers_by_name(tmp_path: Path) -> None:
    write(tmp_path, blobs(20), files=1)
    with pytest.raises(UserError, match="pooled"):
        Rows.open(str(tmp_path), "poled")


def test_a_sample_is_sorted_distinct_and_repeatable() -> None:
    chosen = sample(1000, 50, 7)
    assert len(np.unique(chosen)) == 50
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, sample(1000, 50, 7))


def test_actors_are_free_of_torch() -> None:
    code = "import raysl.clustering.kmeans_worker, sys; print([name for name in ('torch', 'faiss') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_ranges_of_indices() -> None:
    assert disjoint([(10, 19), (0, 9)])
    assert not disjoint([(0, 10), (10, 19)])


def test_actors_always_fit() -> None:
    two = share([{"CPU": 2, "memory": 8e9}])
    assert (two.actors, two.cpus, two.threads, two.memory_bytes) == (2, 0.5, 1, 2_000_000_000)
    assert share([{"CPU": 2}], actors=4).cpus == 0.25
    large = share([{"CPU": 16, "memory": 64e9}] * 3)
    assert (large.actors, large.threads, large.cpus) == (12, 4, 2)
    gpus = share([{"CPU": 8, "GPU": 2}, {"CPU": 4}])
    assert (gpus.actors, gpus.gpus) == (2, 1)
    with pytest.raises(UserError, match="at most 2"):
        share([{"CPU": 8, "GPU": 2}], actors=3)
