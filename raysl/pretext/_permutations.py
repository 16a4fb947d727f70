"""Choose sets of permutations of the tiles of a jigsaw that differ much from each other.

Noroozi and Favaro 2016, "Unsupervised learning of visual representations by solving jigsaw puzzles", algorithm 1:
greedily add the permutation whose Hamming distance to the chosen permutations is largest, on average or at least.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysl.errors import UserError
from raysl.rng import generator
from raysl.storage.records import short_hash

Criterion = Literal["max_min", "max_avg", "random"]
Permutations = NDArray[np.uint8]

# All permutations of nine tiles can be listed. With more tiles, sets are chosen from a random sample.
_MAX_LISTED_TILES = 9
_SAMPLE = 100_000


@dataclass(frozen=True)
class PermutationSet:
    """Permutations of n tiles.

    Args:
        order_kp: uint8 (k, n). Row j is permutation j: slot p shows tile order_kp[j, p]. Read-only.
        min_hamming: smallest number of positions in which two permutations differ; n when there is only one.
        mean_hamming: mean of that number over all pairs; n when there is only one.
        digest: hash of the permutations, equal for equal sets on every machine.
    """

    order_kp: Permutations
    min_hamming: int
    mean_hamming: float
    digest: str

    def __reduce__(self) -> tuple[Any, ...]:
        # All permutations of nine tiles are 3 MB and quick to list; a chosen set is small and slow to choose.
        k, n = self.order_kp.shape
        if k == math.factorial(n):
            return permutation_set, (n, k, "random", 0)
        return _described, (self.order_kp,)


@functools.cache
def permutation_set(n: int, count: int, criterion: Criterion, seed: int) -> PermutationSet:
    """Choose `count` distinct permutations of `n` tiles. The result is cached in the process.

    Args:
        count: 1 .. n!; n! lists all permutations in lexicographic order, for any criterion. At most 100,000 for more
            than nine tiles.
        criterion: "max_min" maximizes the distance of the nearest pair, "max_avg" that of the average pair; "random"
            samples.
        seed: seed of the first permutation and of random sets.

    Raises:
        UserError: the count is not allowed.
    """
    total = math.factorial(n)
    most = total if n <= _MAX_LISTED_TILES else _SAMPLE
    if not 1 <= count <= most:
        raise UserError(
            f"--jigsaw.num-permutations is {count:,}; with {n} tiles there are {total:,} permutations, and a set has 1 "
            f"to {most:,} of them."
        )
    if count == total:
        return _described(_every(n))
    rng = generator("permutations", n, seed)
    candidates = _candidates(n, rng)
    if criterion == "random":
        return _described(candidates[rng.permutation(len(candidates))[:count]])
    return _described(candidates[_greedy(candidates, count, criterion, int(rng.integers(len(candidates))))])


def _every(n: int) -> Permutations:
    """Return all permutations in lexicographic order, uint8 (n!, n)."""
    orders = itertools.chain.from_iterable(itertools.permutations(range(n)))
    return np.fromiter(orders, np.uint8, n * math.factorial(n)).reshape(-1, n)


def _candidates(n: int, rng: np.random.Generator) -> Permutations:
    """Return all permutations if they can be listed, otherwise a random sample of distinct ones."""
    if n <= _MAX_LISTED_TILES:
        return _every(n)
    sample = rng.permuted(np.tile(np.arange(n, dtype=np.uint8), (_SAMPLE + _SAMPLE // 8, 1)), axis=1)
    _, first = np.unique(sample, axis=0, return_index=True)
    return sample[np.sort(first)[:_SAMPLE]]


def _greedy(candidates: Permutations, count: int, criterion: Criterion, first: int) -> NDArray[np.int64]:
    """Return the rows of the chosen candidates. Each candidate has a cost, which every chosen one updates."""
    columns = np.ascontiguousarray(candidates.T)
    chosen = np.empty(count, dtype=np.int64)
    taken = np.int32(np.iinfo(np.int32).max)
    cost = np.zeros(len(candidates), dtype=np.int32)
    for i in range(count):
        chosen[i] = first if i == 0 else int(np.argmin(cost))
        matches = np.zeros(len(candidates), dtype=np.uint8)
        for column, value in zip(columns, candidates[chosen[i]], strict=True):
            matches += column == value
        if criterion == "max_avg":
            cost += matches
        else:
            np.maximum(cost, matches, out=cost)
        cost[chosen[: i + 1]] = taken
    return chosen


def _described(order_kp: Permutations) -> PermutationSet:
    order_kp = np.ascontiguousarray(order_kp)
    order_kp.setflags(write=False)
    digest = short_hash(order_kp.tobytes())
    return PermutationSet(order_kp, _min_hamming(order_kp), _mean_hamming(order_kp), digest)


def _mean_hamming(order_kp: Permutations) -> float:
    """Return the exact mean: count the pairs that agree in a position by the values in its column."""
    k, n = (int(length) for length in order_kp.shape)
    if k == 1:
        return float(n)
    agreeing = 0
    for column in order_kp.T:
        counts = np.bincount(column, minlength=n)
        agreeing += int((counts * (counts - 1)).sum())
    return n - agreeing / (k * (k - 1))


def _min_hamming(order_kp: Permutations) -> int:
    """Return the exact minimum: 2 when two permutations differ by one swap, otherwise over all pairs."""
    k, n = (int(length) for length in order_kp.shape)
    if k == 1:
        return n
    if k == math.factorial(n) or _has_swapped_pair(order_kp):
        return 2
    onehot = (order_kp[:, :, None] == np.arange(n, dtype=np.uint8)).reshape(k, n * n).astype(np.float32)
    block, most = 1024, 0
    for start in range(0, k, block):
        matches = onehot[start : start + block] @ onehot[start:].T
        np.fill_diagonal(matches, 0)
        most = max(most, int(matches.max()))
    return n - most


def _has_swapped_pair(order_kp: Permutations) -> bool:
    """Return whether two permutations differ by one swap, the smallest possible difference."""
    n = order_kp.shape[1]
    rows = np.dtype((np.void, n))
    known = np.unique(order_kp.view(rows)[:, 0])
    for i in range(n):
        for j in range(i):
            swapped = order_kp.copy()
            swapped[:, [i, j]] = swapped[:, [j, i]]
            if np.isin(swapped.view(rows)[:, 0], known).any():
                return True
    return False
