"""Project features onto the span of the training images when there are few of them.

The weights of a linear classifier with a penalty on their squared length are sums of its training images (Schölkopf,
Herbrich and Smola 2001, "A generalized representer theorem"). An orthonormal basis of the span of the images keeps all
products and lengths, so the classifier is the same and takes less time to fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The projection pays if there are fewer images than this share of the number of features.
_FEW = 0.75


def in_span(train_nd: Tensor, test_md: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets in an orthonormal basis of the span of the first, (n, n) and (m, n); unchanged if n is large.

    Args:
        train_nd: (n, d), floating point.
        test_md: (m, d), of the same dtype. Its part outside of the span is lost; no such classifier depends on it.
    """
    if len(train_nd) > _FEW * train_nd.shape[1]:
        return train_nd, test_md
    basis_dn, _ = torch.linalg.qr(train_nd.T)
    return train_nd @ basis_dn, test_md @ basis_dn
