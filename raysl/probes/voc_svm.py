"""The probe `svm` on images that show several classes: PASCAL VOC 2007 itself, or any folder in its layout.

Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning". An image shows the classes
of its boxes. If all its boxes of a class are "difficult", it is not judged in that class and is a negative in training.

An image is resized to a square, as there. The evaluation view of the other probes cuts off the ends of the longer side,
and objects with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysl import extraction
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.probes import Labeled, Row, Subject, _voc
from raysl.probes._images import features, load, sample
from raysl.probes._task import TaskProbe
from raysl.probes._voc import Picture, VocSettings
from raysl.probes.svm import Config as SvmConfig
from raysl.probes.svm import Svm
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


class VocSvm(TaskProbe[Config]):
    """Mean over classes of the average precision, mAP, for every requested layer."""

    primary_metric = "mAP"
    own_images = True

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if no folder is given."""
        self.config.check_given("images with several classes (the probe svm takes images of one class)")

    def rows(self, subject: Subject) -> list[Row]:
        """Return mAP by layer.

        Raises UserError if a folder is not in the layout (see `raysl.probes._voc.read`), the splits share images, the
        test split shows no class, or scikit-learn is not installed.
        """
        config, splits = self.config, self.config.splits
        train, test = (_voc.union(config.folders, split) for split in splits)
        _voc.check_disjoint(train, test, splits, "voc-svm")
        classes = _voc.classes_of(train, test)
        if not classes:
            raise UserError(
                f"No image of the splits {' and '.join(splits)} of {config.data!r} shows a class."
            )
        specs = {layer: extraction.feature_spec(layer, config.svm.dims) for layer in subject.layers}
        seen_first = [train[i] for i in sample(len(train))]
        encode = load(subject, _views(seen_first, subject.image_size), list(specs.values()))
        seen, unseen = (features(encode, _views(some, subject.image_size)) for some in (train, test))
        labels = shown(train, classes), shown(test, classes)
        return [
            replace(row, layer=layer)
            for layer, spec in specs.items()
            for row in Svm(config.svm).run(Labeled(seen[spec], labels[0]), Labeled(unseen[spec], labels[1]))
        ]


def _views(pictures: Sequence[Picture], size: int) -> Iterator[Tensor]:
    """Yield batches of images, uint8 (b, 3, size, size), each resized to a square."""
    for first in range(0, len(pictures), _BATCH):
        yield decode.resized_to_square([one.image for one in pictures[first : first + _BATCH]], size)


def shown(pictures: Sequence[Picture], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the labels of images, int64 (n, c); see `raysl.probes.Labeled`."""
    shown_nc = np.zeros((len(pictures), len(classes)), dtype=np.int64)
    for row_c, one in zip(shown_nc, pictures, strict=True):
        for name, difficult in zip(one.classes, one.difficult_n.tolist(), strict=True):
            c = classes.index(name)
            row_c[c] = 1 if not difficult else row_c[c] or -1
    return shown_nc
