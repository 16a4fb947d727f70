"""ClusterFit: predict which cluster of another network's features an image fell into.

Yan et al., "ClusterFit: Improving Generalization of Visual Representations", arXiv 1912.03330. A new network learns
the K cluster ids y of a table from scratch, by

    L = -log softmax(W v_I)_y

with v the backbone's features of an image I. What the clusters keep is the gist of the first network's features, and
what they lose is the trace of its pretext. Published with ResNet-50 and 16,000 clusters of RotNet's features: 53.6 %
top-1 of a linear probe on ImageNet, where RotNet itself has 48.2 (VISSL).

The table is Parquet, one file or a folder of them, with the columns `index` and `cluster` (integers) in any order of
rows, and every image of the data set once. Its schema's metadata may name `teacher`, `objective`, `K` (without it,
the largest cluster + 1) and the `fingerprint` of the data set whose images it numbers, which is then compared. Every
worker keeps all cluster ids, 8 bytes an image: 10 MB for ImageNet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.contrastive.bank import MemoryBank
from raysl.errors import Unset, UserError
from raysl.feature_store.records import is_damaged
from raysl.objectives import Loss, Setup
from raysl.storage import Folder, filesystem
from raysl.stream.reader import Batch

# The whole of it: features, clusters, and the network.
COMMAND = "raysl clusterfit --teacher TEACHER --k 1000 --data DATA --run RUN"


@dataclass(frozen=True)
class Config:
    """Hyperparameters of ClusterFit.

    Args:
        labels: the table of cluster ids, a path or a URI.
    """

    labels: str = ""


class Clusterfit(nn.Module):
    """A linear classifier of the cluster ids, which are joined by the index of the image."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        setup.no_transform("clusterfit")
        self.views = {"image": setup.identity}
        table = Assignments.read(config.labels, setup.num_images, setup.fingerprint)
        self.facts = table.facts
        # Neither parameter nor buffer: it is read again from its place, and not kept with every checkpoint.
        self.labels_n = torch.from_numpy(table.clusters_n)
        self.classify = nn.Linear(setup.width, table.num_clusters)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits (b, K)."""
        return {"logits": self.classify(encode(backbone, views["image"])[:, 0])}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Cross-entropy, averaged over the batch."""
        logits_bk = outputs["logits"].float()
        labels_b = self.labels_n[batch.indices_b].to(logits_bk.device)
        correct = (logits_bk.argmax(dim=1) == labels_b).float().mean()
        return Loss(F.cross_entropy(logits_bk, labels_b), {"accuracy": correct})

    def describe(self) -> dict[str, Any]:
        """What the table says of itself, the number of clusters, and a hash of the ids."""
        return self.facts


@dataclass(frozen=True)
class Assignments:
    """The cluster of every image.

    Args:
        clusters_n: int64 (n,), in 0 .. K - 1, in index order.
        num_clusters: K.
        facts: JSON, for the metadata.
    """

    clusters_n: npt.NDArray[np.int64]
    num_clusters: int
    facts: dict[str, Any]

    @staticmethod
    def read(uri: str, num_images: int, fingerprint: str = "") -> Assignments:
        """The assignments of a table.

        Args:
            uri: of the table; see the module.
            num_images: N of the data set.
            fingerprint: of the data set; empty when it is not known.

        Raises:
            Unset: no table is named.
            UserError: it cannot be read, lacks a column, is of other images, or does not hold every index of
                0 .. N - 1 once; or the clusters are not in 0 .. K - 1, or fewer than two.
        """
        if not uri:
            raise Unset(
                "The objective 'clusterfit' needs a table of cluster ids. Give the Parquet file with "
                "--clusterfit.labels: its columns are index and cluster."
            )
        table, named = _read(uri)
        if fingerprint and named.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"The labels {uri!r} are of a data set with fingerprint {named['fingerprint'][:12]}, and this one has "
                f"{fingerprint[:12]}: the images or their order differ. Cluster the features of these very images."
            )
        clusters_n = _by_index(uri, table, num_images)
        largest = int(clusters_n.max(initial=-1))
        num_clusters = int(named["K"]) if named.get("K", "").isdecimal() else largest + 1
        if clusters_n.min(initial=0) < 0 or largest >= num_clusters or num_clusters < 2:
            raise UserError(
                f"The labels {uri!r} have clusters from {clusters_n.min(initial=0)} to {largest} and K = "
                f"{num_clusters}. There must be two clusters at least, numbered 0 to K - 1. Write the table again."
            )
        digest = hashlib.blake2b(clusters_n.tobytes(), digest_size=8).hexdigest()
        facts = {"labels": named, "num_clusters": num_clusters, "labels_digest": digest}
        return Assignments(clusters_n, num_clusters, facts)


def _read(uri: str) -> tuple[pa.Table, dict[str, str]]:
    """The two columns, and what the metadata names."""
    fs, path = filesystem(Folder(uri).uri)
    try:
        table = pq.read_table(
            path, columns=["index", "cluster"], filesystem=fs, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The labels {uri!r} cannot be read: {error}. Give a Parquet file, or a folder of them, with the integer "
            "columns index and cluster."
        ) from error
    for name in ("index", "cluster"):
        column = table.column(name) if name in table.column_names else None
        if column is None or not pa.types.is_integer(column.type) or column.null_count:
            raise UserError(
                f"The labels {uri!r} have no column {name!r} of integers without gaps; the columns are index and "
                "cluster. Write the table again."
            )
    named = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (table.schema.metadata or {}).items()
    }
    if is_damaged(named):
        raise UserError(
            f"The labels {uri!r} are damaged: the checksum of their metadata does not match. Delete the folder of the "
            "clustering and run `raysl cluster` again."
        )
    return table, {key: named[key] for key in ("teacher", "K", "objective", "fingerprint") if key in named}


def _by_index(uri: str, table: pa.Table, num_images: int) -> npt.NDArray[np.int64]:
    """The clusters in index order."""
    index, cluster = (table.column(name).to_numpy().astype(np.int64) for name in ("index", "cluster"))
    inside = index[(index >= 0) & (index < num_images)]
    missing = num_images - len(np.unique(inside))
    if missing or len(index) != num_images:
        raise UserError(
            f"The labels {uri!r} have {len(index):,} rows for a data set of {num_images:,} images: {missing:,} images "
            f"have none, {len(inside) - (num_images - missing):,} rows repeat an index and "
            f"{len(index) - len(inside):,} name an index that is not there. Every index of 0 to {num_images - 1:,} "
            "must be there once. Cluster the features of this very data set."
        )
    clusters_n = np.empty(num_images, np.int64)
    clusters_n[index] = cluster
    return clusters_n
