"""Tell what a file is by its content, and open it with Pillow or with the optional package that reads its format.

The packages are those of the extra `images`. The error for a file that none of them reads names its format, and the
package or the step that helps.
"""

from __future__ import annotations

import gzip
import importlib
import io
import re
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

# The ends of the file names of images, for sources that hold other files too.
EXTENSIONS = tuple(
    f".{end}"
    for end in (
        "jpg jpeg jpe jfif png apng bmp dib gif webp tif tiff ppm pgm pbm pnm pfm tga avif heic heif jp2 j2k jxl ico "
        "svg svgz psd psb dng cr2 cr3 nef arw orf rw2 raf pef srw"
    ).split()
)
# The limit of Pillow: 512 MB as RGB.
MAX_PIXELS = 178_956_970
JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RAW = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
# The star is possessive ("*+"): with it, a long row of comments without a drawing behind it takes no exponential time.
_SVG = re.compile(
    rb"\A(?:\xef\xbb\xbf)?(?:\s|<\?.*?\?>|<!--.*?-->|<!DOCTYPE[^>\[]*(?:\[.*?\])?\s*>)*+<(?:\w+:)?svg[\s>]",
    re.DOTALL,
)
_HTML = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)", re.IGNORECASE)
_TEXT = re.compile(rb"[\t\n\r -~]+")
_DAMAGED = {PNG: "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
# Bytes in which the beginning of an image is looked for that some program has put behind others.
_BEFORE = 64
# An SVG drawing has no pixels of its own: its longer side becomes this many.
_SVG_SIDE = 1024
# Place of the color type in a PNG file, behind the bit depth.
_PNG_COLOR = 25
# Tags of TIFF (Adobe, TIFF 6.0 and DNG 1.7).
_SUBFILE, _PHOTOMETRIC, _SUB_IFDS, _DNG_VERSION = 254, 262, 330, 50706
_SENSOR_MOSAIC = (32803, 34892)

_HDR = "a Radiance HDR image: convert it to float TIFF first, for example with the package imageio"
_REFUSED = (
    (b"version https://git-lfs", "a Git LFS pointer and not the image itself: run `git lfs pull`"),
    (b"%PDF", "a PDF document: draw its pages as PNG first, for example with pdftoppm"),
    (b"%!PS", "PostScript: draw it as PNG first, for example with Ghostscript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript: draw it as PNG first, for example with Ghostscript"),
    (b"v/1\x01", "an OpenEXR image: convert it to float TIFF first, for example with the package OpenEXR"),
    (b"#?RADIANCE", _HDR),
    (b"#?RGBE", _HDR),
    (b"PF\n", "a color PFM image: convert it to float TIFF first, for example with the package imageio"),
    (b"P7\n", "a PAM image: convert it to PNG first"),
    (b"gimp xcf", "a GIMP drawing: export it as PNG"),
    (b"\x93NUMPY", "a NumPy array: save it as PNG or TIFF first, for example with the package tifffile"),
    (b"\x89HDF", "an HDF5 file: write its images as files first, for example with the package h5py"),
    (b"\x1aE\xdf\xa3", "a video: put it into a folder of videos, which `raysl ingest` reads"),
    (b"PK\x03\x04", "a ZIP archive: unpack it"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"<?xml", "an XML document, such as the error of a web server: download the image again"),
    (JPEG, "a JPEG file of 12 bits, without loss, or damaged: convert it to PNG first"),
)


class DecodeError(Exception):
    """The bytes are not an image that can be read. The message completes the sentence "The file ..."."""


class UnknownFormatError(DecodeError):
    """No reader here knows the format of the file."""


def open_image(data: bytes, name: str = "") -> Image.Image:
    """Open an image file without decoding its pixels, where its format allows that.

    Args:
        data: the whole file.
        name: its name, which tells camera raw files from TIFF where the content does not.

    Raises:
        DecodeError: the format is not supported; the message names it and what helps.
    """
    if not data:
        raise DecodeError("is empty")
    if data[:8] != PNG and data[:3] != JPEG:
        if _is_heif(data):
            package("pillow_heif", "pillow-heif", "a HEIC photo").register_heif_opener(thumbnails=False)
        elif data.startswith(_JXL):
            package("pillow_jxl", "pillow-jxl-plugin", "a JPEG XL image")
        elif _is_raw(data, name):
            return _open_raw(data)
        elif (drawing := _svg(data)) is not None:
            return _open_svg(drawing)
    try:
        image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, NotImplementedError) as error:
        if data.startswith((b"8BPS\0\1", b"8BPS\0\2")):
            return _open_psd(data)
        raise UnknownFormatError(describe(data)) from error
    if data.startswith(PNG) and data[_PNG_COLOR] == 0 and "transparency" in image.info:
        # Pillow scales gray of 2 and 4 bits to 8, and not the key of its transparent level.
        image.info["transparency"] *= {2: 85, 4: 17}.get(data[_PNG_COLOR - 1], 1)
    if image.format in ("EPS", "WMF"):
        # Pillow would start another program to draw these.
        raise DecodeError(f"is a drawing in the format {image.format}: draw it as PNG first")
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise DecodeError when an image has no pixels, or more than allowed."""
    if width < 1 or height < 1:
        raise DecodeError(
            f"has no pixels: its header says {width:,} x {height:,}, so download or copy it again"
        )
    if width * height > max_pixels:
        raise DecodeError(
            f"{width:,} x {height:,} pixels are more than the {max_pixels:,} that are allowed: shrink it or cut it up"
        )


def is_tiff(data: bytes) -> bool:
    return data.startswith(_TIFF)


def looks_like_image(head: bytes) -> bool:
    """Return whether a file that begins with `head` (some kilobytes) is an image, if its name does not tell."""
    if head.startswith((JPEG, PNG, b"GIF8", b"8BPS", *_TIFF, *_RAW, *_JXL)) or _is_heif(head) or _svg(head):
        return True
    try:
        with Image.open(io.BytesIO(head)) as image:
            return image.format not in ("TGA", "EPS", "WMF")  # TGA has no signature: other files pass for it
    except Exception:  # Pillow's plugins raise many kinds of errors on foreign bytes.
        return False


def describe(data: bytes) -> str:
    """Say what an unreadable file is, from its content or its first kilobyte."""
    for magic, what in _REFUSED:
        if data.startswith(magic):
            return f"is {what}"
    if data.startswith((b"\x89PNG\n", b"\x89PNG\r\r", b"PNG\r\n")):
        return "is a PNG image that was copied as text: copy it again as binary"
    if named := next((name for magic, name in _DAMAGED.items() if data.startswith(magic)), ""):
        return f"is a damaged {named} image: download or copy it again"
    if _HTML.match(data[:1024]):
        return "is a web page and not an image: download the image again"
    if _is_heif(data) or b"avif" in data[8:32]:
        return "is a damaged HEIC or AVIF photo: download or copy it again"
    if data[4:8] == b"ftyp" or (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
        return "is a video: put it into a folder of videos, which `raysl ingest` reads"
    if data[128:132] == b"DICM":
        return "is a DICOM image: write its pixels as TIFF first, for example with the package pydicom"
    if not any(data):
        return "is no image of a known format: every byte is zero"
    if _TEXT.fullmatch(data[:64]):
        return (
            f"is a text and not an image: it begins with {data[:24].decode()!r}, so download the image again"
        )
    for magic, name in ((JPEG, "JPEG"), (PNG, "PNG")):
        if (before := data.find(magic, 0, _BEFORE)) > 0:
            return f"is a {name} image behind other bytes: it begins at byte {before + 1}, so download or copy it again"
    return "is no image of a known format"


def package(module: str, distribution: str, what: str) -> ModuleType:
    """Import an optional package that reads a format.

    Raises:
        DecodeError: it is not installed; the message says what the file is and names the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DecodeError(
            f"is {what}: install the package {distribution} (or raysl's extra 'images') on every machine to read it"
        ) from None


def needed_package(message: str) -> str:
    """Return the package that an error of `package` names; "" for the message of another error."""
    named = re.search(r"install the package (\S+) \(or raysl's extra", message)
    return named[1] if named else ""


def _is_heif(data: bytes) -> bool:
    """Return whether a file is HEIF with HEVC inside. Pillow reads AVIF, which has the same container."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return b"avif" not in brands and b"avis" not in brands and any(brand in brands for brand in _HEIF_BRANDS)


def _is_raw(data: bytes, name: str) -> bool:
    """Return True for the raw data of a camera's sensor, which are often TIFF with a small preview."""
    if data.startswith(_RAW) or data[4:12] == b"ftypcrx ":
        return True
    if not is_tiff(data):
        return False
    tags = tiff_tags(data)
    preview_first = int(tags.get(_SUBFILE, 0)) & 1 and _SUB_IFDS in tags
    return bool(
        data[8:10] == b"CR"
        or _DNG_VERSION in tags
        or tags.get(_PHOTOMETRIC) in _SENSOR_MOSAIC
        or preview_first
        or name.lower().endswith((".nef", ".arw", ".pef", ".srw", ".dng", ".cr2", ".orf", ".rw2"))
    )


def tiff_tags(data: bytes) -> dict[int, Any]:
    """Return the tags of the first page of a TIFF file; none when they are damaged."""
    try:
        stream = io.BytesIO(data)
        head = stream.read(8)
        big = 43 in head[2:4]
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + stream.read(8) if big else head)
        stream.seek(tags.next)
        tags.load(stream)
        return dict(tags)
    except Exception:  # Damage of any kind: the decoder says more about it.
        return {}


def _open_raw(data: bytes) -> Image.Image:
    rawpy = package("rawpy", "rawpy", "the raw data of a camera's sensor")
    with rawpy.imread(io.BytesIO(data)) as raw:
        check_size(raw.sizes.width, raw.sizes.height, MAX_PIXELS)
        return Image.fromarray(np.asarray(raw.postprocess(use_camera_wb=True)))


def _svg(data: bytes) -> bytes | None:
    """Return the text of an SVG drawing; None if the file is something else."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(1 << 24)
        except (OSError, EOFError):
            return None
    return data if _SVG.match(data[:65536]) else None


def _open_svg(drawing: bytes) -> Image.Image:
    resvg = package("resvg_py", "resvg-py", "an SVG drawing")
    # With both sides given, the drawing is fitted into the square and keeps its proportions.
    png = resvg.svg_to_bytes(svg_string=drawing.decode(), width=_SVG_SIDE, height=_SVG_SIDE)
    return Image.open(io.BytesIO(bytes(png)))


def _open_psd(data: bytes) -> Image.Image:
    psd_tools = package("psd_tools", "psd-tools", "a Photoshop file that Pillow cannot read")
    check_size(int.from_bytes(data[18:22]), int.from_bytes(data[14:18]), MAX_PIXELS)
    image = psd_tools.PSDImage.open(io.BytesIO(data)).topil()
    if image is None:
        raise DecodeError(
            "is a Photoshop file without a flattened picture: save it with maximized compatibility"
        )
    return image  # type: ignore[no-any-return]
