"""Image retrieval by cosine similarity: how many of the nearest images show the same class.

Each query, a test image, ranks all train images. Precision at k is the share of right images among the first k. The
average precision of a query is the mean, over its right images, of the precision at their ranks, and mAP its mean over
queries (Manning, Raghavan and Schütze 2008, "Introduction to information retrieval", section 8.4). Images of equal
similarity are ranked in a random order, because the order of the data set may be sorted by class.
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

from raysl import rng
from raysl.errors import UserError
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, check, same_images

_TILE = 256


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of retrieval.

    Args:
        ks: numbers of nearest images k; clamped to the number of train images.
        max_queries: largest number of queries, sampled at random from the test images.
    """

    version: ClassVar[int] = 2
    ks: tuple[Annotated[int, Bounds(1, 10**6)], ...] = (1, 5, 10)
    max_queries: Annotated[int, Bounds(1, 10**9)] = 2000


class Retrieval:
    """mAP, the primary metric, and precision at k. If test is train, a query does not find itself.

    If images show several classes, an image that shares a class with the query is right.
    """

    primary_metric = "mAP"
    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield mAP, and precision for every k. A query whose class no train image shows counts as 0."""
        check("retrieval", train, test, several=True)
        own = same_images(train, test)
        if len(train.labels_n) <= own:
            raise UserError(
                "The probe retrieval has one image as train and test set, and no other image to find. Give more "
                "images, or another test set."
            )
        queries_q = torch.from_numpy(rng.sample(len(test.labels_n), self.config.max_queries, "retrieval"))
        shuffled_n = rng.generator("retrieval", "equals").permutation(len(train.labels_n))
        train_nd = normalize(torch.from_numpy(train.features_nd[shuffled_n]), dim=1)
        train_labels = torch.from_numpy(train.labels_n[shuffled_n])
        position_n = torch.from_numpy(np.argsort(shuffled_n))
        test_nd = normalize(torch.from_numpy(test.features_nd), dim=1)
        precisions, hits = [], []
        for some_q in torch.split(queries_q, _TILE):
            similar_qn = test_nd[some_q] @ train_nd.T
            right_qn = _share_a_class(torch.from_numpy(test.labels_n)[some_q], train_labels)
            if own:
                itself = torch.arange(len(some_q)), position_n[some_q]
                similar_qn[itself] = -torch.inf
                right_qn[itself] = False
            right_qn = right_qn.gather(1, similar_qn.argsort(dim=1, descending=True, stable=True))
            precisions.append(average_precision(right_qn))
            hits.append(right_qn[:, : max(self.config.ks)])
        yield Row("mAP", torch.cat(precisions).mean().item())
        hits_qk, most = torch.cat(hits).double(), len(train.labels_n) - own
        for k in self.config.ks:
            yield Row(f"precision/k={k}", hits_qk[:, : min(k, most)].mean().item())


def nearest(
    query_qd: NDArray[np.float32],
    gallery_nd: NDArray[np.float32],
    k: int,
    own_q: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return cosines and indices, both (q, k), of the k nearest images, the nearest first, for a retrieval grid.

    Args:
        query_qd: float32 (q, d), features of the queries.
        gallery_nd: float32 (n, d); n >= k, and n > k if `own_q` is given.
        own_q: int64 (q,), index of each query in the gallery if it must not find itself.
    """
    similar_qn = (
        normalize(torch.from_numpy(query_qd), dim=1) @ normalize(torch.from_numpy(gallery_nd), dim=1).T
    )
    if own_q is not None:
        similar_qn[torch.arange(len(own_q)), torch.from_numpy(own_q)] = -torch.inf
    top = similar_qn.topk(k)
    return top.values.numpy(), top.indices.numpy()


def _share_a_class(one: Tensor, other: Tensor) -> Tensor:
    """Return bool (a, b) of labels (a,) and (b,), or of shown classes (a, c) and (b, c)."""
    if one.ndim == 1:
        return one[:, None] == other[None]
    return (one == 1).float() @ (other == 1).float().T > 0


def average_precision(right_qn: Tensor) -> Tensor:
    """Return float64 (q,): the mean, over the right images of a ranking, of the precision at their ranks; 0 without
    any.

    Args:
        right_qn: bool (q, n), the best rank first.
    """
    ranks_n = torch.arange(1, right_qn.shape[1] + 1, dtype=torch.float64)
    precision_qn = right_qn.cumsum(1) / ranks_n
    return (precision_qn * right_qn).sum(1) / right_qn.sum(1).clamp(min=1)
