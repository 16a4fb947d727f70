"""Object detection: the whole network trained as a detector on a data set in the layout of PASCAL VOC.

PIRL (Misra and van der Maaten 2020) trains Faster R-CNN R50-C4 on VOC07 for 12,500 steps of 16 images (40 epochs), with
a learning rate of 0.003, a warm-up from a third over 1,000 steps and a drop to a tenth after 9,500. Images are mirrored
and resized to a random shorter side of 480 to 800 pixels, and BatchNorm is frozen with the statistics of pretraining.
AP, AP50 and AP75 in %: PIRL 44.7, 73.4, 47.0; Jigsaw 37.7, 64.9, 38.0; supervised 43.8, 74.5, 45.9.

This probe has the same schedule and another detector, with a feature pyramid, which fits any convolutional backbone and
the vision transformers of timm (see `raysl.probes._detector`). Its numbers compare with one another and not with
published ones. The learning rate is given for 256 images, as everywhere in raysl: 0.048 is 0.003 for 16 images.

Scores are those of COCO, computed by pycocotools, of the extra `detection`. A difficult object is treated as a crowd: a
detection inside it is neither right nor wrong.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from raysl import optim, rng
from raysl.dataset import DataSet
from raysl.errors import UserError, package
from raysl.extraction import NetworkEncoder
from raysl.fields import Bounds
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject, _detector, _voc
from raysl.probes._finetuning import LAYER, step
from raysl.probes._task import TaskProbe
from raysl.probes._voc import Picture, VocSettings
from raysl.ray_cluster.gpus import device
from raysl.rng import ImageRng
from raysl.stream import decode

# The output of a detector for an image: boxes (n, 4), labels (n,) from 1, and scores (n,).
Detections = dict[str, Tensor]

_MIRROR_CHANCE = 0.5
_NAMES = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Config(VocSettings):
    """Protocol of detection.

    Args:
        epochs: number of passes over the images.
        batch_size: images of a step.
        sides: lengths in pixels of the shorter side of an image: one of them at random in training, the last one in
            evaluation.
        width: channels of the feature pyramid, a multiple of 32.
        optim: as in pretraining; the learning rate is scaled by `batch_size`.
    """

    version: ClassVar[int] = 1
    epochs: Annotated[int, Bounds(1, 10**6)] = 40
    batch_size: Annotated[int, Bounds(1, 10**6)] = 16
    sides: tuple[Annotated[int, Bounds(32, 10**4)], ...] = tuple(range(480, 801, 32))
    width: Annotated[int, Bounds(32, 2**14)] = 256
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.048, schedule="step", milestones=(0.76,), warmup=0.08, warmup_start=1 / 3
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 32:
            raise UserError(f"--detection.width is {self.width}; it must be a multiple of 32, such as 256.")


class Detection(TaskProbe[Config]):
    """AP (the primary metric), AP50 and AP75, in 0 .. 1.

    Rows have the layer "pooled"; there are none for pixels, which cannot be trained.
    """

    primary_metric = "AP"
    needs = NetworkEncoder
    own_images = True

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if no folder is given."""
        self.config.check_given("images with boxes")

    def rows(self, subject: Subject) -> list[Row]:
        """Return the scores, the mean loss of the last epoch, and the number of dropped and of clipped boxes.

        Raises UserError if a folder is not in the layout (see `raysl.probes._voc.read`), a split has no boxes, the
        splits share images, the backbone has no maps, training has diverged, or pycocotools is not installed.
        """
        assert isinstance(subject.encoder, NetworkEncoder)
        _pycocotools("coco")
        config, seed = self.config, subject.seed
        train, test = (_voc.union(config.folders, split) for split in config.splits)
        _check(train, test, config)
        # A class that only the test split has is never detected, and counts as 0.
        classes = _voc.classes_of(train, test)
        with torch.random.fork_rng():
            torch.manual_seed(rng.key(seed, "detection") >> 1)
            network = subject.encoder.network()
            detector = _detector.build(network, len(classes), config.sides, config.width).to(device())
            losses = learn(detector, train, classes, config, seed)
            scores = score(test, detect(detector, test), classes)
        found = {
            **scores,
            "train_loss": losses[-1],
            "dropped_boxes": sum(one.dropped for one in (*train, *test)),
            "clipped_boxes": sum(one.clipped for one in (*train, *test)),
        }
        return [Row(name, float(value), LAYER) for name, value in found.items()]


def _check(train: Sequence[Picture], test: Sequence[Picture], config: Config) -> None:
    if not any(one.classes for one in train):
        raise UserError(
            f"The split {config.train_split!r} has no boxes to learn from. Give another --detection.train-split."
        )
    if not any((~one.difficult_n).any() for one in test):
        raise UserError(
            f"The split {config.test_split!r} has no boxes to score that are not difficult. Give another "
            "--detection.test-split."
        )
    _voc.check_disjoint(train, test, config.splits, "detection")


def learn(
    detector: FasterRCNN, pictures: Sequence[Picture], classes: Sequence[str], config: Config, seed: int
) -> list[float]:
    """Train a detector in place and return the mean loss of every epoch.

    The detector draws from torch's global generator. Raises UserError if the loss is no longer finite.
    """
    solvers: list[tuple[torch.optim.Optimizer, float]] = [(optim.build(config.optim, detector), 1.0)]
    size = min(config.batch_size, len(pictures))
    batches = math.ceil(len(pictures) / size)
    detector.train()
    losses = []
    for epoch in range(config.epochs):
        order_n = rng.generator("detection", seed, epoch).permutation(len(pictures))
        image_rng = ImageRng(seed, np.full(len(order_n), epoch), order_n, "detection")
        mirrored_n = image_rng.chance("hflip", _MIRROR_CHANCE).tolist()
        total = 0.0
        for batch in range(batches):
            some = range(batch * size, min((batch + 1) * size, len(order_n)))
            pairs = [_example(pictures[order_n[i]], classes, mirrored_n[i]) for i in some]
            parts = detector([image for image, _ in pairs], [target for _, target in pairs])
            loss: Tensor = sum(parts.values(), torch.zeros((), device=device()))
            total += loss.item()
            if not math.isfinite(total):
                raise UserError(
                    "The detector has diverged: its loss is not finite. Lower --detection.optim.lr, which is "
                    f"{config.optim.lr}."
                )
            rate = config.optim.lr_at(epoch * batches + batch, config.epochs * batches, config.batch_size)
            step(detector, loss, solvers, rate, config.optim.clip_norm)
        losses.append(total / batches)
    return losses


def _example(picture: Picture, classes: Sequence[str], mirrored: bool) -> tuple[Tensor, Detections]:
    """Return an image, float (3, h, w) in 0 .. 1, and its boxes, for training."""
    boxes_n4 = torch.from_numpy(picture.boxes_n4)
    image_chw = _pixels(picture)
    if mirrored:
        image_chw = image_chw.flip(-1)
        left_n, top_n, right_n, bottom_n = boxes_n4.unbind(1)
        width = picture.size[1]
        boxes_n4 = torch.stack([width - right_n, top_n, width - left_n, bottom_n], 1)
    labels_n = torch.tensor([1 + classes.index(name) for name in picture.classes], dtype=torch.int64)
    return image_chw, {"boxes": boxes_n4.to(device()), "labels": labels_n.to(device())}


def _pixels(picture: Picture) -> Tensor:
    return decode.decode(picture.image).to(device()).contiguous() / 255


def detect(detector: nn.Module, pictures: Sequence[Picture]) -> list[Detections]:
    """Return the detections in each image. Images are passed one at a time, so that they are not padded."""
    detector.eval()
    with torch.inference_mode():
        return [
            {name: value.cpu() for name, value in detector([_pixels(one)])[0].items()} for one in pictures
        ]


def score(
    pictures: Sequence[Picture], found: Sequence[Detections], classes: Sequence[str]
) -> dict[str, float]:
    """Return COCO's AP (mean over overlaps of 0.5 to 0.95), AP50 and AP75, in 0 .. 1.

    They are means over the classes of the pictures, with at most 100 detections in an image.

    Args:
        pictures: the annotated images; at least one box is not difficult.
        found: the detections in each picture; labels count from 1 in the order of `classes`.

    Raises:
        UserError: pycocotools is not installed.
    """
    rows = [
        [number, *_xywh(box), float(value), int(label)]
        for number, one in enumerate(found, start=1)
        for box, value, label in zip(one["boxes"].tolist(), one["scores"], one["labels"], strict=True)
    ]
    if not rows:
        # pycocotools does not accept an empty list.
        return dict.fromkeys(_NAMES, 0.0)
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _pycocotools("coco").COCO()
        truth.dataset = _truth(pictures, classes)
        truth.createIndex()
        found_boxes = truth.loadRes(np.array(rows, dtype=np.float64))
        judged = _pycocotools("cocoeval").COCOeval(truth, found_boxes, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: float(value) for name, value in zip(_NAMES, judged.stats[:3], strict=True)}


def _truth(pictures: Sequence[Picture], classes: Sequence[str]) -> dict[str, Any]:
    """Return the annotations in the format of COCO; images, boxes and classes count from 1."""
    boxes = [
        (number, _xywh(box), classes.index(name) + 1, bool(difficult))
        for number, one in enumerate(pictures, start=1)
        for box, name, difficult in zip(one.boxes_n4.tolist(), one.classes, one.difficult_n, strict=True)
    ]
    return {
        "images": [{"id": number} for number in range(1, len(pictures) + 1)],
        "categories": [{"id": number} for number in range(1, len(classes) + 1)],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "bbox": xywh,
                "area": xywh[2] * xywh[3],
                "category_id": label,
                "iscrowd": hard,
            }
            for i, (image, xywh, label, hard) in enumerate(boxes, start=1)
        ],
        "info": {},
    }


def _xywh(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _pycocotools(name: str) -> Any:
    """Return a module of pycocotools. Raises UserError if it is not installed."""
    return package(
        f"pycocotools.{name}", "The probe detection", "detection", " The other probes do not need it."
    )
