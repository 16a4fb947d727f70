"""Weighted k-nearest-neighbor classification by cosine similarity.

Wu et al. 2018 (NPID, "Unsupervised feature learning via non-parametric instance discrimination"), section 3.4: each of
the k nearest train images votes for its class with weight exp(similarity / T). NPID uses k = 200 and T = 0.07; k = 20
is usually best. Nothing is learned, so there is nothing to tune.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, Tiles, accuracy_rows, check, rank, same_images, tile_rows
from raysl.ray_cluster import gpus

# Similarities of a tile of queries with a tile of train images take 128 MB; 2 GB if the train images are sent in tiles.
_TRAIN_TILE = 1 << 16
_QUERY_TILE = 1 << 9


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of k-nearest-neighbor classification.

    Args:
        ks: values of k, the number of neighbors. The first is that of the primary metric and is lowered to the number
            of train images if it is larger; other values that are larger are left out.
        temperatures: softmax temperatures T; the first is that of the primary metric.
    """

    version: ClassVar[int] = 1
    ks: tuple[Annotated[int, Bounds(1, 10**6)], ...] = (20, 1, 200)
    temperatures: tuple[Annotated[float, Bounds(1e-4, 1e4)], ...] = (0.07, 0.1)


class Knn:
    """Compute all k and T from one pass over the similarities. If test is train, an image is not its own neighbor."""

    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        self.primary_metric = f"top1{_suffix(config.ks[0], config.temperatures[0])}"

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield accuracies for every k and T; see `raysl.probes.accuracy_rows`."""
        check("knn", train, test)
        own = same_images(train, test)
        k = min(max(self.config.ks), len(train.labels_n) - own)
        device = gpus.device()
        gallery = Gallery.of(train.features_nd, device)
        labels_n, test_labels_n = torch.from_numpy(train.labels_n).to(device), torch.from_numpy(test.labels_n)
        classes = int(labels_n.max()) + 1
        ranks: dict[str, list[Tensor]] = {}
        for first in range(0, len(test_labels_n), gallery.queries):
            rows = slice(first, first + gallery.queries)
            query_qd = normalize(torch.from_numpy(test.features_nd[rows]).to(device), dim=1)
            similar_qk, index_qk = gallery.nearest(query_qd, k, first if own else None)
            wanted_q = test_labels_n[rows].to(device)
            for suffix, scores_qc in self._scores(similar_qk, labels_n[index_qk], classes):
                ranks.setdefault(suffix, []).append(rank(scores_qc, wanted_q))
        for suffix, parts in ranks.items():
            yield from accuracy_rows(torch.cat(parts), test_labels_n, classes, suffix)

    def _scores(self, similar_qk: Tensor, votes_qk: Tensor, classes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield for every k and T log(sum of exp(similarity / T)) by class, up to a constant per query."""
        first, *others = dict.fromkeys(self.config.ks)
        ks = [first, *(k for k in others if k <= votes_qk.shape[1])]
        for temperature in dict.fromkeys(self.config.temperatures):
            weight_qk = ((similar_qk - similar_qk[:, :1]).double() / temperature).exp()
            for k in ks:
                sums_qc = weight_qk.new_zeros(len(votes_qk), classes)
                sums_qc.scatter_add_(1, votes_qk[:, :k], weight_qk[:, :k])
                yield _suffix(k, temperature), sums_qc.log()


@dataclass(frozen=True)
class Gallery:
    """Train images in which the nearest are looked for."""

    train_nd: Tensor  # their features
    # The features are unit vectors on the device. Otherwise they lie in the memory of the host, because they are too
    # large for the GPU.
    resident: bool
    tiles: Tiles  # how they are sent to the device
    queries: int  # number of queries at a time; many, if all train images are sent for each time

    @classmethod
    def of(cls, features_nd: NDArray[np.float32], device: torch.device) -> Gallery:
        """Put features on the device, if they fit there."""
        train_nd, rows = torch.from_numpy(features_nd), tile_rows(features_nd, device)
        if rows < len(train_nd):
            return cls(train_nd, False, Tiles(device, min(rows, _TRAIN_TILE)), 16 * _QUERY_TILE)
        unit_nd = torch.empty(train_nd.shape, device=device)
        tiles = Tiles(device, _TRAIN_TILE)
        # Tile by tile, since the raw features of all images may not fit beside the unit vectors.
        for number, tile_nd in enumerate(tiles(train_nd)):
            unit_nd[number * _TRAIN_TILE :][: len(tile_nd)] = normalize(tile_nd, dim=1)
        return cls(unit_nd, True, tiles, _QUERY_TILE)

    def nearest(self, query_qd: Tensor, k: int, own: int | None) -> tuple[Tensor, Tensor]:
        """Return cosines and indices, both (q, k), of the k nearest train images, the nearest first.

        Args:
            query_qd: unit vectors, on the device.
            k: at most the number of train images, and less than that if `own` is given.
            own: index among the train images of the first query if the queries are train images, else None.
        """
        best, index, first = None, None, 0
        for tile_nd in self.tiles(self.train_nd):
            similar_qn = query_qd @ (tile_nd if self.resident else normalize(tile_nd, dim=1)).T
            if own is not None and -len(query_qd) < own - first < similar_qn.shape[1]:
                similar_qn.diagonal(own - first).fill_(-torch.inf)
            top = similar_qn.topk(min(k, similar_qn.shape[1]))
            found, where = top.values, top.indices + first
            if best is not None and index is not None:
                found, where = torch.cat([best, found], 1), torch.cat([index, where], 1)
                top = found.topk(min(k, found.shape[1]))
                found, where = top.values, where.gather(1, top.indices)
            best, index = found, where
            first += len(tile_nd)
        assert best is not None
        assert index is not None
        return best, index


def _suffix(k: int, temperature: float) -> str:
    return f"/k={k},T={temperature:g}"
