"""Action classification: a linear classifier on the mean of the features of the frames of a clip.

The usual baseline of frozen image features on clips (Karpathy et al. 2014, "Large-scale video classification with
convolutional neural networks"; Simonyan and Zisserman 2014 average 25 frames): frames are evenly spaced in time, each
is encoded in the evaluation view, and their features are averaged. The classifier is that of the probe `linear`. The
order of the frames is lost, so the probe measures what frames show and not how they move.

--train and --test are data sets of clips; see `raysl.clips`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from raysl import extraction
from raysl.backbone import norm
from raysl.clips import Clips
from raysl.dataset import DataSet
from raysl.errors import Unset, UserError
from raysl.extraction import Encode
from raysl.fields import Bounds
from raysl.probes import REESTIMATED, Floats, Labelled, Row, Settings, Subject, common_labels
from raysl.probes._poses import spaced
from raysl.probes._task import device, run_tasks
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.stream import decode

COMMAND = "raysl probe RUN --train clips:500#train --test clips:200#test --probes video"

_PART_CLIPS = 16


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


class Video:
    """Top-1, the primary metric, of the classes of clips."""

    primary_metric = "top1"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield accuracies of each layer; see `raysl.probes.accuracy_rows`. Runs one Ray task.

        Raises:
            UserError: the data are no clips, have no labels or are the same, or a frame is damaged.
        """
        for data in (subject.train, subject.test):
            if not data.manifest.clips:
                raise Unset(
                    f"The probe video needs clips, and {str(data.folder)!r} has images. Give clips for --train and "
                    "--test, such as clips:500 and clips:200#test; the probe linear classifies images."
                )
        (rows,) = run_tasks(measure, [(subject, self.config)])
        yield from rows


def measure(subject: Subject, config: Config) -> list[Row]:
    """Return the rows of each layer; see `Video.examine`."""
    specs = {layer: extraction.feature_spec(layer, config.linear.dims) for layer in subject.layers}
    wanted = list(specs.values())
    if subject.bn_statistics == REESTIMATED:
        encode = extraction.load_reestimated(subject.encoder, _sample(subject, config), device(), wanted)
    else:
        encode = subject.encoder.load(device(), wanted)
    labels = common_labels(subject.train, subject.test)
    sets = []
    for data, labels_n in zip((subject.train, subject.test), labels, strict=True):
        found = features(encode, data, subject.image_size, config.frames)
        sets.append({spec: Labelled(found[spec], labels_n, data.manifest.fingerprint) for spec in wanted})
    return [
        replace(row, layer=layer)
        for layer, spec in specs.items()
        for row in Linear(config.linear).run(sets[0][spec], sets[1][spec])
    ]


def features(encode: Encode, data: DataSet, size: int, frames: int) -> dict[str, Floats]:
    """Return the mean features of the frames of every clip, float32 (n, d), by feature spec."""
    made: dict[str, list[Tensor]] = {}
    for clip_bchw in _clips(data, size, frames):
        with torch.inference_mode():
            for spec, values_fd in encode(clip_bchw.to(device())).items():
                made.setdefault(spec, []).append(values_fd.float().mean(0).cpu())
    return {spec: torch.stack(parts).numpy() for spec, parts in made.items()}


def _clips(data: DataSet, size: int, frames: int) -> Iterator[Tensor]:
    """Yield the frames of each clip in the evaluation view, uint8 (f, 3, size, size)."""
    for first in range(0, data.num_images, _PART_CLIPS):
        rows = np.arange(first, min(first + _PART_CLIPS, data.num_images), dtype=np.int64)
        clips = Clips(data.read(rows, ("frames", "times")))
        for row in range(len(clips)):
            chosen = [clips.frame(row, number) for number in spaced(clips.num_frames(row), frames)]
            try:
                yield decode.centre(chosen, size)
            except decode.DecodeError as error:
                raise UserError(
                    f"A frame of clip {first + row} of {str(data.folder)!r} cannot be decoded: {error}. Ingest the "
                    "source again."
                ) from error


def _sample(subject: Subject, config: Config) -> Iterator[Tensor]:
    """Yield frames of clips to learn from, for the statistics of BatchNorm."""
    seen = 0
    for clip_bchw in _clips(subject.train, subject.image_size, config.frames):
        yield clip_bchw
        seen += len(clip_bchw)
        if seen >= norm.STATISTICS_IMAGES:
            return
