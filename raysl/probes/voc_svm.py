"""The probe `svm` on images that show several classes: PASCAL VOC 2007 itself, or any folder in its layout.

Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning". An image shows the classes
of its boxes. If all its boxes of a class are "difficult", it is not judged in that class and is a negative in training.

An image is resized to a square, as there. The evaluation view of the other probes cuts off the ends of the longer side,
and objects with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from raysl import extraction
from raysl.backbone import norm
from raysl.errors import UserError
from raysl.extraction import Encode
from raysl.probes import REESTIMATED, Floats, Integers, Labelled, Row, Subject, _voc
from raysl.probes._task import device, run_tasks
from raysl.probes._voc import Picture, VocSettings
from raysl.probes.svm import Config as SvmConfig
from raysl.probes.svm import Svm
from raysl.storage import Folder
from raysl.stream import decode

_BATCH = 128


@dataclass(frozen=True)
class Config(VocSettings):
    """Protocol of the support vector machines on images with several classes.

    Args:
        svm: protocol of the machines.
    """

    version: ClassVar[int] = 2
    svm: SvmConfig = field(default_factory=SvmConfig)


class VocSvm:
    """Mean over classes of the average precision, mAP, for every requested layer."""

    primary_metric = "mAP"
    own_images = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield mAP by layer. Runs one Ray task, on a GPU if there are any.

        Raises:
            UserError: no folder is given, or it is not in the layout (see `raysl.probes._voc.read`), the splits share
                images, the test split shows no class, or scikit-learn is not installed.
        """
        folders = self.config.folders(
            "voc_svm", "images with several classes (the probe svm takes images of one class)"
        )
        (rows,) = run_tasks(_measure, [(subject, self.config, folders)])
        yield from rows


def _measure(subject: Subject, config: Config, folders: tuple[Folder, ...]) -> list[Row]:
    splits = config.splits
    train, test = (_voc.union(folders, split) for split in splits)
    _voc.check_disjoint(train, test, splits, "voc-svm")
    classes = _voc.classes_of(train, test)
    if not classes:
        raise UserError(f"No image of the splits {' and '.join(splits)} of {config.data!r} shows a class.")
    specs = {layer: extraction.feature_spec(layer, config.svm.dims) for layer in subject.layers}
    if subject.bn_statistics == REESTIMATED:
        views = _views(train[: norm.STATISTICS_IMAGES], subject.image_size)
        encode = extraction.load_reestimated(subject.encoder, views, device(), list(specs.values()))
    else:
        encode = subject.encoder.load(device(), list(specs.values()))
    seen, unseen = (_features(encode, pictures, subject.image_size) for pictures in (train, test))
    rows = []
    for layer, spec in specs.items():
        known = Labelled(seen[spec], shown(train, classes))
        rows += [
            replace(row, layer=layer)
            for row in Svm(config.svm).run(known, Labelled(unseen[spec], shown(test, classes)))
        ]
    return rows


def _views(pictures: Sequence[Picture], size: int) -> Iterator[Tensor]:
    """Yield batches of images, uint8 (b, 3, size, size), each resized to a square."""
    for first in range(0, len(pictures), _BATCH):
        yield decode.squashed([one.image for one in pictures[first : first + _BATCH]], size)


def _features(encode: Encode, pictures: Sequence[Picture], size: int) -> Mapping[str, Floats]:
    """Return float32 (n, d) of every image, by feature spec."""
    made: dict[str, list[Floats]] = {}
    for images_bchw in _views(pictures, size):
        with torch.inference_mode():
            found = encode(images_bchw.to(device()))
        for spec, values_bd in found.items():
            made.setdefault(spec, []).append(values_bd.float().cpu().numpy())
    return {spec: np.concatenate(parts) for spec, parts in made.items()}


def shown(pictures: Sequence[Picture], classes: Sequence[str]) -> Integers:
    """Return the labels of images, int64 (n, c); see `raysl.probes.Labelled`."""
    shown_nc = np.zeros((len(pictures), len(classes)), dtype=np.int64)
    for row_c, one in zip(shown_nc, pictures, strict=True):
        for name, difficult in zip(one.classes, one.difficult_n.tolist(), strict=True):
            c = classes.index(name)
            row_c[c] = 1 if not difficult else row_c[c] or -1
    return shown_nc
