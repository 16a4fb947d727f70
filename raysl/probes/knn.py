"""Weighted nearest neighbours: the class of the train images that lie closest, by cosine.

Wu et al. 2018 (NPID): each of the k nearest votes for its class with weight exp(similarity / T). Nothing is learned,
so there is nothing to tune. NPID takes k = 200 and T = 0.07; k = 20 is usually best; k = 1 is the plainest reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raysl.errors import UserError
from raysl.probes import Labelled, Row, check, rank, same_images, topk_rows

# Similarities that are in memory at a time: 128 MB.
_TRAIN_TILE = 1 << 16
_QUERY_TILE = 1 << 9


@dataclass(frozen=True)
class Config:
    """Protocol of the nearest neighbours.

    Args:
        ks: numbers of neighbours, the headline first, which is clamped to the number of train images; others that are
            larger are left out.
        temperatures: T, the headline first.
        version: see `raysl.probes`.
    """

    ks: tuple[int, ...] = (20, 1, 200)
    temperatures: tuple[float, ...] = (0.07, 0.1)
    version: int = 1

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"knn.ks is {self.ks}; it must hold numbers of neighbours of at least 1.")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise UserError(f"knn.temperatures is {self.temperatures}; it must hold numbers above 0.")


class Knn:
    """All k and all T from one pass over the similarities. Where test is train, no image votes for itself."""

    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        self.headline = f"top1{_suffix(config.ks[0], config.temperatures[0])}"

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields top-1, and top-5 where there are more than five classes, for every k and T."""
        check(train, test)
        own = same_images(train, test)
        if len(train.labels_n) <= own:
            raise UserError(
                "The probe knn has one image that is train and test set at once, and no neighbour for it. Give more "
                "images, or another test set."
            )
        k = min(max(self.config.ks), len(train.labels_n) - own)
        train_nd = normalize(torch.from_numpy(train.features_nd), dim=1)
        labels_n = torch.from_numpy(train.labels_n)
        classes = int(labels_n.max()) + 1
        ranks: dict[str, list[Tensor]] = {}
        for first in range(0, len(test.labels_n), _QUERY_TILE):
            query_qd = normalize(torch.from_numpy(test.features_nd[first : first + _QUERY_TILE]), dim=1)
            similar_qk, index_qk = nearest(query_qd, train_nd, k, first if own else None)
            wanted_q = torch.from_numpy(test.labels_n[first : first + _QUERY_TILE])
            for suffix, scores_qc in self._scores(similar_qk, labels_n[index_qk], classes):
                ranks.setdefault(suffix, []).append(rank(scores_qc, wanted_q))
        for suffix, parts in ranks.items():
            yield from topk_rows(torch.cat(parts), classes, suffix)

    def _scores(self, similar_qk: Tensor, votes_qk: Tensor, classes: int) -> Iterator[tuple[str, Tensor]]:
        """For every k and T: logarithms of the sum of exp(similarity / T) by class, but for a constant per query."""
        headline, *others = self.config.ks
        ks = [headline, *(k for k in others if k <= votes_qk.shape[1])]
        for temperature in self.config.temperatures:
            weight_qk = ((similar_qk - similar_qk[:, :1]).double() / temperature).exp()
            for k in ks:
                sums_qc = torch.zeros(len(votes_qk), classes, dtype=torch.float64)
                sums_qc.scatter_add_(1, votes_qk[:, :k], weight_qk[:, :k])
                yield _suffix(k, temperature), sums_qc.log()


def nearest(query_qd: Tensor, train_nd: Tensor, k: int, own: int | None) -> tuple[Tensor, Tensor]:
    """Cosines and indices, both (q, k), of the k nearest, the nearest first.

    Args:
        query_qd: unit vectors.
        train_nd: unit vectors; n is k or more, and more than k where `own` is given.
        k: neighbours.
        own: index in `train_nd` of the first query, when the queries are a part of it; None when they are not.
    """
    similar, indices = [], []
    for first in range(0, len(train_nd), _TRAIN_TILE):
        similar_qn = query_qd @ train_nd[first : first + _TRAIN_TILE].T
        if own is not None and -len(query_qd) < own - first < similar_qn.shape[1]:
            similar_qn.diagonal(own - first).fill_(-torch.inf)
        top = similar_qn.topk(min(k, similar_qn.shape[1]))
        similar.append(top.values)
        indices.append(top.indices + first)
    if len(similar) == 1:
        return similar[0], indices[0]
    best = torch.cat(similar, 1).topk(k)
    return best.values, torch.cat(indices, 1).gather(1, best.indices)


def _suffix(k: int, temperature: float) -> str:
    return f"/k={k},T={temperature:g}"
