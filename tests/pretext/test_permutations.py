"""Permutation sets: what is promised of their size, distances and stability."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest

from raysl.errors import UserError
from raysl.pretext._permutations import Criterion, Permutations, permutation_set


def distances(order_kp: Permutations) -> list[int]:
    return [int((a != b).sum()) for a, b in itertools.combinations(order_kp, 2)]


@pytest.mark.parametrize("criterion", ["max_min", "max_avg", "random"])
@pytest.mark.parametrize(("n", "count"), [(4, 1), (4, 5), (4, 24), (5, 60), (9, 40), (16, 12)])
def test_rows_are_distinct_permutations_and_distances_are_exact(
    criterion: Criterion, n: int, count: int
) -> None:
    chosen = permutation_set(n, count, criterion, seed=3)
    assert chosen.order_kp.shape == (count, n)
    assert (np.sort(chosen.order_kp, axis=1) == np.arange(n)).all()
    assert len(np.unique(chosen.order_kp, axis=0)) == count
    pairs = distances(chosen.order_kp) or [n]
    assert chosen.min_hamming == min(pairs)
    assert chosen.mean_hamming == pytest.approx(np.mean(pairs))


def test_all_orders_come_in_lexicographic_order() -> None:
    every = permutation_set(9, math.factorial(9), "max_min", 0)
    assert every.order_kp[:3].tolist() == [
        list(p) for p in itertools.islice(itertools.permutations(range(9)), 3)
    ]
    assert permutation_set(4, 24, "max_avg", 0).order_kp.tolist() == [
        list(p) for p in itertools.permutations(range(4))
    ]
    assert every.min_hamming == 2
    assert every.mean_hamming == pytest.approx(8, abs=1e-4)
    assert len(pickle.dumps(every)) < 200, "a worker lists them again"
    assert pickle.loads(pickle.dumps(every)).digest == every.digest


@pytest.mark.parametrize("seed", range(3))
def test_max_min_keeps_a_hundred_orders_six_apart(seed: int) -> None:
    assert permutation_set(9, 100, "max_min", seed).min_hamming == 6


def test_max_avg_gives_the_published_distances() -> None:
    chosen = permutation_set(9, 1000, "max_avg", 0)
    assert 8.00 <= chosen.mean_hamming <= 8.02
    assert chosen.min_hamming == 2


def test_a_chosen_set_survives_pickling_and_depends_on_the_seed() -> None:
    chosen = permutation_set(9, 50, "max_min", 1)
    back = pickle.loads(pickle.dumps(chosen))
    assert back.digest == chosen.digest
    assert (back.order_kp == chosen.order_kp).all()
    assert permutation_set(9, 50, "max_min", 2).digest != chosen.digest


@pytest.mark.parametrize(("n", "count"), [(4, 0), (4, 25), (9, 362_881), (16, 1_000_000)])
def test_impossible_counts_are_refused(n: int, count: int) -> None:
    with pytest.raises(UserError, match=f"is {count:,}; with {n} tiles"):
        permutation_set(n, count, "random", 0)
