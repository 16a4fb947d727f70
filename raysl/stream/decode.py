"""Turn encoded images and clips into square crops: decode each image once, then cut and resize every crop of it.

Resizing is bilinear with antialiasing, as in Pillow: a triangle as wide as the reduction, clipped at the box. The
pixels of a crop depend on its image and box alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from raysl.augment import SourceCrop
from raysl.dataset.clips import Clips
from raysl.pretext import Chosen
from raysl.rng import ImageRng
from raysl.stream.formats import DecodeError as DecodeError
from raysl.stream.pixels import DecodeConfig, pictures
from raysl.stream.views import View

_DEFAULT = DecodeConfig()
# The evaluation view of an image that is longer than this many times its shorter side shows only the middle.
_LONGEST = 16


def decode(data: bytes, config: DecodeConfig = _DEFAULT) -> Tensor:
    """Decode an image file, as `raysl.stream.pixels` describes for each kind.

    Args:
        data: the whole file; only the first page or frame is decoded.
        config: treatment of unusual kinds.

    Returns:
        uint8 (3, h, w), RGB, with the channels last in memory.

    Raises:
        DecodeError: the bytes are not an image, the image is damaged or too large, or its values need a range.
    """
    picture = next(pictures(data, config))
    if isinstance(picture, DecodeError):
        raise picture
    if picture.kind and picture.kind != "transparent" and picture.scale is None:
        raise DecodeError(f"its {picture.kind} values need a range, as `raysl ingest` finds or is given")
    return torch.from_numpy(picture.pixels_hwc).permute(2, 0, 1)


def cut(images: Sequence[bytes], crops: Mapping[str, SourceCrop], image_rng: ImageRng) -> dict[str, Tensor]:
    """Decode each image once and cut every named crop out of it, as `cut_decoded`.

    Args:
        images: encoded files, of any sizes.
        crops: by the name of the view.
        image_rng: random numbers of the b images.

    Raises:
        DecodeError: an image is damaged.
    """
    return cut_decoded([decode(data) for data in images], crops, image_rng)


def cut_decoded(
    decoded: Sequence[Tensor], crops: Mapping[str, SourceCrop], image_rng: ImageRng
) -> dict[str, Tensor]:
    """Cut every named crop out of decoded images.

    Args:
        decoded: uint8 (3, h, w) of any sizes, on one device.
        crops: by the name of the view; the boxes of a view come from `image_rng.named(rng_name(name))`.
        image_rng: random numbers of the b images.

    Returns:
        uint8 (b, 3, size, size) for each name, on the device of the images.
    """
    sizes_b2 = np.array([image.shape[1:] for image in decoded], dtype=np.int64).reshape(-1, 2)
    # Variants of a view may start from the same crop.
    done: dict[tuple[str, SourceCrop], Tensor] = {}
    for name, crop in crops.items():
        if (rng_name(name), crop) in done:
            continue
        boxes_b4 = crop.boxes(sizes_b2[:, 0], sizes_b2[:, 1], image_rng.named(rng_name(name))).tolist()
        parts = [
            resized(image[None, :, top : top + height, left : left + width], crop.size, crop.size)
            for image, (top, left, height, width) in zip(decoded, boxes_b4, strict=True)
        ]
        empty = torch.empty(0, 3, crop.size, crop.size, dtype=torch.uint8)
        done[rng_name(name), crop] = torch.cat(parts) if parts else empty
    return {name: done[rng_name(name), crop] for name, crop in crops.items()}


def cut_clips(
    table: pa.Table,
    views: Mapping[str, View],
    image_rng: ImageRng,
    finished: dict[str, Tensor],
    targets: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Make the source crops of all views that need clips, and leave out the others.

    Args:
        table: rows of the data set with the columns of the views.
        views: views by name; a view chooses with `image_rng.named(rng_name(name))`.
        image_rng: random numbers of the b rows.
        finished: views of the sound are added here, by name.
        targets: targets are added here, by the name of the view.

    Returns:
        uint8 (b, p, 3, s, s) by the name of the view.

    Raises:
        DecodeError: a frame is damaged.
    """
    clips = Clips(table)
    decoded: dict[tuple[int, int], Tensor] = {}
    crops: dict[str, Tensor] = {}
    for name, view in views.items():
        if view.of_clips is None:
            continue
        own_rng = image_rng.named(rng_name(name))
        chosen = view.chosen(clips, own_rng)
        if chosen.target is not None:
            targets[name] = chosen.target
        if chosen.crops_bpchw is not None:
            finished[name] = chosen.crops_bpchw
        else:
            crops[name] = _cut(clips, chosen, view.source, own_rng, decoded)
    return crops


def _cut(
    clips: Clips,
    chosen: Chosen,
    source: SourceCrop,
    image_rng: ImageRng,
    decoded: dict[tuple[int, int], Tensor],
) -> Tensor:
    """Decode the chosen frames that are not in `decoded` yet, and cut and resize them."""
    assert chosen.frames_bp is not None
    b, p = chosen.frames_bp.shape
    crops_bpchw = torch.empty(b, p, 3, source.size, source.size, dtype=torch.uint8)

    def frame(row: int, number: int) -> Tensor:
        if (row, number) not in decoded:
            decoded[row, number] = decode(clips.frame(row, number))
        return decoded[row, number]

    sizes_b2 = np.array([frame(row, int(chosen.frames_bp[row, 0])).shape[1:] for row in range(b)], np.int64)
    sizes_b2 = sizes_b2.reshape(-1, 2)
    if chosen.boxes_bp4 is None:
        boxes_b4 = source.boxes(sizes_b2[:, 0], sizes_b2[:, 1], image_rng)
        boxes_bp4 = np.broadcast_to(boxes_b4[:, None], (b, p, 4))
    else:
        boxes_bp4 = _rounded_boxes(chosen.boxes_bp4, sizes_b2)
    for row in range(b):
        for crop in range(p):
            top, left, height, width = boxes_bp4[row, crop].tolist()
            image_chw = frame(row, int(chosen.frames_bp[row, crop]))
            part = image_chw[None, :, top : top + height, left : left + width]
            crops_bpchw[row, crop] = resized(part, source.size, source.size)[0]
    return crops_bpchw


def _rounded_boxes(boxes_bp4: np.ndarray, sizes_b2: np.ndarray) -> np.ndarray:
    """Round boxes to pixels and move them into their frames, at least 2 x 2 pixels large."""
    sides = np.clip(np.rint(boxes_bp4[..., 2:]).astype(np.int64), 2, sizes_b2[:, None])
    corners = np.clip(np.rint(boxes_bp4[..., :2]).astype(np.int64), 0, sizes_b2[:, None] - sides)
    return np.concatenate([corners, sides], axis=-1)


def rng_name(name: str) -> str:
    """Return the name of a view for its random numbers: without its variant, as "transformed" for "transformed@..."."""
    return name.partition("@")[0]


def resized(image_1chw: Tensor, height: int, width: int) -> Tensor:
    """Return a uint8 image (1, 3, h, w) in another size."""
    if image_1chw.device.type != "cpu":  # torch has no antialiased uint8 there
        return resized_in_float(image_1chw, height, width)
    # One image at a time, and without torchvision's dispatch: for uint8 with the channels last this costs 12 us for
    # 32 pixels, a quarter of what a batched product with weight matrices does.
    return interpolate(image_1chw, (height, width), mode="bilinear", antialias=True)


def resized_in_float(image_1chw: Tensor, height: int, width: int) -> Tensor:
    """Return what `resized` returns, but for the rounding of its fixed-point numbers."""
    made_1chw = interpolate(image_1chw.float(), (height, width), mode="bilinear", antialias=True)
    return made_1chw.round_().clamp_(0, 255).to(torch.uint8)


def evaluation_views(images: Sequence[bytes], size: int) -> Tensor:
    """Return the evaluation view of each image: its shorter side resized to size * 256 / 224, then a central square.

    The pixels are those of torchvision's Resize and CenterCrop on an image of Pillow, and so of timm's evaluation
    transform with bilinear interpolation. An image that already is size x size stays as it is. To bound the memory, the
    ends of an image more than 16 times as long as wide are cut off before it is resized.

    Returns:
        uint8 (b, 3, size, size).

    Raises:
        DecodeError: an image is damaged.
    """

    def view(image: Tensor) -> Tensor:
        image = _trimmed(image)
        height, width = image.shape[1:]
        if (height, width) == (size, size):
            return image
        tall, wide = (int(evaluation_side(size) * side / min(height, width)) for side in (height, width))
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((wide, tall), Image.Resampling.BILINEAR)
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        cropped_hwc = np.array(picture.crop((left, top, left + size, top + size)))
        return torch.from_numpy(cropped_hwc).permute(2, 0, 1)

    return _decode_each(images, size, view)


def evaluation_side(size: int) -> int:
    """Return the shorter side in pixels that `evaluation_views` resizes an image to, for a square of `size` pixels."""
    return round(size * 256 / 224)


def _trimmed(image_chw: Tensor) -> Tensor:
    """Cut the ends off an image that is far longer than the square in its middle."""
    height, width = image_chw.shape[1:]
    longest = _LONGEST * min(height, width)
    # Both ends lose the same number of pixels, so that the middle stays where it is.
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image_chw[:, top : height - top, left : width - left]


def resized_to_square(images: Sequence[bytes], size: int) -> Tensor:
    """Return the whole of every image, both sides resized: uint8 (b, 3, size, size). Raises as `evaluation_views`."""
    return _decode_each(images, size, lambda image: resized(image[None], size, size)[0])


def _decode_each(images: Sequence[bytes], size: int, view: Callable[[Tensor], Tensor]) -> Tensor:
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, data in zip(out, images, strict=True):
        row.copy_(view(decode(data)))
    return out
