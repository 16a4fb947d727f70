"""Turn the bytes of an image file into 8-bit RGB. Only this module decides how each kind of file is read.

`pictures` reads files of users under a `DecodeConfig`; the table "Images" in docs/data.md lists the treatment of each
kind. Ingest stores every image in a form that reads the same under any configuration (`Picture.ordinary`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from raysl.errors import UserError
from raysl.fields import Bounds, check
from raysl.stream import depth
from raysl.stream.formats import (
    JPEG,
    MAX_PIXELS,
    DecodeError,
    UnknownFormatError,
    check_size,
    is_tiff,
    open_image,
)

# Formats that data sets store as they are, when one opaque image of 8 bits is inside.
_STORED = ("JPEG", "MPO", "PNG", "WEBP")
# Further images inside are previews, layers or sizes of the same image.
_ONE_IMAGE = ("JPEG", "MPO", "PSD", "ICO", "CUR", "ICNS", "DDS")
# Many programs write 0 into the fourth byte of a pixel of these formats although it is opaque.
_ALPHA_OFTEN_UNUSED = ("TGA", "BMP", "DIB")
_LONGEST_REASON = 200
_ORIENTATION, _SUBFILE, _TILE_WIDTH, _TILE_HEIGHT = 274, 254, 322, 323
# Entries of Pillow's `info` that may hold the orientation of a PNG file.
_ORIENTATION_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
_REDUCED_OR_MASK = 0b101
# Markers of JPEG (ITU-T T.81, table B.1).
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)
_WITHOUT_SIZE = {0x01, *range(0xD0, 0xD9), 0xFF}


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become 8-bit RGB.

    Args:
        background: color behind transparent parts: "white", "black" or "#rrggbb".
        range: the lowest and the highest value, which become 0 and 255, in images of more than 8 bits and of signed or
            float values. Without it, 16-bit images use the full range of their type, and signed and float images the
            range of the data set.
        frames: "first" takes the first page or frame of a TIFF, GIF or other image file, "all" stores each as an image
            of its own.
        max_pixels: images with more pixels are listed as bad and not decoded. The maximum, 178,956,970, is Pillow's
            limit.

    Raises:
        UserError: a value is not allowed.
    """

    background: str = "white"
    range: tuple[float, float] | None = None
    frames: Literal["first", "all"] = "first"
    max_pixels: Annotated[int, Bounds(1, MAX_PIXELS)] = MAX_PIXELS

    def __post_init__(self) -> None:
        check(self)
        if not re.fullmatch(r"white|black|#[0-9a-fA-F]{6}", self.background):
            raise UserError(
                f"--background is {self.background!r} and must be white, black or a color such as '#80ff00'."
            )
        if self.range is not None and self.range[0] >= self.range[1]:
            raise UserError(
                f"--range is {self.range[0]:g} {self.range[1]:g} and must be two finite numbers, LOW below HIGH."
            )


class Picture(NamedTuple):
    """One image of a file.

    Args:
        rgb: as it was decoded; an array is uint8 (h, w, 3).
        orientation: how it is to be turned, 1 to 8 as in EXIF.
        ordinary: whether the file reads as these pixels under every configuration.
        kind: what was done to the pixels: "transparent", a kind of `depth.Values`, or "" for nothing.
        found: smallest and largest finite value in the file, for the kinds of `depth.Values`.
        scale: the values that became 0 and 255, for these kinds; None when the range of the data set is needed and
            was not given, and then the pixels are scaled by `found`.
        page: number of the page or frame, from 1; 0 when it is the only one.
        left_out: how many other pages or frames of the file were not taken.
    """

    rgb: Image.Image | NDArray[np.uint8]
    orientation: int = 1
    ordinary: bool = False
    kind: str = ""
    found: tuple[float, float] = (0.0, 255.0)
    scale: tuple[float, float] | None = None
    page: int = 0
    left_out: int = 0

    @property
    def pixels_hwc(self) -> NDArray[np.uint8]:
        """uint8 (h, w, 3), RGB, upright. Ingest checks most images without asking for it."""
        pixels_hwc = np.asarray(self.rgb)
        if self.orientation == 1 and pixels_hwc.flags.writeable and pixels_hwc.flags.c_contiguous:
            return pixels_hwc
        return upright(pixels_hwc, self.orientation)


Ranges = Mapping[str, tuple[float, float]]


def pictures(
    data: bytes, config: DecodeConfig, ranges: Ranges | None = None, name: str = ""
) -> Iterator[Picture | DecodeError]:
    """Read the images of a file: one, or each page or frame where the configuration asks for all.

    Args:
        data: the whole file.
        ranges: by kind of `depth.Values`, the values that become 0 and 255.
        name: name of the file, for formats that the content alone does not tell.

    Yields:
        For each image, the picture or the reason that it cannot be read.
    """
    try:
        pixels_hwc = plain_jpeg(data, config.max_pixels)
        if pixels_hwc is not None:
            yield Picture(pixels_hwc, ordinary=True)
            return
        readers = _readers(data, config, ranges or {}, name)
    except Exception as error:  # On damaged files, Pillow's plugins raise errors of many kinds.
        yield _as_decode_error(error)
        return
    if not readers:
        yield DecodeError("holds no image")
    for read in readers:
        try:
            picture = read()
        except Exception as error:  # As above.
            yield _as_decode_error(error)
        else:
            yield picture


def _as_decode_error(error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return DecodeError(
            f"has more pixels than the {MAX_PIXELS:,} that are allowed: shrink it or cut it up"
        )
    kind = "" if isinstance(error, OSError | SyntaxError) else f"{type(error).__name__}: "
    # Pillow says of WebP only that it "could not create decoder object".
    what = "its WebP data are cut off or wrong" if "decoder object" in str(error) else str(error)
    return DecodeError(f"is damaged: {kind}{what[:_LONGEST_REASON]}")


class JpegHeader(NamedTuple):
    """What the header of a JPEG file says: the marker of its frame, the bits of a channel, and the channels."""

    frame: int
    bits: int
    channels: int

    @property
    def is_common(self) -> bool:
        """True for gray or YCbCr of 8 bits, Huffman-coded, sequential or progressive, as nearly all files are."""
        return self.frame in _COMMON_FRAMES and self.bits == 8 and self.channels in (1, 3)


def plain_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """Decode a JPEG file that needs nothing but decoding; None if it needs Pillow.

    Returns:
        uint8 (h, w, 3).

    Raises:
        DecodeError: it has more pixels than allowed.
    """
    if plain_header(data, max_pixels) is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data)  # type: ignore[no-any-return]
    except ValueError:
        return None  # CMYK, or damage that Pillow may forgive, and else says more about.


def plain_header(data: bytes, max_pixels: int) -> JpegHeader | None:
    """Read the header of a JPEG file; None if it is not whole, or asks for a rotation. Raises as `plain_jpeg`."""
    if data[:3] != JPEG:
        return None
    offset, marker = 2, 0
    header = JpegHeader(0, 0, 0)
    try:
        while marker != _START_OF_SCAN:
            if data[offset] != 0xFF:
                return None
            marker = data[offset + 1]
            if marker in _WITHOUT_SIZE:
                offset += 1 if marker == 0xFF else 2
                continue
            end = offset + 2 + (data[offset + 2] << 8 | data[offset + 3])
            if marker in _FRAMES:
                check_size(
                    data[offset + 7] << 8 | data[offset + 8],
                    data[offset + 5] << 8 | data[offset + 6],
                    max_pixels,
                )
                header = JpegHeader(marker, data[offset + 4], data[offset + 9])
            elif marker == _APP1 and (
                data.startswith(b"Exif", offset + 4) or data.find(b"tiff:Orientation", offset, end) >= 0
            ):
                return None
            offset = end
    except IndexError:
        return None
    return header


def _readers(data: bytes, config: DecodeConfig, ranges: Ranges, name: str) -> list[Callable[[], Picture]]:
    """Return a function for each image of a file that the configuration takes; the function reads the image."""
    try:
        image = open_image(data, name)
    except UnknownFormatError:
        if not is_tiff(data):
            raise
        return _tiff_readers(data, config, ranges)
    if image.format == "TIFF" and not depth.read_by_pillow(image.tag_v2):  # type: ignore[attr-defined]
        return _tiff_readers(data, config, ranges)
    check_size(*image.size, config.max_pixels)
    pages, of_tifffile = _pages(image)
    taken = pages if config.frames == "all" else pages[:1]

    def read(number: int) -> Picture:
        page = pages[number]
        if page in of_tifffile:
            picture = _read_tiff(depth.tiff_pages(data)[page], config, ranges)
        else:
            if len(pages) > 1 or image.format == "TIFF":
                image.seek(page)
                check_size(*image.size, config.max_pixels)
            if image.format == "TIFF":
                tags = image.tag_v2  # type: ignore[attr-defined]
                _check_tile(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1))
            picture = _read(image, data, page, config, ranges)
        return _numbered(picture, number, len(pages), len(taken))

    return [partial(read, number) for number in range(len(taken))]


def _check_tile(width: int, height: int) -> None:
    """Raise DecodeError for tiles of a TIFF that take too much memory. A tile may be larger than its image."""
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"its tiles of {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are allowed: write it "
            "again with smaller tiles"
        )


def _numbered(picture: Picture, number: int, pages: int, taken: int) -> Picture:
    if pages == 1:
        return picture
    # Pillow's image object will hold the next page, so the pixels of this one are kept as an array.
    pixels_hwc = picture.pixels_hwc
    return picture._replace(
        rgb=pixels_hwc, orientation=1, ordinary=False, page=number + 1, left_out=pages - taken
    )


def _pages(image: Image.Image) -> tuple[list[int], set[int]]:
    """Return the numbers of the pages or frames that are images of their own, and those that Pillow does not read."""
    if image.format != "TIFF":
        count = 1 if image.format in _ONE_IMAGE else getattr(image, "n_frames", 1)
        return list(range(count)), set()
    pages, of_tifffile = list[int](), set[int]()
    for page in itertools.count():
        try:
            image.seek(page)
            known = True
        except EOFError:
            break
        except Exception:  # Errors of many kinds: the page is there, and Pillow does not know its type.
            if image.tell() != page:  # The list of pages itself is damaged.
                raise
            known = False
        tags = image.tag_v2  # type: ignore[attr-defined]
        # Pyramids hold smaller copies of a page, and some files masks.
        if not int(tags.get(_SUBFILE, 0)) & _REDUCED_OR_MASK:
            pages.append(page)
        if not known or not depth.read_by_pillow(tags):
            of_tifffile.add(page)
    return pages or [0], of_tifffile


def _read(image: Image.Image, data: bytes, page: int, config: DecodeConfig, ranges: Ranges) -> Picture:
    deep = depth.deep_values(image, data, page)
    image.load()
    orientation = _orientation(image)
    if deep is not None:
        return _scaled(deep, orientation, config, ranges)
    rgb, transparent = _flat(image, config.background)
    return Picture(
        rgb,
        orientation,
        ordinary=image.format in _STORED and not transparent,
        kind="transparent" if transparent else "",
    )


def _orientation(image: Image.Image) -> int:
    """Return how an image is to be turned, 1 to 8 as in EXIF."""
    # Formats whose decoder turns the image itself still state the orientation in EXIF. Most PNG files have none.
    if image.format == "JXL" or (image.format == "PNG" and not image.info.keys() & _ORIENTATION_KEYS):
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)  # type: ignore[no-any-return]
    except Exception:  # Errors of many kinds on damaged notes, beside which the pixels are whole.
        return 1


def _flat(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """Return an image of 8 bits as RGB in front of the background, and whether any of it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, False
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    least, most = rgba.getchannel("A").getextrema()
    if least == 255 or (most == 0 and image.format in _ALPHA_OFTEN_UNUSED):
        return rgba.convert("RGB"), False
    flat = Image.new("RGB", rgba.size, background)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat, True


def _scaled(deep: depth.Values, orientation: int, config: DecodeConfig, ranges: Ranges) -> Picture:
    found = depth.extremes(deep.values_hwc)
    full = None if deep.full is None else (0.0, float(deep.full))
    # Some TIFF files of 8 bits are read by tifffile alone; they have nothing to be scaled.
    kind = "" if deep.kind == "uint8" else deep.kind
    scale = (config.range or full or ranges.get(kind)) if kind else full
    levels_hwc = depth.scaled(deep.values_hwc, *(scale or found))
    pixels_hwc = np.broadcast_to(levels_hwc, (*levels_hwc.shape[:2], 3))
    if deep.alpha_hw is not None:
        flat = Image.new("RGB", deep.alpha_hw.shape[::-1], config.background)
        mask = Image.fromarray(np.ascontiguousarray(deep.alpha_hw))
        flat.paste(Image.fromarray(np.ascontiguousarray(pixels_hwc)), mask=mask)
        pixels_hwc = np.asarray(flat)
    return Picture(pixels_hwc, orientation, kind=kind, found=found, scale=scale)


def _tiff_readers(data: bytes, config: DecodeConfig, ranges: Ranges) -> list[Callable[[], Picture]]:
    """Return the functions of `_readers` for a TIFF file that Pillow does not read."""
    # The list of pages of a damaged file may lead back to a page; Pillow ends there too.
    by_offset: dict[int, Any] = {}
    for page in depth.tiff_pages(data):
        if by_offset.setdefault(page.offset, page) is not page:
            break
    pages = [page for page in by_offset.values() if not page.subfiletype & _REDUCED_OR_MASK]
    taken = pages if config.frames == "all" else pages[:1]

    def read(number: int) -> Picture:
        return _numbered(_read_tiff(pages[number], config, ranges), number, len(pages), len(taken))

    return [partial(read, number) for number in range(len(taken))]


def _read_tiff(page: Any, config: DecodeConfig, ranges: Ranges) -> Picture:
    check_size(page.imagewidth, page.imagelength, config.max_pixels)
    _check_tile(page.tilewidth, page.tilelength)
    if page.nbytes > 4 * config.max_pixels:  # Pillow takes no more than four bytes for a pixel.
        raise DecodeError(f"its {page.nbytes:,} bytes of values are more than {4 * config.max_pixels:,}")
    tag = page.tags.get(_ORIENTATION)
    return _scaled(depth.tiff_values(page), int(tag.value) if tag else 1, config, ranges)


def upright(pixels_hwc: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn an image as the orientation of EXIF (1 to 8) says; a copy that owns its memory.

    Returns:
        uint8 (h, w, c), contiguous.
    """
    if orientation in (5, 6, 7, 8):
        pixels_hwc = pixels_hwc.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_hwc = pixels_hwc[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_hwc = pixels_hwc[:, ::-1]
    return np.array(pixels_hwc, order="C")
