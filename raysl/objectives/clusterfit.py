"""ClusterFit: predict the cluster of an image in the feature space of another network.

Yan et al., "ClusterFit: Improving Generalization of Visual Representations", arXiv 1912.03330. A new network learns
the K cluster ids y of a table from scratch, by

    L = -log softmax(W v_I)_y

with v the backbone's features of an image I. Clusters keep the coarse structure of the first network's features and
lose the details that only its pretext task needs. Published with ResNet-50 and 16,000 clusters of RotNet's features:
53.6 % top-1 of a linear probe on ImageNet; RotNet itself has 48.2 % (VISSL).

The table is a Parquet file, or a folder of them, with the integer columns `index` and `cluster` and one row for every
image of the data set, in any order. Its schema metadata may contain `teacher`, `objective`, `K` (default: the largest
cluster + 1) and the `fingerprint` of the data set, which is compared with that of the run. Every worker keeps all
cluster ids in memory: 8 bytes per image, 10 MB for ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.communication.device_copy import to_device
from raysl.errors import MissingValueError, UserError, explained
from raysl.fields import Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.storage import Folder, filesystem
from raysl.storage.records import is_damaged, short_hash

# One command extracts the features, clusters them and trains the network.
COMMAND = "raysl clusterfit --teacher TEACHER --k 1000 --data DATA --run RUN"


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of ClusterFit.

    Args:
        labels: table of cluster ids, a path or a URI.
    """

    labels: str = ""


class Clusterfit(Base):
    """A linear classifier of the cluster ids."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        setup.no_transform("clusterfit")
        self.views = {"image": setup.identity}
        table = Assignments.read(config.labels, setup.num_images, setup.fingerprint)
        self.metadata = table.metadata
        # No buffer: the table is read again when a run resumes, and not saved with every checkpoint.
        self.labels_n = table.clusters_n
        self.classify = nn.Linear(setup.width, table.num_clusters)
        # The loss of a guess by the sizes of the clusters, which often differ widely.
        shares_k = np.unique(table.clusters_n, return_counts=True)[1] / len(table.clusters_n)
        self.chance = float(-(shares_k * np.log(shares_k)).sum())

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute logits (b, K)."""
        return {"logits": self.classify(encode(backbone, views["image"])[:, 0])}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the cross-entropy, averaged over the batch."""
        logits_bk = outputs["logits"].float()
        labels_b = to_device(self.labels_n[batch.rows.indices_b], logits_bk.device)
        correct = (logits_bk.argmax(dim=1) == labels_b).float().mean()
        return Loss(F.cross_entropy(logits_bk, labels_b), {"accuracy": correct})

    def describe(self) -> dict[str, Any]:
        """Return the metadata of the table, the number of clusters, and a hash of the ids."""
        return self.metadata


@dataclass(frozen=True)
class Assignments:
    """The cluster of every image.

    Args:
        clusters_n: int64 (n,), in 0 .. K - 1, in the order of the images.
        num_clusters: K.
        metadata: JSON for the run's metadata.
    """

    clusters_n: NDArray[np.int64]
    num_clusters: int
    metadata: dict[str, Any]

    @staticmethod
    def read(uri: str, num_images: int, fingerprint: str = "") -> Assignments:
        """Read the assignments from a table.

        Args:
            uri: the table; see the module.
            num_images: N, images in the data set.
            fingerprint: fingerprint of the data set; empty when it is not known.

        Raises:
            MissingValueError: no table is given.
            UserError: the table cannot be read, lacks a column, belongs to another data set, or does not contain every
                index of 0 .. N - 1 once; or the clusters are not in 0 .. K - 1; or there are fewer than two.
        """
        if not uri:
            raise MissingValueError(
                "The objective 'clusterfit' needs a table of cluster ids. Give the Parquet file with "
                "--clusterfit.labels: its columns are index and cluster."
            )
        table, named = _read(uri)
        if fingerprint and named.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"The table {uri!r} (--clusterfit.labels) belongs to a data set with fingerprint "
                f"{named['fingerprint'][:12]}, and --data has fingerprint {fingerprint[:12]}: the images or their "
                "order differ. Cluster the features of this data set."
            )
        clusters_n = _by_index(uri, table, num_images)
        largest = int(clusters_n.max(initial=-1))
        num_clusters = int(named["K"]) if named.get("K", "").isdecimal() else largest + 1
        if clusters_n.min(initial=0) < 0 or largest >= num_clusters or num_clusters < 2:
            raise UserError(
                f"The table {uri!r} (--clusterfit.labels) has clusters from {clusters_n.min(initial=0)} to {largest} "
                f"and K = {num_clusters}. There must be at least two clusters, numbered 0 to K - 1. Write the table "
                "again."
            )
        digest = short_hash(clusters_n.tobytes())
        metadata = {"labels": named, "num_clusters": num_clusters, "labels_digest": digest}
        return Assignments(clusters_n, num_clusters, metadata)


def _read(uri: str) -> tuple[pa.Table, dict[str, str]]:
    """Read the two columns and the metadata of a table."""
    fs, path = filesystem(Folder(uri).uri, retry_s=90)
    what = f"The table {uri!r} (--clusterfit.labels) cannot be read"
    remedy = "Give a Parquet file, or a folder of them, with the integer columns index and cluster."
    with explained(what, remedy, OSError, pa.ArrowException):
        table = pq.read_table(
            path, columns=["index", "cluster"], filesystem=fs, page_checksum_verification=True
        )
    for name in ("index", "cluster"):
        column = table.column(name) if name in table.column_names else None
        if column is None or not pa.types.is_integer(column.type) or column.null_count:
            raise UserError(
                f"The table {uri!r} (--clusterfit.labels) has no column {name!r} of integers without missing values. "
                "Its columns must be index and cluster. Write the table again."
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


def _by_index(uri: str, table: pa.Table, num_images: int) -> NDArray[np.int64]:
    index, cluster = (table.column(name).to_numpy().astype(np.int64) for name in ("index", "cluster"))
    inside = index[(index >= 0) & (index < num_images)]
    missing = num_images - len(np.unique(inside))
    if missing or len(index) != num_images:
        raise UserError(
            f"The table {uri!r} (--clusterfit.labels) has {len(index):,} rows for a data set of {num_images:,} images: "
            f"{missing:,} images have no row, {len(inside) - (num_images - missing):,} rows repeat an index and "
            f"{len(index) - len(inside):,} have an index outside of the data set. It must contain every index of 0 to "
            f"{num_images - 1:,} once. Cluster the features of this data set."
        )
    clusters_n = np.empty(num_images, np.int64)
    clusters_n[index] = cluster
    return clusters_n
