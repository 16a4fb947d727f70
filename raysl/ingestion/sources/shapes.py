"""A procedural data set: shapes of ten kinds, in any number, without a download.

Each image is a pure function of (seed, split, index); see `raysl.ingestion.drawing`. The splits share no random
numbers. Drawing needs torch, which takes more memory than all else in ingest, so it is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raysl.ingestion import png
from raysl.ingestion.found import Found
from raysl.ingestion.sources import Confidence, Row, SourceLocation, Unit, UnitSize, numbered

SUMMARY = "shapes:N for drawn images"

# Default, smallest and largest value of each.
_OPTIONS = {"seed": (0, 0, 2**62), "size": (32, 16, 512), "plain": (0, 0, 1)}
# The size of a batch is fixed because the last bit of a float may depend on it.
_BATCH_PIXELS = 256 * 32 * 32


def recognize(location: SourceLocation) -> Confidence:
    return Confidence.IS if location.uri.partition(":")[0].partition("?")[0] == "shapes" else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True

    def __init__(self, location: SourceLocation) -> None:
        self._count, self._options, self._split = numbered(location, "shapes", "images", _OPTIONS)
        self.found = Found("drawn shapes", "the shape that is drawn", ("train", "test"), self._split)
        options = "seed={seed}&size={size}".format(**self._options) + "&plain=1" * self._options["plain"]
        self.name = f"shapes:{self._count}?{options}#{self._split}"

    def stamp(self) -> str:
        return self.name

    def units(self, size: UnitSize) -> Iterator[Unit]:
        from raysl.ingestion.drawing import CLASSES

        self.found.classes = dict.fromkeys(CLASSES, self._count // len(CLASSES))
        self.found.images = self._count
        for first in range(0, self._count, size.num_images):
            count = min(size.num_images, self._count - first)
            yield Unit(count, {"first": first, "count": count, "split": self._split, **self._options})


def read(unit: Unit) -> Iterator[Row]:
    from raysl.ingestion.drawing import CLASSES, draw
    from raysl.rng import ImageRng

    spec = unit.spec
    batch = max(1, _BATCH_PIXELS // spec["size"] ** 2)
    end = spec["first"] + spec["count"]
    # Batches start at multiples of their size, so that an image does not depend on the unit it is read in.
    for start in range(spec["first"] // batch * batch, end, batch):
        indices = np.arange(start, start + batch, dtype=np.int64)
        image_rng = ImageRng(spec["seed"], np.zeros(batch, np.int64), indices, f"shapes/{spec['split']}")
        pixels_bhwc, labels = draw(image_rng, spec["size"], bool(spec["plain"]))
        wanted = slice(max(spec["first"] - start, 0), end - start)
        rows = zip(png.encode(pixels_bhwc[wanted]), labels[wanted], indices[wanted].tolist(), strict=True)
        for image, label, index in rows:
            yield Row(image, CLASSES[label], f"shapes, image {index}")
