"""Initial centroids: one choice from a seed, the same on any number of actors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.clustering.actor_pool import ActorPool
from raysl.clustering.kmeans_worker import SampleArguments, sample
from raysl.clustering.options import KMeansConfig
from raysl.clustering.update import unit


def initial_centroids(pool: ActorPool, config: KMeansConfig, restart: int) -> NDArray[np.float32]:
    """Return the initial centroids of a start, float32 (k, d)."""
    if config.init == "k-means++":
        centroids_kd = _plus_plus(pool, config, restart)
    else:
        generator = rng.generator(config.seed, "kmeans", "rows", restart)
        centroids_kd = pool.take(_random_positions(pool, config, generator, config.k))
    return unit(centroids_kd.astype(np.float64)).astype(np.float32) if config.spherical else centroids_kd


def fitted_rows(config: KMeansConfig, num_rows: int) -> SampleArguments | None:
    """Return the rows to fit centroids to, as arguments of `kmeans_worker.sample`; None for all."""
    if not config.max_rows or config.max_rows >= num_rows:
        return None
    return num_rows, config.max_rows, rng.key(config.seed, "kmeans", "fit")


def _plus_plus(pool: ActorPool, config: KMeansConfig, restart: int) -> NDArray[np.float32]:
    """Choose k rows by k-means++ (Arthur and Vassilvitskii 2007).

    The probability of a row is proportional to its squared distance from the nearest centroid so far.
    """
    generator = rng.generator(config.seed, "kmeans", "plus-plus", restart)
    chosen = [pool.take(_random_positions(pool, config, generator, 1))]
    for number in range(config.k - 1):
        sums = np.array(pool.call_all("add_centroids", number, chosen[-1]))
        if sums.sum() == 0:  # Every row is a centroid already.
            chosen.append(pool.take(_random_positions(pool, config, generator, config.k - len(chosen))))
            break
        target = generator.random() * sums.sum()
        ends = np.cumsum(sums)
        actor = min(int(np.searchsorted(ends, target, side="right")), len(sums) - 1)
        chosen.append(pool.call(actor, "draw_row", target - (ends[actor] - sums[actor])))
    return np.concatenate(chosen)


def _random_positions(
    pool: ActorPool, config: KMeansConfig, generator: np.random.Generator, count: int
) -> NDArray[np.int64]:
    """Choose the positions of `count` of the fitted rows, without replacement."""
    fit = fitted_rows(config, pool.store.num_rows)
    chosen = generator.choice(sum(pool.num_fitted), count, replace=False).astype(np.int64)
    return chosen if fit is None else sample(*fit)[chosen]
