"""Detect objects: train a Faster R-CNN that starts from the pretrained backbone.

Command:  python experiments/detection.py --detection.data VOC --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, many for a probe (use a GPU). With --local: a few minutes, on drawn
          boxes unless a folder is given.
Expect:   on 292 images of blood cells, no clear difference between PIRL and the untrained backbone after 12 epochs; in
          the paper, PIRL gains most at AP75. See results/lectures.

PIRL (Misra and van der Maaten 2020), table 1; the probe `detection`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from raysl import rng
from raysl.errors import UserError
from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes import _voc
from raysl.probes.detection import Config as Detection
from raysl.reporting import pictures
from raysl.storage import Folder


@dataclass(frozen=True)
class DetectionFlags(ComparisonFlags):
    """Pretrain missing runs and train a detector from each backbone.

    Args:
        detection: protocol of the probe; its `data` is a folder in the layout of PASCAL VOC. With --local and
            no folder, boxes are drawn.
    """

    out: str = "results/detection"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "supervised")
    detection: Detection = field(default_factory=Detection)


def main(flags: DetectionFlags) -> None:
    """Print the table and write the report."""
    flags = small(flags)
    config = flags.detection
    if flags.local and not config.data:
        config = replace(config, data=str(drawn(Folder(flags.runs) / "boxes")))
    if not config.data:
        raise UserError("--detection.data is empty. Give a folder with boxes in the layout of PASCAL VOC.")
    if flags.local:
        flags = replace(flags, methods=flags.methods[:1])
        config = replace(config, epochs=1, sides=(64,), width=32)
    runs = trained(flags, ["detection"])
    measured(runs, flags, ["detection"], configs={"detection": config})
    reported(runs, flags, ["detection"], besides=("AP50", "AP75"))


def drawn(folder: Folder) -> Folder:
    """Fill a folder in the layout of PASCAL VOC with images of a circle and a square each."""
    counts = {"trainval": 24, "test": 12}
    for split, count in counts.items():
        names = [f"{split}-{number:02d}" for number in range(count)]
        for name in names:
            image, annotations = _example(name)
            (folder / _voc.IMAGES).write(f"{name}.png", pictures.png(image))
            (folder / _voc.ANNOTATIONS).write(f"{name}.xml", ElementTree.tostring(annotations))
        (folder / _voc.SPLITS).write(f"{split}.txt", "\n".join(names).encode())
    return folder


def _example(name: str) -> tuple[Image.Image, ElementTree.Element]:
    """Return an image of 64 by 64 pixels with a circle on the left and a square on the right, and its annotations."""
    image_rng = rng.generator("detection boxes", name)
    image = Image.new("RGB", (64, 64), _color(image_rng, 0, 128))
    annotations, draw = ElementTree.Element("annotation"), ImageDraw.Draw(image)
    for shape, paint, start in (("circle", draw.ellipse, 0), ("square", draw.rectangle, 32)):
        side = int(image_rng.integers(16, 31))
        left, top = start + int(image_rng.integers(0, 32 - side)), int(image_rng.integers(0, 64 - side))
        paint((left, top, left + side - 1, top + side - 1), fill=_color(image_rng, 128, 256))
        shown = ElementTree.SubElement(annotations, "object")
        ElementTree.SubElement(shown, "name").text = shape
        box = ElementTree.SubElement(shown, "bndbox")
        # VOC counts pixels from 1, and the last one belongs to the box.
        corners = {"xmin": left + 1, "ymin": top + 1, "xmax": left + side, "ymax": top + side}
        for corner, value in corners.items():
            ElementTree.SubElement(box, corner).text = str(value)
    return image, annotations


def _color(image_rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = image_rng.integers(low, high, 3).tolist()
    return red, green, blue


if __name__ == "__main__":
    command(main, DetectionFlags)
