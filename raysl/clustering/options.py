"""Configuration of a clustering."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from raysl.errors import UserError, install_hint
from raysl.fields import Bounds, CheckedTop, Seed

Init = Literal["rows", "k-means++"]
# Where the clustering runs, and not what it computes: it may resume with other values.
_PLACEMENT = ("actors", "memory_gb")


def check_faiss() -> None:
    """Raise UserError when the package that k-means runs on is missing."""
    if importlib.util.find_spec("faiss") is None:
        raise UserError(
            f"Clustering needs faiss, which is not installed. {install_hint('cpu')} On a machine with an NVIDIA GPU, "
            "take the extra 'gpu' instead."
        )


@dataclass(frozen=True)
class KMeansConfig(CheckedTop):
    """Lloyd's k-means; every row is assigned exactly in every iteration.

    Args:
        k: number of clusters.
        iterations: maximum number of iterations after each initialization.
        tolerance: stop when an iteration lowers the objective by at most this fraction, 0 to 1; with 0, stop when it no
            longer falls.
        init: initial centroids: "rows" takes k random rows, as FAISS does; "k-means++" (Arthur and Vassilvitskii 2007)
            needs k passes over the rows.
        spherical: keep centroids at norm 1, so that rows go to the centroid with the largest cosine.
        restarts: number of initializations; the result with the lowest objective is kept.
        seed: seed of all randomness.
        max_rows: maximum number of rows to fit centroids to, chosen at random; 0 for all. All rows are assigned.
        layer: layer to cluster, if the features have several.
        actors: number of Ray actors that share the rows; 0 for as many as suit the machines.
        memory_gb: memory in GB for the rows of each actor; an actor whose rows need more reads them from disk in every
            iteration. 0 for a share of the machine's memory.
    """

    k: Annotated[int, Bounds(1, 2**31 - 1)]
    iterations: Annotated[int, Bounds(1, 10**6)] = 50
    tolerance: Annotated[float, Bounds(0, 1)] = 1e-5
    init: Init = "rows"
    spherical: bool = False
    restarts: Annotated[int, Bounds(1, 10**4)] = 1
    seed: Seed = 0
    max_rows: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    layer: str = ""
    actors: Annotated[int, Bounds(0, 10**5)] = 0
    memory_gb: Annotated[float, Bounds(0, 10**6)] = 0

    def identity(self) -> dict[str, Any]:
        """Return a JSON value of the settings that decide the result."""
        return {name: value for name, value in asdict(self).items() if name not in _PLACEMENT}
