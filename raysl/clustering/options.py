"""What a clustering computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from raysl.errors import UserError

# Where it runs, and not what it computes: a clustering may go on with other values.
FREE = ("actors", "memory_gb")


@dataclass(frozen=True)
class KMeansConfig:
    """Lloyd's k-means, every row assigned exactly in every iteration.

    Args:
        k: number of clusters.
        iterations: most iterations of each start.
        tolerance: stop when the objective falls by at most this share in an iteration; 0 waits until it no longer
            falls.
        init: where the centroids start: "rows" takes k rows at random, as faiss does; "k-means++" (Arthur and
            Vassilvitskii 2007) needs k passes over the rows; "k-means||" (Bahmani et al. 2012) needs six, and then
            chooses k of about 10 k candidates in this process, which suits k up to a few thousand.
        spherical: keep centroids at length 1, so that rows go to the centroid with the largest cosine.
        restarts: starts, of which the one with the lowest objective is kept.
        seed: of all that is random.
        max_rows: most rows that centroids are fitted to, chosen at random; 0 for all. Every row gets its cluster.
        layer: which features, where there are several.
        actors: how many share the rows; 0 for what the cluster has.
        memory_gb: rows that an actor keeps in memory; shards above that are read again in every iteration. 0 for a
            share of what its machine has.
    """

    k: int
    iterations: int = 50
    tolerance: float = 1e-5
    init: Literal["rows", "k-means++", "k-means||"] = "rows"
    spherical: bool = False
    restarts: int = 1
    seed: int = 0
    max_rows: int = 0
    layer: str = ""
    actors: int = 0
    memory_gb: float = 0

    def __post_init__(self) -> None:
        for name in ("k", "iterations", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("tolerance", "max_rows", "actors", "memory_gb"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.init not in ("rows", "k-means++", "k-means||"):
            raise UserError(f"init is {self.init!r}; it may be rows, k-means++ or k-means||.")

    def facts(self) -> dict[str, Any]:
        """A JSON value of what decides the result."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
