"""Action classification: a linear classifier on the mean of the features of the frames of a clip.

The usual baseline of frozen image features on clips (Karpathy et al. 2014, "Large-scale video classification with
convolutional neural networks"; Simonyan and Zisserman 2014 average 25 frames): frames are evenly spaced in time, each
is encoded in the evaluation view, and their features are averaged. The classifier is that of the probe `linear`. The
order of the frames is lost, so the probe measures what frames show and not how they move.

--train and --test are data sets of clips; see `raysl.dataset.clips`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysl import extraction
from raysl.dataset import DataSet
from raysl.errors import MissingValueError, explained
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, Subject, common_labels
from raysl.probes._images import each_clip, features, load, sample, spaced
from raysl.probes._task import TaskProbe
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.stream import decode

COMMAND = "raysl probe RUN --train clips:500#train --test clips:200#test --probes video"


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of action classification.

    Args:
        frames: number of frames of each clip, evenly spaced in time; all of a clip that has fewer.
        linear: protocol of the classifier.
    """

    version: ClassVar[int] = 1
    frames: Annotated[int, Bounds(1, 10**6)] = 8
    linear: LinearConfig = field(default_factory=LinearConfig)


class Video(TaskProbe[Config]):
    """Top-1, the primary metric, of the classes of clips, and the other accuracies of the probe `linear`."""

    primary_metric = "top1"
    learns = True

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if the data are no clips."""
        for data in (train, test):
            if not data.manifest.clips:
                raise MissingValueError(
                    f"The probe video needs clips, and {data.name!r} has images. Give clips for --train and "
                    "--test, such as clips:500 and clips:200#test; the probe linear classifies images."
                )

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows of all layers. Raises UserError if there are no labels, or a frame is damaged."""
        specs = {layer: extraction.feature_spec(layer, self.config.linear.dims) for layer in subject.layers}
        chosen_n = sample(subject.train.num_images, self.config.frames)
        encode = load(subject, self._clips(subject.train, subject.image_size, chosen_n), list(specs.values()))
        sets = []
        for data, labels_n in zip(
            (subject.train, subject.test), common_labels(subject.train, subject.test), strict=True
        ):
            views = self._clips(data, subject.image_size)
            found = features(encode, views, lambda values_fd: values_fd.mean(0, keepdim=True))
            sets.append({spec: Labeled(found[spec], labels_n, data.manifest.fingerprint) for spec in found})
        return [
            replace(row, layer=layer)
            for layer, spec in specs.items()
            for row in Linear(self.config.linear).run(sets[0][spec], sets[1][spec])
        ]

    def _clips(self, data: DataSet, size: int, chosen_n: NDArray[np.int64] | None = None) -> Iterator[Tensor]:
        """Yield the frames of each chosen clip in the evaluation view, uint8 (f, 3, size, size)."""
        for index, clips, row in each_clip(data, ("frames", "times"), chosen_n):
            numbers = spaced(clips.num_frames(row), self.config.frames)
            what = f"A frame of clip {index} of {str(data.folder)!r} cannot be decoded"
            with explained(what, "Ingest the source again.", decode.DecodeError):
                yield decode.evaluation_views([clips.frame(row, number) for number in numbers], size)
