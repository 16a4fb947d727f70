"""How good a clustering is: sizes of clusters, and agreement with labels where there are some."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def sizes(counts_k: Integers) -> dict[str, Any]:
    """Empty clusters, quantiles of the sizes, and the entropy of the sizes as a share of the largest possible."""
    shares = counts_k[counts_k > 0] / counts_k.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "empty": int((counts_k == 0).sum()),
        "quantiles": {f"{q}%": float(np.percentile(counts_k, q)) for q in _QUANTILES},
        "entropy_share": entropy / np.log(len(counts_k)) if len(counts_k) > 1 else 1.0,
    }


def agreement(clusters_n: Integers, labels_n: Integers) -> dict[str, float]:
    """Purity (share of rows whose label is the most frequent of their cluster) and NMI.

    Normalised mutual information is divided by the mean of the two entropies, as scikit-learn does; 1 where both are
    0.
    """
    _, clusters_n = np.unique(clusters_n, return_inverse=True)
    _, labels_n = np.unique(labels_n, return_inverse=True)
    width = int(labels_n.max()) + 1
    pairs, counts = np.unique(clusters_n * width + labels_n, return_counts=True)
    total = len(labels_n)
    joint = counts / total
    by_cluster = np.bincount(clusters_n) / total
    by_label = np.bincount(labels_n) / total
    mutual = float((joint * np.log(joint / (by_cluster[pairs // width] * by_label[pairs % width]))).sum())
    entropies = [float(-(p * np.log(p)).sum()) for p in (by_cluster, by_label)]
    largest = np.zeros(len(by_cluster))
    np.maximum.at(largest, pairs // width, joint)
    mean = sum(entropies) / 2
    return {"purity": float(largest.sum()), "nmi": max(0.0, mutual / mean) if mean > 0 else 1.0}
