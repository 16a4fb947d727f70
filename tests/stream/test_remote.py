"""Reading a remote store: few requests, the same batches, and another try after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysl import storage
from raysl.augment import recipe
from raysl.dataset import DataSet
from raysl.pretext import Geometry, build
from raysl.storage import Folder, parquet_parts
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.plan import Plan
from raysl.stream.reader import Columns, Stream
from raysl.stream.views import View
from tests.data import make_dataset
from tests.slow_store import BUCKET, counts, served

IMAGES, GROUP, SHARDS = 160, 20, 2


@pytest.fixture
def local(tmp_path: Path) -> DataSet:
    return make_dataset(tmp_path / "set", IMAGES, rows_per_group=GROUP)


@pytest.fixture
def store(tmp_path: Path, local: DataSet) -> Iterator[str]:
    with served(tmp_path) as address:
        yield address
        storage.filesystem.cache_clear()
        storage._opened.cache_clear()
        parquet_parts.metadata.cache_clear()


def remote(local: DataSet) -> DataSet:
    return DataSet(Folder(f"s3://{BUCKET}/set"), local.manifest)


def stream(dataset: DataSet) -> Stream:
    plan = replace(Plan.of(dataset, 16, seed=3, epochs=1), groups_per_window=1, steps_per_block=2)
    views = {"image": View(build("identity", {}, Geometry(image_size=16)), recipe("plain"))}
    return Stream(dataset, plan, views)


def batches(one: Stream) -> list[Columns]:
    tasks = np.arange(-(-one.plan.num_steps // one.task_steps))
    return list(MakeBatches(one, 0, one.plan.num_steps)({"id": tasks}))


def test_a_shard_takes_two_requests_once_and_a_row_group_one(store: str, local: DataSet) -> None:
    there = remote(local)
    everything = np.arange(IMAGES)
    there.read(everything[::GROUP])
    cold = counts(store)
    assert cold["HEAD"] - SHARDS in (0, 1), "a size for each shard, and the region of the bucket"
    # Row groups of this data set are neighbors, so those of a shard are one request.
    assert cold["GET"] == 2 * SHARDS
    there.read(everything[::GROUP])
    assert counts(store)["GET"] == SHARDS
    # Every second row group: they are no neighbors.
    there.read(everything[:: 2 * GROUP])
    warm = counts(store)
    assert warm["GET"] == IMAGES // GROUP // 2
    assert "HEAD" not in warm


def test_batches_from_a_remote_store_are_the_same(store: str, local: DataSet) -> None:
    expected, found = batches(stream(local)), batches(stream(remote(local)))
    assert len(expected) == len(found) == 10
    for here, there in zip(expected, found, strict=True):
        assert here.keys() == there.keys()
        for name, values in here.items():
            np.testing.assert_array_equal(values, there[name])


def test_a_task_of_a_remote_store_covers_several_short_stretches(local: DataSet) -> None:
    assert stream(local).task_steps == 2
    assert stream(remote(local)).task_steps > 2


def test_all_labels_are_one_request(store: str, tmp_path: Path, local: DataSet) -> None:
    labels = local.labels()
    DataSet.create(local.folder, local.manifest, [labels])
    there = DataSet(Folder(f"s3://{BUCKET}/set"), DataSet.open(str(tmp_path / "set")).manifest)
    np.testing.assert_array_equal(there.labels(), labels)
    assert counts(store)["GET"] == 1


def test_a_file_that_was_replaced_is_read_with_its_new_size(store: str, tmp_path: Path) -> None:
    folder = Folder(f"s3://{BUCKET}")
    for content in (b"short", b"a longer content", b"12"):
        (tmp_path / "file").write_bytes(content)
        assert folder.read_ranges("file", [(0, len(content)), (1, 1)]) == [content, content[1:2]]
