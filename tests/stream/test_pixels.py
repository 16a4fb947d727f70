"""What becomes of each kind of image file: the rows of the table "Images" in docs/data.md, pixel by pixel."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from raysl.errors import UserError
from raysl.stream.formats import PNG, DecodeError, looks_like_image
from raysl.stream.pixels import DecodeConfig, Picture, pictures
from tests.data import TURNS

Array = NDArray[Any]


def ramp(height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """An image without symmetry: red grows to the right, green downward, blue fills the top left."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    image[: height // 3, : width // 4, 2] = 255
    return image


GRAY = ramp()[..., 0]


def file(image: Array | Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, file_format, **options)
    return stream.getvalue()


def png16(samples_hwc: Array, color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 16 bits, which Pillow does not write in color."""
    height, width = samples_hwc.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_hwc)
    return png(struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0), rows, *chunks)


def png(head: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pgm(values_hw: Array, largest: int) -> bytes:
    height, width = values_hw.shape
    return f"P5 {width} {height} {largest}\n".encode() + values_hw.astype(">u2").tobytes()


def one(data: bytes, config: DecodeConfig | None = None, **options: Any) -> Picture:
    found = list(pictures(data, config or DecodeConfig(), **options))
    assert len(found) == 1
    assert isinstance(found[0], Picture), found[0]
    return found[0]


def reason(data: bytes, config: DecodeConfig | None = None) -> str:
    found = list(pictures(data, config or DecodeConfig()))
    assert len(found) == 1
    assert isinstance(found[0], DecodeError)
    return str(found[0])


def off(picture: Picture, expected_hwc: Array) -> int:
    """The largest difference, in levels of 255; gray is compared with each channel."""
    expected = np.broadcast_to(np.atleast_3d(expected_hwc), picture.pixels_hwc.shape)
    return int(np.abs(picture.pixels_hwc.astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize(
    ("data", "expected", "stored"),
    [
        (file(ramp(), "PNG"), ramp(), True),
        (file(ramp(), "WEBP", lossless=True), ramp(), True),
        (file(GRAY, "PNG"), GRAY, True),
        (file(Image.fromarray(GRAY > 99), "PNG"), (GRAY > 99) * 255, True),
        (file(ramp(), "BMP"), ramp(), False),
        (file(ramp(), "TIFF", compression="tiff_lzw"), ramp(), False),
        (file(ramp(), "PPM"), ramp(), False),
        (b"P1 3 2 0 1 0 1 1 0", [[255, 0, 255], [0, 0, 255]], False),
        (b"P2 2 2 300 0 300 150 60", [[0, 255], [128, 51]], False),
        (file(ramp(), "TGA"), ramp(), False),
        (file(ramp(), "JPEG2000", irreversible=False), ramp(), False),
    ],
)
def test_ordinary_files_are_stored_as_they_are_and_others_as_equal_pixels(
    data: bytes, expected: Array, stored: bool
) -> None:
    assert off(one(data), expected) == 0
    assert one(data).ordinary is stored


def test_color_spaces_become_rgb() -> None:
    cmyk = Image.fromarray(ramp()).convert("CMYK")
    assert off(one(file(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB"))) == 0
    photo = file(Image.fromarray(ramp(96, 128)).convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(photo)) as opened:
        assert off(one(photo), np.asarray(opened.convert("RGB"))) <= 2
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(Image.fromarray(ramp()), to_lab)
    assert lab is not None
    assert np.abs(one(file(lab, "TIFF")).pixels_hwc.astype(int) - ramp()).mean() < 6


def shape_in_alpha(levels: int = 255) -> NDArray[np.uint8]:
    """A square that shows in the alpha channel alone, with noise hidden around it."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4)).astype(np.uint8)
    noise[..., 3] = 0
    noise[8:24, 8:24] = (0, 0, 0, levels)
    return noise


@pytest.mark.parametrize(
    "data",
    [
        file(shape_in_alpha(), "PNG"),
        file(shape_in_alpha(), "WEBP", lossless=True, exact=True),
        file(shape_in_alpha(), "TIFF"),
        file(shape_in_alpha(), "TGA"),
        file(Image.fromarray(shape_in_alpha()).convert("LA"), "PNG"),
        file(Image.fromarray(shape_in_alpha()), "GIF"),
        png16(shape_in_alpha().astype(np.uint16) * 257, 6),
        png16(shape_in_alpha()[..., 2:].astype(np.uint16) * 257, 4),
    ],
    ids=["PNG", "WebP", "TIFF", "TGA", "LA", "GIF", "RGBA16", "LA16"],
)
@pytest.mark.parametrize(("background", "rgb"), [("white", 255), ("#0a8010", (10, 128, 16))])
def test_transparent_parts_show_the_background(data: bytes, background: str, rgb: Any) -> None:
    expected = np.full((32, 32, 3), rgb, np.uint8)
    expected[8:24, 8:24] = 0
    picture = one(data, DecodeConfig(background=background))
    assert off(picture, expected) == 0
    assert not picture.ordinary


def test_half_transparent_colors_are_mixed() -> None:
    assert one(file(shape_in_alpha(102), "PNG")).pixels_hwc[16, 16].tolist() == [153] * 3


def test_transparent_colors_of_palettes_and_keys() -> None:
    palette = Image.fromarray(ramp()).quantize(16)
    expected = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert off(one(file(palette, "PNG", transparency=3)), expected) == 0
    gray16 = GRAY.astype(np.uint16) * 257
    assert off(one(png16(gray16, 0, (b"tRNS", struct.pack(">H", 0)))), np.where(GRAY == 0, 255, GRAY)) == 0
    rgb16 = ramp().astype(np.uint16) * 257
    key = struct.pack(">HHH", *rgb16[0, 0])
    expected = np.where((ramp() == ramp()[0, 0]).all(2)[..., None], 255, ramp())
    assert off(one(png16(rgb16, 2, (b"tRNS", key))), expected) == 0
    # Pillow takes the key of gray of 2 and 4 bits for a level of 255.
    for bits, row, levels in (
        (1, b"\x0f", [0] * 4 + [255] * 4),
        (2, b"\x1b", [0, 85, 170, 255]),
        (4, b"\x15", [17, 85]),
    ):
        key_level = 1 if bits > 1 else 0
        head = struct.pack(">IIBBBBB", len(levels), 1, bits, 0, 0, 0, 0)
        keyed = one(png(head, b"\0" + row, (b"tRNS", struct.pack(">H", key_level))))
        scale = 255 // ((1 << bits) - 1)
        assert keyed.pixels_hwc[0, :, 0].tolist() == [
            255 if level == key_level * scale else level for level in levels
        ]


def test_an_alpha_channel_that_a_program_left_at_zero_is_ignored() -> None:
    unused = np.dstack([ramp(), np.zeros((24, 32), np.uint8)])
    assert off(one(file(unused, "TGA")), ramp()) == 0


LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


@pytest.mark.parametrize("file_format", LOSSLESS)
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_of_exif(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = file(ramp(), file_format, exif=exif, **LOSSLESS[file_format])
    assert off(one(data), np.asarray(Image.fromarray(ramp()).transpose(TURNS[orientation]))) == 0


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


@pytest.mark.parametrize("note", [EXIF, XMP], ids=["EXIF", "XMP"])
def test_orientation_far_behind_the_start_of_a_jpeg(note: bytes) -> None:
    plain = file(ramp(48, 64), "JPEG", quality=95)
    profile = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 2]) + bytes(60000)) for i in (1, 2))
    turned = one(plain[:2] + profile + segment(0xE1, note) + plain[2:])
    assert off(turned, np.rot90(one(plain).pixels_hwc, -1)) <= 3


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_an_image_with_damaged_notes_is_read(file_format: str) -> None:
    data = file(ramp(), file_format, exif=b"Exif\0\0damaged", **LOSSLESS[file_format])
    assert off(one(data), ramp()) == 0


def test_a_deep_image_is_turned_too() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert off(one(file(GRAY.astype(np.uint16) * 257, "PNG", exif=exif)), np.rot90(GRAY, -1)) == 0


@pytest.mark.parametrize(
    "data",
    [
        file(GRAY.astype(np.uint16) * 257, "PNG"),
        file(GRAY.astype(np.uint16) * 257, "TIFF"),
        file(GRAY.astype(np.uint16) * 257, "TIFF", compression="tiff_deflate"),
        pgm(GRAY.astype(np.uint16) * 257, 65535),
        pgm(GRAY.astype(np.uint16) * 4, 1020),
        png16(np.dstack([GRAY] * 3).astype(np.uint16) * 257, 2),
    ],
    ids=["PNG", "TIFF", "deflate", "PGM", "PGM of 10 bits", "RGB16"],
)
def test_unsigned_values_use_the_full_range_of_their_type(data: bytes) -> None:
    picture = one(data)
    assert off(picture, GRAY) == 0
    assert picture.kind == "uint16"
    assert not picture.ordinary


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_white_in_jpeg_2000_of_more_than_8_bits_stays_white(bits: int) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.rint(ramp() / 255 * ((1 << bits) - 1)).astype(np.uint16)
    data = imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits)
    assert off(one(data), ramp()) <= 1


def test_bands_of_a_sensor_are_refused() -> None:
    tifffile = pytest.importorskip("tifffile")
    for bands, kind in ((2, np.uint8), (13, np.uint16), (4, np.float32)):
        stream = io.BytesIO()
        tifffile.imwrite(
            stream, np.zeros((8, 8, bands), kind), photometric="minisblack", planarconfig="contig"
        )
        assert f"a TIFF page of {bands} bands" in reason(stream.getvalue())


def test_a_dim_frame_stays_dim() -> None:
    dim, dimmer = (one(file(np.full((4, 4), value, np.uint16), "PNG")) for value in (2570, 514))
    assert (dim.pixels_hwc.max(), dimmer.pixels_hwc.max()) == (10, 2)


def test_a_given_range_serves_all_bits_of_deep_color() -> None:
    twelve_bits = ramp().astype(np.uint16) * 16
    config = DecodeConfig(range=(0, 255 * 16))
    assert off(one(png16(twelve_bits, 2), config), ramp()) == 0
    for data in (file(twelve_bits[..., 0], "PNG"), pgm(twelve_bits[..., 0], 65535)):
        assert off(one(data, config), GRAY) == 0


def test_white_is_zero_is_turned_over() -> None:
    inverted = file(65535 - GRAY.astype(np.uint16) * 257, "TIFF", tiffinfo={262: 0})
    with Image.open(io.BytesIO(inverted)) as opened:
        if opened.tag_v2[262] != 0:  # type: ignore[attr-defined]
            pytest.skip("this Pillow writes no such file")
    assert off(one(inverted), GRAY) == 0


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(-1, 1, 768, dtype=np.float32), "float"),
        (np.linspace(0, 1_000_000, 768).astype(np.int32), "int32"),
        (np.linspace(-2e9, 2e9, 768).astype(np.int32), "int32"),
    ],
)
def test_signed_and_float_values_use_the_range_of_the_data_set(values: Array, kind: str) -> None:
    data = file(values.reshape(24, 32), "TIFF")
    low, high = float(values.min()), float(values.max())
    alone = one(data)
    assert (alone.kind, alone.found, alone.scale) == (kind, (low, high), None)
    wide = one(data, ranges={kind: (low, 2 * high - low)})
    expected = np.rint((values.reshape(24, 32).astype(float) - low) / (high - low) * 127.5)
    assert off(wide, expected) <= 1


def test_signed_bytes_and_swapped_bytes_in_tiff() -> None:
    tifffile = pytest.importorskip("tifffile")
    for kind in ("i1", "i2", ">i2", ">i4", ">f4", "f8", ">u2"):
        values = np.linspace(-100, 100, 768).astype(kind).reshape(24, 32)
        values = values + np.array(100, kind) if kind == ">u2" else values
        for compression in (None, "zlib"):
            stream = io.BytesIO()
            order = ">" if kind[0] == ">" else "<"
            tifffile.imwrite(
                stream, values, byteorder=order, compression=compression, photometric="minisblack"
            )
            picture = one(stream.getvalue(), DecodeConfig(range=(float(values.min()), float(values.max()))))
            levels = (values.astype(float) - values.min()) / (float(values.max()) - float(values.min())) * 255
            assert off(picture, np.rint(levels)) <= 1


def test_nan_and_absent_values_become_low() -> None:
    values = np.linspace(0, 1, 768, dtype=np.float32).reshape(24, 32).copy()
    values[0, 0], values[0, 1], values[0, 2], values[0, 3] = np.nan, np.inf, -np.inf, -9999
    picture = one(file(values, "TIFF", tiffinfo={42113: "-9999"}))
    assert picture.found == (float(values[0, 4]), 1.0)
    assert picture.pixels_hwc[0, :4, 0].tolist() == [0, 255, 0, 0]


def flat(k: int) -> NDArray[np.uint8]:
    return np.full((8, 8, 3), (50 * k, 90, 255 - 50 * k), np.uint8)


@pytest.mark.parametrize(
    ("file_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_the_first_page_or_frame_or_all_of_them(file_format: str, options: dict[str, Any]) -> None:
    frames = [Image.fromarray(flat(k)) for k in range(4)]
    data = file(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    first = one(data)
    assert off(first, flat(0)) == 0
    assert (first.left_out, first.ordinary) == (3, False)
    every = list(pictures(data, DecodeConfig(frames="all")))
    assert [picture.page for picture in every if isinstance(picture, Picture)] == [1, 2, 3, 4]
    assert [off(picture, flat(k)) for k, picture in enumerate(every) if isinstance(picture, Picture)] == [
        0
    ] * 4


def test_smaller_copies_in_a_pyramid_are_no_images() -> None:
    smaller = Image.fromarray(ramp()).resize((16, 12))
    smaller.encoderinfo = {"tiffinfo": {254: 1}}
    data = file(ramp(), "TIFF", save_all=True, append_images=[smaller])
    assert off(one(data, DecodeConfig(frames="all")), ramp()) == 0


def test_the_preview_inside_a_photo_is_no_image() -> None:
    photo, preview = Image.fromarray(ramp(48, 64)), Image.fromarray(ramp(24, 32))
    data = file(photo, "MPO", save_all=True, append_images=[preview], quality=95)
    picture = one(data, DecodeConfig(frames="all"))
    assert picture.pixels_hwc.shape == (48, 64, 3)
    assert picture.ordinary


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_one_limit_of_pixels_for_every_format(file_format: str) -> None:
    data = file(ramp(30, 40), file_format)
    assert one(data, DecodeConfig(max_pixels=1200)).pixels_hwc.shape == (30, 40, 3)
    assert "40 x 30 pixels are more than the 1,199" in reason(data, DecodeConfig(max_pixels=1199))


def test_a_size_that_a_header_only_claims_is_refused_before_memory_is_taken() -> None:
    data = bytearray(file(ramp(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert "65,535 x 65,535" in reason(bytes(data))
    assert "pixels" in reason(file(Image.new("1", (20000, 20000)), "PNG"))


def tiff(*pages: tuple[Array, dict[str, Any]]) -> bytes:
    """A TIFF file with pages that Pillow does not write: each an array and options of tifffile."""
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for values, options in pages:
            writer.write(values, **options)
    return stream.getvalue()


RGB = {"photometric": "rgb"}
PLANES = {"photometric": "rgb", "planarconfig": "separate"}


def test_each_page_is_read_by_the_package_that_knows_its_type() -> None:
    deep, floats = ramp().astype(np.uint16) * 257, ramp().astype(np.float32)
    data = tiff((ramp(), RGB), (floats, RGB), (deep.transpose(2, 0, 1), PLANES), (ramp()[::-1], RGB))
    first = one(data)
    assert (off(first, ramp()), first.left_out) == (0, 3)
    every = pictures(data, DecodeConfig(frames="all", range=(0, 255 * 257)))
    pages = [page for page in every if isinstance(page, Picture)]
    assert [(page.page, page.kind) for page in pages] == [(1, ""), (2, "float"), (3, "uint16"), (4, "")]
    expected = [(pages[0], ramp()), (pages[2], ramp()), (pages[3], ramp()[::-1])]
    assert [off(page, pixels_hwc) for page, pixels_hwc in expected] == [0, 0, 0]


def test_a_list_of_pages_that_leads_in_a_circle_ends() -> None:
    data = bytearray(tiff((ramp().astype(np.float32), RGB)))
    (tags_at,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, tags_at)
    struct.pack_into("<I", data, tags_at + 2 + 12 * tags, tags_at)
    assert one(bytes(data), DecodeConfig(range=(0, 255))).left_out == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_colors_that_were_multiplied_by_alpha_are_mixed_once(kind: Any) -> None:
    opaque = 1 if kind is np.float32 else np.iinfo(kind).max
    half = np.array([0.4, 0.2, 0, 0.4]) * opaque  # (1, 0.5, 0), of which four tenths are seen
    values_chw = np.broadcast_to(half.astype(kind)[:, None, None], (4, 8, 8))
    picture = one(
        tiff((values_chw, PLANES | {"extrasamples": ["assocalpha"]})), DecodeConfig(range=(0, opaque))
    )
    assert off(picture, np.full((8, 8, 3), (255, 204, 153))) <= 1


@pytest.mark.parametrize("tag", [256, 257], ids=["width", "height"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_header_without_pixels_is_damage(tag: int, kind: Any) -> None:
    data = tiff((ramp().astype(kind), RGB))
    assert "has no pixels: its header says " in reason(with_tag(data, tag, 0))


def with_tag(data: bytes, tag: int, value: int) -> bytes:
    """Return a TIFF file with another number, of 32 bits, in a tag of its first page."""
    changed = bytearray(data)
    (tags_at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, tags_at)
    entries = (tags_at + 2 + 12 * i for i in range(count))
    entry = next(at for at in entries if struct.unpack_from("<H", data, at) == (tag,))
    struct.pack_into("<HII", changed, entry + 2, 4, 1, value)
    return bytes(changed)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_tile_that_is_too_large_is_refused_before_memory_is_taken(kind: Any) -> None:
    data = tiff((ramp().astype(kind), RGB | {"tile": (16, 16), "compression": "deflate"}))
    assert "its tiles of 16 x 16,777,216 pixels are more than" in reason(with_tag(data, 323, 1 << 24))


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_tile_may_have_more_pixels_than_are_allowed_in_an_image(kind: Any) -> None:
    pixels_hwc = ramp(32, 32)
    data = tiff((pixels_hwc.astype(kind), RGB | {"tile": (256, 256), "compression": "deflate"}))
    config = DecodeConfig(max_pixels=10_000, range=(0, 255))
    assert off(one(data, config), pixels_hwc) <= 1


@pytest.mark.parametrize("line", [b"<!-- license -->\n", b"<?license?>\n", b" \n"])
def test_a_long_head_of_xml_takes_no_time_and_hides_no_drawing(line: bytes) -> None:
    # With a slow expression, each line doubles the time: 22 take seconds.
    assert not looks_like_image(22 * line + b"<!ELEMENT a (b)>")
    assert looks_like_image(22 * line + b"<svg xmlns='http://www.w3.org/2000/svg'/>")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (file(ramp(), "WEBP")[:-10], "is damaged: its WebP data are cut off"),
        (b"\n\n" + file(ramp(), "JPEG"), "is a JPEG image behind other bytes: it begins at byte 3"),
        (bytes(100), "every byte is zero"),
        (b"not an image", "is a text and not an image: it begins with 'not an image'"),
        (b"\0not an image", "is no image of a known format"),
        (PNG + b"x", "is a damaged PNG image"),
        (PNG.replace(b"\r\n", b"\n"), "copied as text"),
        (file(ramp(100, 100), "JPEG")[:900], "is damaged: image file is truncated"),
        (file(ramp(), "PNG")[:100], "damaged"),
        (b"<!DOCTYPE html><html>403 Forbidden</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04....", "ZIP"),
        (b"\0\0\0\x18ftypmp42....", "video"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"PF\n1 1\n-1.0\n" + bytes(12), "color PFM"),
        (b"P7\nWIDTH 1\nHEIGHT 1\n", "PAM"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, says: str) -> None:
    assert says in reason(data)


HEADS = {
    "pillow_heif": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "pillow_jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    "rawpy": (b"FUJIFILMCCD-RAW 0201", "camera"),
    "resvg_py": (b"<?xml version='1.0'?><!-- drawing --><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "psd_tools": (b"8BPS\0\2" + bytes(6) + b"\0\3\0\0\0\4\0\0\0\4\0\x10\0\3", "Photoshop"),
}


@pytest.mark.parametrize("module", HEADS)
def test_a_format_that_needs_a_package_is_named_with_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    data, what = HEADS[module]
    assert what in reason(data)
    assert f"install the package {module.replace('_', '-').replace('jxl', 'jxl-plugin')}" in reason(data)


@pytest.mark.parametrize(
    ("module", "file_format", "tolerance"), [("pillow_heif", "HEIF", 40), ("pillow_jxl", "JXL", 0)]
)
def test_photos_that_packages_read(module: str, file_format: str, tolerance: int) -> None:
    pytest.importorskip(module).__dict__.get("register_heif_opener", lambda: None)()
    lossless = {"lossless": True} if file_format == "JXL" else {"quality": 95}
    picture = one(file(ramp(), file_format, **lossless))
    assert off(picture, ramp()) <= tolerance
    assert not picture.ordinary


def test_a_drawing_in_svg() -> None:
    pytest.importorskip("resvg_py")
    drawing = (
        b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='20'><rect width='20' height='20'/></svg>"
    )
    pixels = one(drawing).pixels_hwc
    assert pixels.shape == (512, 1024, 3)
    assert (pixels[256, 256].tolist(), pixels[256, 768].tolist()) == ([0, 0, 0], [255, 255, 255])


def test_the_raw_data_of_a_sensor_is_not_taken_for_its_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rawpy", None)
    dng = file(Image.fromarray(ramp()), "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    assert "raw data of a camera" in reason(dng)
    nef = list(pictures(file(ramp(), "TIFF"), DecodeConfig(), name="a/b.NEF"))
    assert "raw data of a camera" in str(nef[0])


@pytest.mark.parametrize(
    "options",
    [
        {"background": "pink"},
        {"range": (1.0, 1.0)},
        {"range": (0.0, float("nan"))},
        {"frames": "last"},
        {"max_pixels": 0},
        {"max_pixels": 10**9},
    ],
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')} "):
        DecodeConfig(**options)
