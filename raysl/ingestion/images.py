"""From the image files of a source to the images that a data set stores.

Ordinary files (8-bit JPEG, PNG and WebP, opaque, one image each) are stored byte for byte. All others become 8-bit PNG
files here, once, so that whatever reads the data set needs no configuration and no optional package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raysl.errors import counted
from raysl.ingestion import png
from raysl.ingestion.sources import Row
from raysl.stream.formats import DecodeError
from raysl.stream.pixels import DecodeConfig, Picture, Ranges, pictures

# Kinds of a `Tally` beside those of `raysl.stream.depth.Values`.
TRANSPARENT, PAGES, FULL_RANGE = "transparent", "pages", "uint16"


@dataclass(frozen=True)
class Treated:
    """Images of one kind that were changed when they were ingested."""

    count: int  # for `PAGES` of files that hold more images than were taken
    example: str  # the first of them
    low: float = float("inf")  # smallest and largest value found, for kinds with a scale
    high: float = float("-inf")
    left_out: int = 0  # pages and frames that were not taken, for `PAGES`
    one_color: int = 0  # images of which all pixels came out equal although the values in the file are not

    def __add__(self, other: Treated) -> Treated:
        return Treated(
            self.count + other.count,
            self.example,
            min(self.low, other.low),
            max(self.high, other.high),
            self.left_out + other.left_out,
            self.one_color + other.one_color,
        )


Tally = dict[str, Treated]


def merge(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of several tallies, by kind."""
    total: Tally = {}
    for tally in tallies:
        for kind, treated in tally.items():
            _add(total, kind, treated)
    return total


def ranges_of(tally: Tally, config: DecodeConfig) -> dict[str, tuple[float, float]]:
    """Return the range of values for each kind that needs one and is given none by the configuration."""
    if config.range is not None:
        return {}
    return {
        kind: (treated.low, treated.high)
        for kind, treated in tally.items()
        if kind not in (TRANSPARENT, PAGES, FULL_RANGE) and treated.low <= treated.high
    }


def stored(row: Row, config: DecodeConfig, ranges: Ranges, tally: Tally) -> Iterator[Row]:
    """Yield what a data set stores for an image file: one row, or one for each page or frame.

    Images that are changed are added to `tally`. A kind that is not in `ranges`, see `ranges_of`, is scaled by each
    image alone, for the time being.
    """
    if row.image is None:
        yield row
        return
    for picture in pictures(row.image, config, ranges, row.path):
        if isinstance(picture, DecodeError):
            yield row._replace(image=None, reason=str(picture))
            continue
        path = f"{row.path}#{picture.page}" if picture.page and config.frames == "all" else row.path
        _count(picture, path, tally)
        yield row if picture.ordinary else row._replace(image=_encoded(picture), path=path)


def _count(picture: Picture, path: str, tally: Tally) -> None:
    if picture.kind:
        low, high = picture.found
        pixels_hwc = np.asarray(picture.rgb)
        one_color = low < high and bool((pixels_hwc == pixels_hwc[0, 0]).all())
        _add(tally, picture.kind, Treated(1, path, low, high, one_color=int(one_color)))
    if picture.left_out:
        _add(tally, PAGES, Treated(1, path, left_out=picture.left_out))


def _add(tally: Tally, kind: str, treated: Treated) -> None:
    tally[kind] = tally[kind] + treated if kind in tally else treated


def _encoded(picture: Picture) -> bytes:
    pixels_hwc = picture.pixels_hwc
    gray_hwc = pixels_hwc[:, :, :1]
    return png.encode((gray_hwc if (pixels_hwc == gray_hwc).all() else pixels_hwc)[None])[0]


def sentences(tally: Tally, config: DecodeConfig) -> list[str]:
    """Return what was done to the images that are not ordinary, one line for each kind."""
    return [_sentence(kind, treated, config) for kind, treated in sorted(tally.items())]


def _sentence(kind: str, treated: Treated, config: DecodeConfig) -> str:
    images = f"{counted(treated.count, 'image')} (the first: {treated.example})"
    dull = f" {treated.one_color:,} of them came out in one color." if treated.one_color else ""
    if kind == TRANSPARENT:
        return f"{images} with transparent parts: put on {config.background} (--background).{dull}"
    if kind == PAGES:
        return (
            f"{counted(treated.count, 'file')} (the first: {treated.example}) with several pages or frames: the "
            f"first of each is taken, {counted(treated.left_out, 'other')} left out (--frames all takes each as an "
            "image)."
        )
    if config.range is not None:
        low, high = config.range
        return f"{images} of {kind} values: {low:g} to {high:g} become 0 to 255, as --range says.{dull}"
    if kind == FULL_RANGE:
        return (
            f"{images} of 9 to 16 bits: the full range of the type becomes 0 to 255; the largest value found is "
            f"{treated.high:g} (--range LOW HIGH for another range).{dull}"
        )
    if treated.low >= treated.high:
        what = f"all are {treated.low:g}" if treated.low == treated.high else "none is finite"
        return (
            f"{images} of {kind} values: {what}, and become 0, black (--range LOW HIGH sets a range).{dull}"
        )
    missing = "; NaN becomes 0" if kind == "float" else ""
    return (
        f"{images} of {kind} values: {treated.low:g} to {treated.high:g}, the range of all of them, become 0 to 255"
        f"{missing} (--range LOW HIGH for another range).{dull}"
    )


def record(tally: Tally, config: DecodeConfig) -> dict[str, Any]:
    """Return what the manifest says about the rule and the images under it; a JSON value."""
    counts = {kind: treated.count for kind, treated in sorted(tally.items())}
    return {**settings(config), "ranges": ranges_of(tally, config), "changed": counts}


def settings(config: DecodeConfig) -> dict[str, Any]:
    """Return the configuration as a JSON value."""
    return asdict(config) | {"range": config.range and [float(bound) for bound in config.range]}
