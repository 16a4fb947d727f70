"""The random numbers of an image depend on (seed, epoch, index, name) and on nothing else."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysl.rng import ImageRng, generator, key

# A loaded machine may be slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

seeds = st.integers(0, 2**63 - 1)
index_lists = st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=20, unique=True)
epochs = st.integers(0, 100_000)


def image_rng(seed: int, epoch: int, indices: list[int] | range) -> ImageRng:
    return ImageRng(seed, np.full(len(indices), epoch, dtype=np.int64), np.array(indices, dtype=np.int64))


@given(seeds, epochs, index_lists, st.integers(1, 5), st.randoms())
def test_numbers_do_not_depend_on_the_batch(
    seed: int, epoch: int, indices: list[int], count: int, order: random.Random
) -> None:
    together = image_rng(seed, epoch, indices).uniform_array("x", count)
    alone = np.concatenate([image_rng(seed, epoch, [i]).uniform_array("x", count) for i in indices])
    assert (together == alone).all()
    positions = list(range(len(indices)))
    order.shuffle(positions)
    shuffled = image_rng(seed, epoch, [indices[p] for p in positions]).uniform_array("x", count)
    assert (shuffled == together[positions]).all()


@given(seeds, epochs, index_lists, st.integers(1, 9))
def test_crops_of_an_image_do_not_depend_on_the_batch(
    seed: int, epoch: int, indices: list[int], p: int
) -> None:
    together = image_rng(seed, epoch, indices).repeated(p).uniform_array("x", 2)
    alone = np.concatenate([image_rng(seed, epoch, [i]).repeated(p).uniform_array("x", 2) for i in indices])
    assert (together == alone).all()
    assert len(np.unique(together[:, 0])) == len(indices) * p


@given(seeds, index_lists, st.integers(1, 1_000_000))
def test_ranges(seed: int, indices: list[int], below: int) -> None:
    d = image_rng(seed, 0, indices)
    array = d.uniform_array("x", 3)
    assert ((array >= 0) & (array < 1)).all()
    whole = d.integers("x", below, 3)
    assert whole.dtype == torch.int64
    assert ((whole >= 0) & (whole < below)).all()
    assert d.uniform("x", -2, 5, 3).dtype == torch.float32
    assert not d.chance("x", 0).any()
    assert d.chance("x", 1).all()


@given(seeds, epochs)
def test_seed_epoch_and_name_all_matter(seed: int, epoch: int) -> None:
    d = image_rng(seed, epoch, range(8))
    numbers = [
        d.uniform_array("x", 4),
        d.uniform_array("y", 4),
        d.named("x").uniform_array("x", 4),
        image_rng(seed, epoch + 1, range(8)).uniform_array("x", 4),
        image_rng(seed + 1, epoch, range(8)).uniform_array("x", 4),
        d.repeated(1).uniform_array("x", 4),
    ]
    assert len(np.unique(np.concatenate(numbers))) == 6 * 8 * 4


def chi2_per_degree(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


def test_numbers_are_uniform_over_images_epochs_and_counts() -> None:
    for array in (
        image_rng(0, 0, range(60_000)).uniform_array("x", 1),
        image_rng(0, 0, range(10)).uniform_array("x", 6_000),
        np.concatenate([image_rng(0, e, range(60)).uniform_array("x", 1) for e in range(1000)]),
        np.concatenate([image_rng(s, 0, range(60)).uniform_array("x", 1) for s in range(1000)]),
    ):
        counts = np.bincount((array.ravel() * 100).astype(np.int64), minlength=100)
        assert 0.5 < chi2_per_degree(counts) < 1.6


def test_neighboring_numbers_are_independent() -> None:
    array = image_rng(5, 2, range(40_000)).uniform_array("x", 2)
    for first, second in ((array[:, 0], array[:, 1]), (array[:-1, 0], array[1:, 0])):
        cells = (first * 10).astype(np.int64) * 10 + (second * 10).astype(np.int64)
        assert 0.5 < chi2_per_degree(np.bincount(cells, minlength=100)) < 1.6


def test_keys_tell_parts_types_and_order_apart() -> None:
    keys = {key("a", "b"), key("b", "a"), key("ab"), key(1), key("1"), key("a", 1), key("a1")}
    assert len(keys) == 7
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
