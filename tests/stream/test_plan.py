"""The order of a run: every image once in each epoch, for any number of workers, from any step."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysl.dataset import DataSet, Manifest, Rows, Shard
from raysl.errors import UserError
from raysl.storage import Folder
from raysl.stream.plan import Plan


def dataset(*row_groups: int, bytes_per_row: int = 1000) -> DataSet:
    """A data set that consists of its manifest."""
    shard = Shard("00000.parquet", row_groups, sum(row_groups) * bytes_per_row)
    return DataSet(Folder("unused"), Manifest("test", (shard,), (), "f", 0))


def plan(
    num_images: int = 300, rows_per_group: int = 20, batch: int = 16, seed: int = 0, epochs: float = 3
) -> Plan:
    sizes = [min(rows_per_group, num_images - first) for first in range(0, num_images, rows_per_group)]
    return Plan.of(dataset(*sizes), batch, seed, epochs)


def whole_run(of: Plan) -> Rows:
    parts = [of.rows(step) for step in range(of.num_steps)]
    return Rows(np.concatenate([p.indices_b for p in parts]), np.concatenate([p.epochs_b for p in parts]))


def assert_once_in_each_epoch(of: Plan, epochs: float) -> None:
    """Every image is visited once in each whole epoch, and no image twice in the part of one that ends the run."""
    visits = whole_run(of)
    num_images = of.num_images
    for epoch in range(int(visits.epochs_b.max()) + 1):
        indices = visits.indices_b[visits.epochs_b == epoch]
        assert len(np.unique(indices)) == len(indices)
        if epoch + 1 <= round(epochs * num_images) // num_images:
            assert len(indices) == num_images
    # No more than a batch beyond what was asked for.
    assert 0 <= len(visits) - round(epochs * num_images) < of.batch_size


@settings(max_examples=60, deadline=None)
@given(
    row_groups=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch=st.integers(1, 48),
    epochs=st.sampled_from([0.3, 1, 1.1, 2, 2.5, 7]),
    window_groups=st.none() | st.integers(1, 5),
)
def test_every_image_once_in_each_epoch(
    row_groups: list[int], batch: int, epochs: float, window_groups: int | None
) -> None:
    batch = min(batch, sum(row_groups))
    of = Plan.of(dataset(*row_groups), batch, 3, epochs)
    if window_groups is not None:
        of = replace(of, groups_per_window=window_groups, steps_per_block=1 + window_groups)
    if round(epochs * of.num_images) > 0:
        assert_once_in_each_epoch(of, epochs)


@pytest.mark.parametrize("batch", [8, 16, 24])
def test_workers_share_the_same_ordered_batch(batch: int) -> None:
    of = plan(batch=batch)
    for step in (0, 7, of.num_steps - 1):
        whole = of.rows(step)
        for world in (1, 2, 4, 8):
            parts = [of.rows(step, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {batch // world}
            np.testing.assert_array_equal(np.concatenate([p.indices_b for p in parts]), whole.indices_b)
            np.testing.assert_array_equal(np.concatenate([p.epochs_b for p in parts]), whole.epochs_b)


def test_any_step_can_be_the_first() -> None:
    steps = [plan().rows(step) for step in range(plan().num_steps)]
    for step in reversed(range(plan().num_steps)):
        found = pickle.loads(pickle.dumps(plan())).rows(step)
        np.testing.assert_array_equal(found.indices_b, steps[step].indices_b)
        np.testing.assert_array_equal(found.epochs_b, steps[step].epochs_b)


def orders(of: Plan) -> list[NDArray[np.int64]]:
    visits = whole_run(of)
    return [visits.indices_b[visits.epochs_b == epoch] for epoch in range(3)]


def test_epochs_and_seeds_differ_in_order() -> None:
    for rows_per_group in (1, 20, 300):
        found = orders(plan(rows_per_group=rows_per_group)) + orders(
            plan(rows_per_group=rows_per_group, seed=1)
        )
        assert len({order.tobytes() for order in found}) == 6
        for order in found:
            # Nothing of the order on disk is left: a neighbor in the stream is rarely a neighbor on disk.
            assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


def test_a_batch_that_straddles_two_epochs_is_an_ordinary_one() -> None:
    of = plan(num_images=25, rows_per_group=5, batch=10, epochs=2)
    epochs = [set(of.rows(step).epochs_b.tolist()) for step in range(of.num_steps)]
    assert of.num_steps == 5
    assert {0, 1} in epochs
    assert {len(of.rows(step)) for step in range(of.num_steps)} == {10}


def test_a_small_data_set_keeps_its_epochs_apart() -> None:
    of = plan(num_images=500, rows_per_group=100, batch=20, epochs=40)
    for step in range(of.num_steps):
        rows = of.rows(step)
        assert set(rows.epochs_b.tolist()) == {step // 25}
        assert len(np.unique(rows.indices_b)) == 20


def test_batches_mix_the_data_set() -> None:
    of = plan(num_images=20_000, rows_per_group=100, batch=64, epochs=1)
    groups = [len(np.unique(of.rows(step).indices_b // 100)) for step in range(0, of.num_steps, 20)]
    assert np.mean(groups) > 30


def test_workers_read_row_groups_of_their_own() -> None:
    of = plan(num_images=64_000, rows_per_group=500, batch=64, epochs=1)
    steps = range(of.steps_per_block)
    read = [
        {g for step in steps for g in (of.rows(step, rank, 8).indices_b // 500).tolist()} for rank in range(8)
    ]
    # Each group would be read by all eight workers if batches were dealt out row by row.
    assert sum(map(len, read)) <= 2 * len(set().union(*read))


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(1.1, 100, 11), (0.7, 100, 7), (1, 300, 4), (2, 300, 7), (1e-9, 10, 1)]
)
def test_number_of_steps(epochs: float, batch: int, steps: int) -> None:
    assert plan(num_images=1000, rows_per_group=100, batch=batch, epochs=epochs).num_steps == steps


def test_a_billion_images_in_a_million_row_groups() -> None:
    starts = np.arange(1_000_001, dtype=np.int64) * 1000
    of = Plan(starts, 4096, 0, groups_per_window=1, steps_per_block=2, num_steps=10**9)
    tracemalloc.start()
    rows = of.rows(123_456_789, rank=3, world=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Some numbers for each row group, and none for each image.
    assert peak < 64e6
    assert len(rows) == 512
    assert rows.epochs_b[0] == 123_456_789 * 4096 // 10**9


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(UserError, match="batch-size is 301 and the data set has 300 images"):
        plan(batch=301)


def test_a_batch_that_the_workers_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"is 16; with 3 workers it must be a multiple of 3, such as 15"):
        plan().rows(0, 0, 3)
