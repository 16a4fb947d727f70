"""Where the centroids start: one choice for all actors, from a seed, whatever the number of actors."""

from __future__ import annotations

import numpy as np

from raysl import rng
from raysl.clustering.actor_pool import Crew
from raysl.clustering.feature_rows import Integers, sample
from raysl.clustering.options import KMeansConfig
from raysl.clustering.update import Doubles, Singles, unit

# Bahmani et al. 2012, section 5: five rounds that take 2 k rows each suffice.
_ROUNDS = 5
_OVERSAMPLING = 2


def start(crew: Crew, config: KMeansConfig, restart: int) -> Singles:
    """float32 (k, d): the first centroids of a start."""
    choose = {"rows": random_rows, "k-means++": plus_plus, "k-means||": parallel}[config.init]
    centroids_kd = choose(crew, config, restart)
    return unit(centroids_kd.astype(np.float64)).astype(np.float32) if config.spherical else centroids_kd


def fitted(config: KMeansConfig, num_rows: int) -> tuple[int, int, int] | None:
    """The rows that centroids are fitted to, as arguments of `rows.sample`; None for all."""
    if not config.max_rows or config.max_rows >= num_rows:
        return None
    return num_rows, config.max_rows, rng.key(config.seed, "kmeans", "fit")


def random_rows(crew: Crew, config: KMeansConfig, restart: int) -> Singles:
    """k rows at random, each at most once."""
    generator = rng.generator(config.seed, "kmeans", "rows", restart)
    return crew.take(_pick(crew, config, generator, config.k))


def plus_plus(crew: Crew, config: KMeansConfig, restart: int) -> Singles:
    """k-means++ (Arthur and Vassilvitskii 2007): each row with a chance in proportion to its squared distance from
    the centroids before it."""
    generator = rng.generator(config.seed, "kmeans", "plus-plus", restart)
    chosen = [crew.take(_pick(crew, config, generator, 1))]
    for number in range(config.k - 1):
        sums = np.array(crew.every("closer", number, chosen[-1]))
        if sums.sum() == 0:  # every row is a centroid already
            chosen.append(crew.take(_pick(crew, config, generator, config.k - len(chosen))))
            break
        target = generator.random() * sums.sum()
        ends = np.cumsum(sums)
        actor = min(int(np.searchsorted(ends, target, side="right")), len(sums) - 1)
        chosen.append(crew.one(actor, "draw", target - (ends[actor] - sums[actor])))
    return np.concatenate(chosen)


def parallel(crew: Crew, config: KMeansConfig, restart: int) -> Singles:
    """k-means|| (Bahmani et al. 2012): candidates in a few rounds, then k-means++ among them, weighted by the rows
    that are nearest to each."""
    generator = rng.generator(config.seed, "kmeans", "parallel", restart)
    candidates = [crew.take(_pick(crew, config, generator, 1))]
    for number in range(_ROUNDS):
        total = sum(crew.every("closer", number, candidates[-1]))
        key = rng.key(config.seed, "kmeans", "oversample", restart, number)
        factor = _OVERSAMPLING * config.k / total if total else 0.0
        drawn = np.concatenate(crew.every("oversample", key, factor))
        if not len(drawn):
            break
        candidates.append(drawn)
    candidates_md = np.concatenate(candidates)
    if len(candidates_md) <= config.k:
        more = _pick(crew, config, generator, config.k - len(candidates_md))
        return np.concatenate([candidates_md, crew.take(more)])
    weights_m = np.sum(crew.every("count", candidates_md), axis=0)
    return weighted_plus_plus(candidates_md, weights_m, config.k, generator)


def weighted_plus_plus(
    rows_md: Singles, weights_m: Integers, k: int, generator: np.random.Generator
) -> Singles:
    """k of m rows by k-means++, each row counted as often as its weight says."""
    weights = weights_m.astype(np.float64)
    lengths_m = np.einsum("md,md->m", rows_md, rows_md)
    squared_m: Doubles = np.ones(len(rows_md))
    free_m = np.ones(len(rows_md), bool)
    chosen: list[int] = []
    for _ in range(k):
        chances_m = np.where(free_m, weights * squared_m, 0)
        if chances_m.sum() == 0:
            chances_m = free_m.astype(np.float64)
        ends = np.cumsum(chances_m)
        row = min(int(np.searchsorted(ends, generator.random() * ends[-1], side="right")), len(ends) - 1)
        distances_m = np.maximum(lengths_m - 2 * rows_md @ rows_md[row] + lengths_m[row], 0)
        squared_m = np.minimum(squared_m, distances_m) if chosen else distances_m.astype(np.float64)
        free_m[row] = False
        chosen.append(row)
    return rows_md[chosen]


def _pick(crew: Crew, config: KMeansConfig, generator: np.random.Generator, count: int) -> Integers:
    """Positions of `count` rows among those that are fitted to, without replacement."""
    fit = fitted(config, crew.rows.num_rows)
    total = sum(crew.num_fitted)
    places = generator.choice(total, count, replace=False).astype(np.int64)
    return places if fit is None else sample(*fit)[places]
