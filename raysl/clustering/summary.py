"""Quality of a clustering: sizes of clusters, and agreement with labels."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_log = logging.getLogger("raysl.clustering")
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def sizes(counts_k: Integers) -> dict[str, Any]:
    """Return the empty clusters, quantiles of the sizes, and the entropy of the sizes as a share of the maximum."""
    shares = counts_k[counts_k > 0] / counts_k.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "empty": int((counts_k == 0).sum()),
        "quantiles": {f"{q}%": float(np.percentile(counts_k, q)) for q in _QUANTILES},
        "entropy_share": entropy / np.log(len(counts_k)) if len(counts_k) > 1 else 1.0,
    }


def agreement(clusters_n: Integers, labels_n: Integers) -> dict[str, float]:
    """Return the NMI (arithmetic mean of the entropies) and the purity; nothing without scikit-learn.

    Purity is the share of rows with the most frequent label of their cluster.
    """
    try:
        from sklearn.metrics import normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix
    except ImportError:
        _log.warning("NMI and purity need scikit-learn: install raysl[eval].")
        return {}
    table = contingency_matrix(labels_n, clusters_n, sparse=True)
    return {
        "nmi": float(normalized_mutual_info_score(labels_n, clusters_n)),
        "purity": float(table.max(axis=0).sum() / len(labels_n)),
    }
