"""The probe `svm` on images that show several classes: PASCAL VOC 2007 itself, or any folder in its layout.

Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning". An image shows the classes
of its boxes. One whose boxes of a class are all "difficult" is not judged in that class, and counts as a negative when
the class is learned.

An image is seen whole, squashed to a square, as there: the evaluation view of the other probes cuts off the ends of its
longer side, and with them objects that it is said to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysl import extraction
from raysl.errors import Unset, UserError
from raysl.extraction import Encode, Encoder
from raysl.probes import Floats, Labelled, Row, Subject, _voc
from raysl.probes._task import device, elsewhere
from raysl.probes._voc import Picture
from raysl.probes.svm import Config as SvmConfig
from raysl.probes.svm import Svm
from raysl.storage import Folder
from raysl.stream import decode

_BATCH = 128


@dataclass(frozen=True)
class Config:
    """Protocol of the support vector machines on images with several classes.

    Args:
        data: a folder in the layout of PASCAL VOC, with JPEGImages, Annotations and ImageSets/Main; the labels of the
            other data are not looked at.
        train_split: of its lists of images, the one to learn from.
        test_split: the one to be judged on.
        svm: the machines.
        version: see `raysl.probes`.
    """

    data: str = ""
    train_split: str = "trainval"
    test_split: str = "test"
    svm: SvmConfig = field(default_factory=SvmConfig)
    version: int = 2

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on: the images and classes of both splits, wherever their folder lies."""
        contents = ""
        if self.data:
            contents = _voc.fingerprint(Folder(self.data), (self.train_split, self.test_split))
        return {**asdict(self), "data": contents}


class VocSvm:
    """Mean over classes of the average precision, of every layer that was asked for. Its headline is mAP."""

    headline = "mAP"

    own_images = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yields mAP by layer. Runs one task of Ray, on a GPU if there are any.

        Raises:
            UserError: no folder was given, or it is not as `raysl.probes._voc.read` wants it, the splits share images,
                the test split shows no class, or scikit-learn is not installed.
        """
        if not self.config.data:
            raise Unset(
                "The probe voc_svm needs images with several classes. Give --voc-svm.data FOLDER, a folder in the "
                "layout of PASCAL VOC, with JPEGImages, Annotations and ImageSets/Main; the probe svm takes data of "
                "one class an image."
            )
        folder = Folder(self.config.data)
        call = (subject.encoder, subject.layers, subject.image_size, self.config, folder)
        (rows,) = elsewhere(_measure, [call])
        yield from rows


def _measure(encoder: Encoder, layers: Sequence[str], size: int, config: Config, folder: Folder) -> list[Row]:
    """All rows."""
    splits = (config.train_split, config.test_split)
    train, test = (_voc.read(folder, split) for split in splits)
    _voc.check_apart(train, test, splits, "voc-svm")
    classes = _voc.classes_of(train, test)
    if not classes:
        raise UserError(f"No image of the splits {' and '.join(splits)} of {str(folder)!r} shows a class.")
    taps = {layer: extraction.feature_spec(layer, config.svm.dims) for layer in layers}
    encode = encoder.load(device(), list(taps.values()))
    seen, unseen = (_features(encode, pictures, size) for pictures in (train, test))
    rows = []
    for layer, tap in taps.items():
        known = Labelled(seen[tap], shown(train, classes))
        rows += [
            replace(row, layer=layer)
            for row in Svm(config.svm).run(known, Labelled(unseen[tap], shown(test, classes)))
        ]
    return rows


def _features(encode: Encode, pictures: Sequence[Picture], size: int) -> Mapping[str, Floats]:
    """float32 (n, d) by tap, of every image, squashed to a square."""
    made: dict[str, list[Floats]] = {}
    for first in range(0, len(pictures), _BATCH):
        pixels_bchw = decode.squashed([one.image for one in pictures[first : first + _BATCH]], size)
        with torch.inference_mode():
            found = encode(pixels_bchw.to(device()))
        for tap, values_bd in found.items():
            made.setdefault(tap, []).append(values_bd.float().cpu().numpy())
    return {tap: np.concatenate(parts) for tap, parts in made.items()}


def shown(pictures: Sequence[Picture], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """int64 (n, c), as `raysl.probes.Labelled.labels_n`: 1 for a class that an image shows, 0 for one that it does not,
    -1 for one of which all its boxes are difficult."""
    shown_nc = np.zeros((len(pictures), len(classes)), dtype=np.int64)
    for row_c, one in zip(shown_nc, pictures, strict=True):
        for name, difficult in zip(one.classes, one.difficult_n.tolist(), strict=True):
            c = classes.index(name)
            row_c[c] = 1 if not difficult else row_c[c] or -1
    return shown_nc
