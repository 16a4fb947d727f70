"""Read images with more than 8 bits a channel, signed values or floats, and scale their values to 8 bits.

Pillow reads only the high byte of 16-bit color, and mixes up signed and unsigned values in TIFF. This module returns
the values that the file holds. Their scale depends on their kind and never on the brightest pixel of an image:

- "uint16" (and 9 to 15 bits): the full range of the type becomes 0 to 255.
- "int8", "int16", "int32", "uint32", "float" and the like: a range that holds for all images of the kind.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysl.stream.formats import DecodeError, package

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _CHANNELS, _PLANAR, _EXTRA, _SAMPLE_FORMAT, _NODATA = 258, 262, 277, 284, 338, 339, 42113
_WHITE_IS_ZERO = 0
# Kinds of alpha: colors that were multiplied by it, and others.
_ASSOCIATED, _UNASSOCIATED = 1, 2
_SIGNED = 2
# Raw modes of Pillow take one byte of two: "B" that of the lower address, "L" the other.
_NATIVE = "L" if sys.byteorder == "little" else "B"
_BLOCK_VALUES = 1 << 20


class Values(NamedTuple):
    """The values of an image as its file holds them.

    Args:
        values_hwc: (h, w, 1) or (h, w, 3), of any real type; NaN where the file says that there is no value.
        kind: "uint16" for all unsigned values of 9 to 16 bits, the name of the type for other integers, or "float".
        full: the largest value of the type, for "uint16"; None for kinds that need a range.
        alpha_hw: uint8 (h, w), 255 where the image is opaque; None without transparency.
    """

    values_hwc: NDArray[Any]
    kind: str
    full: float | None = None
    alpha_hw: NDArray[np.uint8] | None = None


def deep_values(image: Image.Image, data: bytes, page: int = 0) -> Values | None:
    """Return the values of an image that does not have 8 unsigned bits a channel; None when it has.

    Args:
        image: opened, at `page`, not loaded.
        data: the file it was opened from.
    """
    if image.format == "PNG" and image.mode in ("RGB", "L") and _raw_mode(image) == image.mode:
        return None
    if image.format == "PPM":
        return _ppm(image, data)
    if image.format == "JPEG2000" and image.mode.startswith("RGB"):
        return _jpeg2000(data)
    raw_mode = _raw_mode(image)
    native = re.sub(r"B(?=[SF]$)", "N", raw_mode)
    if native != raw_mode and image.tile[0].codec_name == "libtiff":  # type: ignore[attr-defined]
        # libtiff has already swapped the bytes, which Pillow 13 does not know for signed and float values.
        image = _reopened(data, page, native)
    if raw_mode == "LA;16B":
        # Gray and alpha of 16 bits are as many bytes as four channels of 8.
        quads = np.asarray(_reopened(data, page, "RGBA")).astype(np.uint16)
        return Values(
            quads[:, :, :1] << 8 | quads[:, :, 1:2], "uint16", 65535, quads[:, :, 2].astype(np.uint8)
        )
    if re.fullmatch(r"RGB[AaX]?;16[BLN]", raw_mode):
        return _wide_color(image, data, page, raw_mode)
    tags: dict[int, Any] = dict(image.tag_v2) if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    signed = _first(tags.get(_SAMPLE_FORMAT, 1)) == _SIGNED
    if image.mode == "L" and signed:
        return Values(np.asarray(image).view(np.int8)[:, :, None], "int8")
    if image.mode.startswith("I;16"):
        full = (1 << min(_first(tags.get(_BITS, 16)), 16)) - 1
        values_hw = np.asarray(image).astype(np.uint16)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values_hw = full - values_hw
        key = image.info.get("transparency")
        alpha_hw = np.where(values_hw == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
        return Values(values_hw[:, :, None], "uint16", full, alpha_hw)
    if image.mode == "I":
        values_hw = np.asarray(image)
        kind = f"int{_first(tags.get(_BITS, 32))}" if signed or not tags else "uint32"
        values_hw = values_hw.view(np.uint32) if kind == "uint32" else values_hw
        return Values(_without_nodata(values_hw[:, :, None], tags.get(_NODATA)), kind)
    if image.mode == "F":
        return Values(_without_nodata(np.asarray(image)[:, :, None], tags.get(_NODATA)), "float")
    return None


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _raw_mode(image: Image.Image) -> str:
    """Return the mode in which Pillow unpacks the rows of an image; "" if it is unknown."""
    if not getattr(image, "tile", None):
        return ""
    args = image.tile[0].args  # type: ignore[attr-defined]
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _reopened(data: bytes, page: int, raw_mode: str) -> Image.Image:
    """Open a page again and unpack it in another mode."""
    image: Any = Image.open(io.BytesIO(data))
    if page:
        image.seek(page)
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()
    return image  # type: ignore[no-any-return]


def _wide_color(image: Image.Image, data: bytes, page: int, raw_mode: str) -> Values:
    order = raw_mode[-1] if raw_mode[-1] in "BL" else _NATIVE
    other = raw_mode[:-1] + ("L" if order == "B" else "B")
    high_hwc = np.asarray(image)
    low_hwc = np.asarray(_reopened(data, page, other))
    values_hwc = high_hwc[:, :, :3].astype(np.uint16) << 8 | low_hwc[:, :, :3]
    alpha_hw = high_hwc[:, :, 3] if image.mode == "RGBA" else None
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        alpha_hw = np.where((values_hwc == np.array(key)).all(axis=2), 0, 255).astype(np.uint8)
    return Values(values_hwc, "uint16", 65535, alpha_hw)


def _ppm(image: Image.Image, data: bytes) -> Values | None:
    """Return the values of a portable map of 9 to 16 bits, whose header states the largest value, or of floats."""
    tile = image.tile[0]  # type: ignore[attr-defined]
    if image.mode == "F":
        return Values(np.asarray(image)[:, :, None], "float")
    if image.mode == "I" and tile.codec_name == "raw":
        full = 65535
    elif isinstance(tile.args, tuple) and isinstance(tile.args[1], int) and tile.args[1] > 255:
        full = tile.args[1]
    else:
        return None
    channels = 3 if image.mode == "RGB" else 1
    if tile.codec_name == "ppm_plain":
        words = data[tile.offset :].split(None, image.height * image.width * channels)
        values = np.array(words[: image.height * image.width * channels], dtype=np.uint16)
    else:
        values = np.frombuffer(data, ">u2", image.height * image.width * channels, tile.offset)
    return Values(values.reshape(image.height, image.width, channels), "uint16", full)


def _jpeg2000(data: bytes) -> Values | None:
    """Return the values of JPEG 2000 in color with more than 8 bits, where Pillow turns white into black.

    Raises:
        DecodeError: the package is not installed.
    """
    # The header of the codestream (ITU-T T.800, annex A.5.1) says the bits of each channel, less one, and its sign.
    header = data.find(b"\xff\x4f\xff\x51") + 2
    depth = data[header + 40]
    if depth & 0x7F < 8:
        return None
    imagecodecs = package("imagecodecs", "imagecodecs", "a JPEG 2000 image of more than 8 bits")
    values_hwc = imagecodecs.jpeg2k_decode(data)
    full = (2 << (depth & 0x7F)) - 1
    if depth & 0x80:
        return Values(values_hwc[:, :, :3], "int16")
    alpha_hw = scaled(values_hwc[:, :, 3], 0, full) if values_hwc.shape[2] == 4 else None
    return Values(values_hwc[:, :, :3], "uint16", full, alpha_hw)


def _unmultiplied(values_hwc: NDArray[Any], alpha_hw1: NDArray[Any], opaque: float) -> NDArray[Any]:
    """Divide colors by the opacity that they were multiplied by; those of fully transparent pixels become 0."""
    share_hw1 = alpha_hw1 / np.float32(opaque)
    colors_hwc = np.zeros(values_hwc.shape, np.result_type(share_hw1, values_hwc))
    np.divide(values_hwc, share_hw1, out=colors_hwc, where=share_hw1 > 0)
    return colors_hwc if values_hwc.dtype.kind == "f" else colors_hwc.clip(max=opaque)


def _without_nodata(values_hwc: NDArray[Any], nodata: Any) -> NDArray[Any]:
    """Replace the number that a GDAL file uses for missing values by NaN."""
    try:
        absent = float(str(nodata).strip("\0 "))
    except ValueError:
        return values_hwc
    kind = values_hwc.dtype if values_hwc.dtype.kind == "f" else np.dtype(np.float64)
    return np.where(values_hwc == kind.type(absent), np.nan, values_hwc)


def read_by_pillow(tags: Any) -> bool:
    """Return whether Pillow reads a TIFF page correctly, which it does not if each channel is stored separately."""
    bits = tags.get(_BITS, (1,))
    if tags.get(_PHOTOMETRIC) in (0, 1) and 0 in tags.get(_EXTRA, ()):
        return False  # Bands of a sensor, of which Pillow takes the first.
    is_plain = len(bits) != 2 and max(bits) <= 8 and _ASSOCIATED not in tags.get(_EXTRA, ())
    return tags.get(_PLANAR) != 2 or tags.get(_CHANNELS, 1) == 1 or is_plain


def tiff_pages(data: bytes) -> Any:
    """Open a TIFF file whose types Pillow does not know. Read its pages with `tiff_values`.

    Raises:
        DecodeError: the package is not installed.
    """
    what = "a TIFF image of a type that Pillow cannot read (64 bits, or several channels of signed or float values)"
    tifffile = package("tifffile", "tifffile", what)
    # Damage is listed in bad_images.jsonl; the package would log a line for each damaged tag.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile.TiffFile(io.BytesIO(data)).pages


def tiff_values(page: Any) -> Values:
    """Return the values of a page that `tiff_pages` opened.

    Raises:
        DecodeError: the page has neither one channel nor three, or no real values.
    """
    channels = page.samplesperpixel - len(page.extrasamples)
    if (
        page.photometric > 2
        or channels not in (1, 3)
        or page.ndim > 3
        or page.dtype is None
        or page.dtype.kind not in "uif"
    ):
        raise DecodeError(
            f"a TIFF page of shape {page.shape}, type {page.dtype} and colors {page.photometric.name}: convert it to "
            "gray or RGB"
        )
    if channels == 1 and 0 in page.extrasamples:
        raise DecodeError(
            f"a TIFF page of {page.samplesperpixel} bands: convert the bands to be seen to gray or RGB"
        )
    values_hwc = page.asarray().reshape(page.shape)
    if page.ndim == 2:
        values_hwc = values_hwc[:, :, None]
    elif page.planarconfig == 2:
        values_hwc = values_hwc.transpose(1, 2, 0)
    values_hwc, extra_hwc = values_hwc[:, :, :channels], values_hwc[:, :, channels:]
    nodata = page.tags.get(_NODATA)
    kind = "float" if page.dtype.kind == "f" else str(page.dtype.newbyteorder("="))
    full = {"uint8": 255.0, "uint16": float((1 << page.bitspersample) - 1)}.get(kind)
    if full and page.photometric == _WHITE_IS_ZERO:
        values_hwc = int(full) - values_hwc
    if full is None and nodata is not None:
        values_hwc = _without_nodata(values_hwc, nodata.value)
    alpha_hw = None
    if extra_hwc.shape[2] and page.extrasamples[0] in (_ASSOCIATED, _UNASSOCIATED):
        opaque = 1.0 if kind == "float" else float(np.iinfo(page.dtype).max)
        alpha_hw = scaled(extra_hwc[:, :, 0], 0, opaque)
        if page.extrasamples[0] == _ASSOCIATED:
            values_hwc = _unmultiplied(values_hwc, extra_hwc[:, :, :1], opaque)
    return Values(values_hwc, kind, full, alpha_hw)


def extremes(values_hwc: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest finite value; (inf, -inf) when there is none."""
    low, high = np.inf, -np.inf
    for block in _blocks(values_hwc):
        finite = block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Scale values to uint8: up to `low` and NaN become 0, from `high` on 255. If `low` >= `high`, all become 0."""
    out = np.zeros(values.shape, np.uint8)
    if not low < high:
        return out
    factor = 255 / (high - low)
    for block, into in zip(_blocks(values), _blocks(out), strict=True):
        levels = (np.nan_to_num(block.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * factor
        into[...] = np.rint(levels.clip(0, 255))
    return out


def _blocks(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Split an array into pieces of rows, so that floats of 64 bits exist for one piece at a time."""
    rows = max(1, _BLOCK_VALUES // max(1, values[0].size)) if len(values) else 1
    return [values[first : first + rows] for first in range(0, len(values), rows)]
