"""Few images in many dimensions, in as many dimensions as there are images.

A linear classifier that is penalised by the squared length of its weights has weights that are sums of its images
(Schölkopf, Herbrich and Smola 2001, "A generalized representer theorem"). Nothing outside of their span is seen, and
inside of it an orthonormal basis keeps all products and lengths: what is learned is the same, and takes less time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Images for each dimension. With more, to find the basis would cost more than it saves.
_FEW = 0.75


def in_span(train_nd: Tensor, test_md: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in an orthonormal basis of the span of the first, (n, n) and (m, n); as they are where n is not small
    beside d.

    Args:
        train_nd: (n, d), floating point, what a classifier learns from.
        test_md: (m, d), of the same dtype. What of it lies outside of the span is lost, and no such classifier sees it.
    """
    if len(train_nd) > _FEW * train_nd.shape[1]:
        return train_nd, test_md
    basis_dn, _ = torch.linalg.qr(train_nd.T)
    return train_nd @ basis_dn, test_md @ basis_dn
