"""A part of a data set as a data set, for experiments that need fewer images."""

from __future__ import annotations

import hashlib

import numpy as np

from raysl import rng
from raysl.dataset import MANIFEST, DataSet, Manifest
from raysl.errors import UserError
from raysl.ingest import shard
from raysl.ingest.sources import Row
from raysl.storage import Folder

_GROUP = 512


def subset(dataset: DataSet, num_images: int, folder: Folder, seed: int = 0) -> DataSet:
    """Images drawn without replacement, in the order of their indices, under new indices. They pass through memory.

    Args:
        folder: where it goes; the one that lies there is opened.

    Raises:
        UserError: there are not so many images, another data set lies in the folder, or it cannot be written.
    """
    made_of = f"{dataset.manifest.fingerprint} {num_images} {seed}"
    fingerprint = hashlib.blake2b(made_of.encode(), digest_size=32).hexdigest()
    if DataSet.is_one(str(folder)):
        there = DataSet.open(str(folder))
        if there.manifest.fingerprint != fingerprint:
            raise UserError(
                f"Another data set lies at {str(folder)!r}, {there.manifest.source}. Give another folder."
            )
        return there
    if not 1 <= num_images <= dataset.num_images:
        raise UserError(
            f"A subset of {num_images} images cannot be drawn from the {dataset.num_images} of "
            f"{str(dataset.folder)!r}. Ask for 1 to {dataset.num_images}."
        )
    generator = rng.generator("subset", seed)
    chosen_k = np.sort(generator.choice(dataset.num_images, num_images, replace=False))
    columns = dataset.read(chosen_k).to_pydict()
    labels = columns.get("label", [None] * num_images)
    rows = (Row(image, label, "") for image, label in zip(columns["image"], labels, strict=True))
    written = shard.write(folder, 0, 0, rows, check=False, labelled=dataset.has_labels, rows_per_group=_GROUP)
    facts = dataset.manifest
    source = f"{num_images} images of {facts.source}"
    manifest = Manifest(source, (written.shard,), facts.classes, fingerprint, 0)
    folder.write_json(MANIFEST, manifest.to_json())
    return DataSet.open(str(folder))
