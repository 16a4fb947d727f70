"""Make a data set of a part of another one: fewer images, fewer classes, or other labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.dataset import DataSet, Manifest
from raysl.errors import UserError, counted
from raysl.ingestion import shard
from raysl.ingestion.sources import Row
from raysl.storage import Folder

_GROUP = 512


def subset(dataset: DataSet, num_images: int, folder: Folder, seed: int = 0) -> DataSet:
    """Draw images without replacement, and give them new indices in the same order; see `relabeled`."""
    if not 1 <= num_images <= dataset.num_images:
        raise UserError(
            f"A subset of {counted(num_images, 'image')} cannot be drawn from the {dataset.num_images} of "
            f"{str(dataset.folder)!r}. Ask for 1 to {dataset.num_images}."
        )
    return part(dataset, drawn(dataset.num_images, num_images, seed), folder)


def drawn(of: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the sorted indices, int64 (count,), of the images that `subset` draws from a data set of `of` images."""
    return np.sort(rng.generator("subset", seed).choice(of, count, replace=False))


def part(dataset: DataSet, chosen_k: NDArray[np.int64], folder: Folder) -> DataSet:
    """Copy chosen images with their labels, if there are any; see `relabeled`."""
    labels_k = dataset.labels()[chosen_k] if dataset.has_labels else None
    source = f"{counted(len(chosen_k), 'image')} of {dataset.manifest.source}"
    return relabeled(dataset, chosen_k, labels_k, dataset.manifest.classes, folder, source)


def relabeled(
    dataset: DataSet,
    chosen_k: NDArray[np.int64],
    labels_k: NDArray[np.int64] | None,
    classes: Sequence[str],
    folder: Folder,
    source: str,
) -> DataSet:
    """Copy chosen images under new indices, 0 to k - 1, and with the given labels. They pass through memory.

    Labels are numbers of `classes`, or None for none. `source` is a description for people. If the new data set is in
    the folder already, it is opened. Raises UserError if another one lies there, or it cannot be written.
    """
    digest = hashlib.blake2b(f"{dataset.manifest.fingerprint} {list(classes)}".encode(), digest_size=32)
    digest.update(chosen_k.tobytes())
    digest.update(b"" if labels_k is None else labels_k.tobytes())
    fingerprint = digest.hexdigest()
    if DataSet.exists_at(str(folder)):
        there = DataSet.open(str(folder))
        if there.manifest.fingerprint != fingerprint:
            other = f"{str(folder)!r}, {there.manifest.source}"
            raise UserError(f"Another data set lies at {other}. Give another folder.")
        return there
    of_clips = dataset.manifest.clips.get("columns", [])
    columns = dataset.read(chosen_k, ("image", "path", *of_clips))
    clips = columns.select(of_clips).to_pylist() if of_clips else [None] * len(chosen_k)
    labels = [None] * len(chosen_k) if labels_k is None else [classes[label] for label in labels_k]
    images, paths = (columns.column(name).to_pylist() for name in ("image", "path"))
    rows = map(Row, images, labels, paths, repeat(""), clips)
    named = () if labels_k is None else classes
    written = shard.write(folder, 0, 0, rows, decoding=None, classes=named, rows_per_group=_GROUP)
    metadata = {**dataset.manifest.clips, "with_sound": written.with_sound} if of_clips else {}
    manifest = Manifest(source, (written.shard,), tuple(classes), fingerprint, 0, clips=metadata)
    return DataSet.create(folder, manifest, [] if labels_k is None else [labels_k])
