"""Refuse, or tell of, scores on images that a probe also learns from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from raysl import probes
from raysl.dataset import DataSet
from raysl.errors import counted
from raysl.probes import check_labels
from raysl.storage.feature_store import FeatureStore

_log = logging.getLogger("raysl.evaluation")
# Images are compared by their pixels if both sets together have at most so many: each takes about 100 bytes.
_MOST_IMAGES = 2_000_000
# Share of test images below which equal images are not worth a line.
_FEW = 0.01


def refuse_same_images(names: Sequence[str], train: DataSet, test: DataSet) -> None:
    """Raise UserError if a probe that learns would be scored on the images that it learns from."""
    for name in names:
        if probes.learns(name) and same_set(train, test):
            check_labels(name, np.zeros(0, np.int64), same=True)


def same_set(train: DataSet, test: DataSet) -> bool:
    """Return True if both sets hold the same images."""
    return train.manifest.fingerprint == test.manifest.fingerprint


def warn_of_same(names: Sequence[str]) -> None:
    """Log a line for probes with labels, none of which learns, if train and test set are the same."""
    _log.warning(
        "Train and test set are the same images (%s). No image is compared with itself, but its near copies are in the "
        "set, so the scores are too high.",
        ", ".join(names),
    )


def _hashes(store: FeatureStore) -> Iterator[int]:
    (pieces,) = store.shards(1)
    for piece in pieces:
        for _, rows_bd in store.batches(piece):
            yield from (hash(row_d.tobytes()) for row_d in rows_bd)


def warn_of_shared(train: FeatureStore, test: FeatureStore) -> None:
    """Log a line if test images have the very pixels of train images."""
    if train.num_rows + test.num_rows > _MOST_IMAGES:
        return
    known = set(_hashes(train))
    shared = sum(one in known for one in _hashes(test))
    if shared > _FEW * test.num_rows:
        _log.warning(
            "%s of %s also in the train set, by their pixels: scores are too high. Give sets that share no image.",
            f"{shared:,}",
            f"{counted(test.num_rows, 'test image')} {'is' if shared == 1 else 'are'}",
        )
