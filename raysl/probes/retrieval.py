"""Nearest images: how many of those that lie closest to an image, by cosine, show the same class.

Every test image, or a sample of them, ranks all train images. Precision at k is the share of right ones among the
first k; the average precision of a query is the mean, over its right ones, of the precision at their ranks, and mAP
its mean over queries (Manning, Raghavan and Schütze 2008, "Introduction to information retrieval", section 8.4).
Train images that are equally close are ranked in an order drawn by index, since their own may be sorted by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from raysl import rng
from raysl.errors import UserError
from raysl.probes import Floats, Labelled, Row, check, same_images

Integers = npt.NDArray[np.int64]

_TILE = 256


@dataclass(frozen=True)
class Config:
    """Protocol of retrieval.

    Args:
        ks: numbers of nearest images; clamped to the number of train images.
        max_queries: test images that ask, drawn by index.
        version: see `raysl.probes`.
    """

    ks: tuple[int, ...] = (1, 5, 10)
    max_queries: int = 2000
    version: int = 2

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"retrieval.ks is {self.ks}; it must hold numbers of images of at least 1.")
        if self.max_queries < 1:
            raise UserError(f"retrieval.max_queries is {self.max_queries}; it must be at least 1.")


class Retrieval:
    """mAP, its headline, and precision at k. Where test is train, no image finds itself. An image may show several
    classes; one that shares any of them is right."""

    headline = "mAP"
    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields mAP, and precision for every k. A query whose class no train image shows counts with 0."""
        check(train, test, several=True)
        own = same_images(train, test)
        if len(train.labels_n) <= own:
            raise UserError(
                "The probe retrieval has one image that is train and test set at once, and no other to find. Give "
                "more images, or another test set."
            )
        order_n = rng.generator("retrieval").permutation(len(test.labels_n))
        queries_q = torch.from_numpy(np.sort(order_n[: self.config.max_queries]))
        drawn_n = rng.generator("retrieval", "equals").permutation(len(train.labels_n))
        train_nd = normalize(torch.from_numpy(train.features_nd[drawn_n]), dim=1)
        train_labels = torch.from_numpy(train.labels_n[drawn_n])
        place_n = torch.from_numpy(np.argsort(drawn_n))
        test_nd = normalize(torch.from_numpy(test.features_nd), dim=1)
        precisions, hits = [], []
        for some_q in torch.split(queries_q, _TILE):
            similar_qn = test_nd[some_q] @ train_nd.T
            right_qn = _share_a_class(torch.from_numpy(test.labels_n)[some_q], train_labels)
            if own:
                itself = torch.arange(len(some_q)), place_n[some_q]
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
    query_qd: Floats, gallery_nd: Floats, k: int, own_q: Integers | None = None
) -> tuple[Floats, Integers]:
    """Cosines and indices, both (q, k), of the k nearest, the nearest first: what a sheet of neighbours shows.

    Args:
        query_qd: float32 (q, d), features of the images that ask.
        gallery_nd: float32 (n, d); n is k or more, and more than k where `own_q` is given.
        own_q: int64 (q,), index of each query in the gallery, where it shall not find itself.
    """
    similar_qn = (
        normalize(torch.from_numpy(query_qd), dim=1) @ normalize(torch.from_numpy(gallery_nd), dim=1).T
    )
    if own_q is not None:
        similar_qn[torch.arange(len(own_q)), torch.from_numpy(own_q)] = -torch.inf
    top = similar_qn.topk(k)
    return top.values.numpy(), top.indices.numpy()


def _share_a_class(one: Tensor, other: Tensor) -> Tensor:
    """bool (a, b) of labels (a,) and (b,), or of classes that are shown (a, c) and (b, c)."""
    if one.ndim == 1:
        return one[:, None] == other[None]
    return (one == 1).float() @ (other == 1).float().T > 0


def average_precision(right_qn: Tensor) -> Tensor:
    """float64 (q,): the mean, over the right ones of a ranking, of the precision at their ranks; 0 without any.

    Args:
        right_qn: bool (q, n), the best rank first.
    """
    ranks_n = torch.arange(1, right_qn.shape[1] + 1, dtype=torch.float64)
    precision_qn = right_qn.cumsum(1) / ranks_n
    return (precision_qn * right_qn).sum(1) / right_qn.sum(1).clamp(min=1)
