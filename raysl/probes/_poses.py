"""Read images with key points: annotations of COCO, of MPII, and of DeepLabCut.

The format is told by the file:

    *.json with a dictionary    COCO: `images`, `annotations` with `keypoints` and `bbox`, `categories` with names
    *.json with a list          MPII as HRNet has it: `image`, `joints`, `joints_vis`, `center`, `scale`
    *.mat                       MPII as published (Andriluka et al. 2014), its training images
    *.csv                       DeepLabCut: the lines `scorer`, `bodyparts` and `coords`, then an image a line

A figure is seen in a square: 1.25 times the longer side of its box, around the middle of the box; for DeepLabCut, which
has no boxes, and for clips, around the whole image. What lies outside of the image is black. Pixels count from 0, so
MPII's, which count from 1, are moved.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raysl.dataset import DataSet
from raysl.errors import UserError, package
from raysl.probes._images import each_clip, seen_points, spaced
from raysl.storage import Folder
from raysl.stream import decode

_PADDING = 1.25
# MPII: a scale of 1 is a person of 200 pixels; the reference of PCKh is 0.6 of the diagonal of the head's box.
_PERSON, _HEAD = 200, 0.6
_MPII = (
    *("right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "pelvis", "thorax"),
    *("upper neck", "head top", "right wrist", "right elbow", "right shoulder"),
    *("left shoulder", "left elbow", "left wrist"),
)


@dataclass(frozen=True)
class Figure:
    """One person, animal or object with its key points."""

    image: str | bytes  # name of the image, relative to the folder of images, or the encoded image
    # Left, top and side in pixels of the square it is seen in; None for the whole image.
    square: tuple[float, float, float] | None
    points_k2: NDArray[np.float32]  # float32 (k, 2), x and y in pixels; NaN if a point is not annotated
    length: float  # the length in pixels that distances are compared with


@dataclass(frozen=True)
class Figures:
    """The figures of a file, and the names of their key points."""

    names: tuple[str, ...]
    figures: tuple[Figure, ...]


def read(folder: Folder, file: str, reference: str) -> Figures:
    """Return the annotated figures of a file in its order; figures without an annotated point are left out.

    Args:
        reference: "box" for the longer side of the box (without one, of the annotated points), or "head" for MPII's
            length of the head.

    Raises UserError if the file is missing, malformed or of no known format, or it has no figure or no such reference.
    """
    try:
        data = folder.read(file)
    except FileNotFoundError as error:
        raise UserError(f"The annotations {str(folder / file)!r} do not exist. Give another file.") from error
    ending = file.rpartition(".")[2].lower()
    readers = {"json": _json, "mat": _mat, "csv": _csv}
    if ending not in readers:
        raise UserError(
            f"The annotations {file!r} have no known format. Give a JSON file of COCO or MPII, MPII's .mat, or a CSV "
            "file of DeepLabCut."
        )
    try:
        names, found = readers[ending](data, reference)
        figures = tuple(one for one in found if np.isfinite(one.points_k2).all(1).any() and one.length > 0)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"The annotations {str(folder / file)!r} are malformed: {what}.") from error
    if not figures:
        raise UserError(f"The annotations {str(folder / file)!r} have no figure with a key point.")
    return Figures(tuple(names), figures)


def of_clips(data: DataSet, frames: int) -> Figures:
    """Return the figures of a data set of clips with key points, in some whole frames, evenly spaced in time.

    The length is the longer side of the box of the key points that are seen.
    """
    figures = []
    for _, clips, row in each_clip(data, ("frames", "times", "keypoints")):
        points_nk2 = seen_points(clips, row)
        for number in spaced(clips.num_frames(row), frames):
            points_k2 = points_nk2[number]
            figures.append(Figure(clips.frame(row, number), None, points_k2, _extent(points_k2)))
    return Figures(tuple(data.manifest.clips["keypoints"]), tuple(one for one in figures if one.length > 0))


def _extent(points_k2: NDArray[np.float32]) -> float:
    """Return the longer side in pixels of the box of the annotated points; 0 without any."""
    shown_k2 = points_k2[np.isfinite(points_k2).all(1)]
    return float(np.ptp(shown_k2, axis=0).max()) if len(shown_k2) else 0.0


def _json(data: bytes, reference: str) -> tuple[Sequence[str], Iterator[Figure]]:
    held = json.loads(data)
    if reference == "head":
        raise ValueError("this format has no box of the head; use --keypoints.reference box")
    return _coco(held) if isinstance(held, dict) else _hrnet(held)


def _coco(held: dict[str, Any]) -> tuple[Sequence[str], Iterator[Figure]]:
    named = [one["keypoints"] for one in held["categories"] if one.get("keypoints")]
    if len(named) != 1:
        raise ValueError(f"{len(named)} categories have key points, and one must have them")
    files = {one["id"]: one["file_name"] for one in held["images"]}
    numbers = {one["id"] for one in held["categories"] if one.get("keypoints")}

    def figures() -> Iterator[Figure]:
        for one in held["annotations"]:
            if one.get("iscrowd") or one["category_id"] not in numbers:
                continue
            points_k3 = np.array(one["keypoints"], dtype=np.float32).reshape(len(named[0]), 3)
            points_k3[points_k3[:, 2] == 0] = np.nan
            left, top, width, height = (float(value) for value in one["bbox"])
            yield Figure(
                files[one["image_id"]],
                _square(left + width / 2, top + height / 2, max(width, height)),
                points_k3[:, :2],
                max(width, height),
            )

    return named[0], figures()


def _hrnet(held: list[dict[str, Any]]) -> tuple[Sequence[str], Iterator[Figure]]:
    def figures() -> Iterator[Figure]:
        for one in held:
            points_k2 = np.array(one["joints"], dtype=np.float32).reshape(len(_MPII), 2) - 1
            points_k2[np.array(one["joints_vis"]) == 0] = np.nan
            length = float(one["scale"]) * _PERSON
            x, y = one["center"]
            yield Figure(one["image"], _square(x - 1, y - 1, length), points_k2, length)

    return _MPII, figures()


def _mat(data: bytes, reference: str) -> tuple[Sequence[str], Iterator[Figure]]:
    loadmat = package("scipy.io", "MPII's .mat", "report").loadmat
    release = loadmat(io.BytesIO(data), struct_as_record=False, squeeze_me=True)["RELEASE"]

    def figures() -> Iterator[Figure]:
        images = zip(np.atleast_1d(release.annolist), np.atleast_1d(release.img_train), strict=True)
        for one in (one for one, is_train in images if is_train):
            for person in np.atleast_1d(getattr(one, "annorect", [])):
                if not hasattr(getattr(person, "annopoints", None), "point"):
                    continue
                points_k2 = np.full((len(_MPII), 2), np.nan, dtype=np.float32)
                for point in np.atleast_1d(person.annopoints.point):
                    points_k2[int(point.id)] = float(point.x) - 1, float(point.y) - 1
                body = float(person.scale) * _PERSON
                head = _HEAD * float(np.hypot(person.x2 - person.x1, person.y2 - person.y1))
                square = _square(person.objpos.x - 1, person.objpos.y - 1, body)
                yield Figure(str(one.image.name), square, points_k2, head if reference == "head" else body)

    return _MPII, figures()


def _csv(data: bytes, reference: str) -> tuple[Sequence[str], Iterator[Figure]]:
    if reference == "head":
        raise ValueError("this format has no box of the head; use --keypoints.reference box")
    lines = list(csv.reader(io.StringIO(data.decode())))
    head = {line[0]: line for line in lines[:4]}
    # Newer files have the folders of an image in columns of their own, which have no coordinate.
    columns = [i for i, name in enumerate(head["coords"]) if name in ("x", "y")]
    if len(set(head.get("individuals", ["", ""])[columns[0] :])) > 1:
        raise ValueError("it has several individuals, and raysl reads one")
    names = [head["bodyparts"][i] for i in columns[::2]]

    def figures() -> Iterator[Figure]:
        for line in lines[list(head).index("coords") + 1 :]:
            values = [float(line[i]) if line[i].strip() else np.nan for i in columns]
            points_k2 = np.array(values, dtype=np.float32).reshape(-1, 2)
            name = "/".join(filter(None, line[: columns[0]]))
            yield Figure(name, None, points_k2, _extent(points_k2))

    return names, figures()


def _square(x: float, y: float, longest: float) -> tuple[float, float, float]:
    side = max(1.0, _PADDING * float(longest))
    return float(x) - side / 2, float(y) - side / 2, side


def views(figures: Sequence[Figure], images: Folder | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return b figures as the probe sees them, in views of `size` pixels; `images` is the folder of those with names.

    Returns:
        uint8 (b, 3, size, size); the key points as shares of the view, float (b, k, 2), NaN where not annotated; and
        the length of each figure as a share of the view, float (b,).

    Raises UserError if an image is missing or damaged.
    """
    seen, points, lengths = [], [], []
    for one in figures:
        image = _image(images, one.image)
        longest = max(image.size)
        left, top, side = one.square or ((image.width - longest) / 2, (image.height - longest) / 2, longest)
        box = tuple(round(edge) for edge in (left, top, left + side, top + side))
        cut = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)  # type: ignore[arg-type]
        seen.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
        # The middle of the first pixel is at half a pixel.
        corner_2 = np.array(box[:2], dtype=np.float32)
        points.append(torch.from_numpy((one.points_k2 + 0.5 - corner_2) / (box[2] - box[0])))
        lengths.append(one.length / (box[2] - box[0]))
    return torch.stack(seen), torch.stack(points), torch.tensor(lengths)


def _image(images: Folder | None, named: str | bytes) -> Image.Image:
    name = named if isinstance(named, str) else "of a clip"
    place, _, file = name.rpartition("/")
    try:
        folder = images or Folder(".")
        data = named if isinstance(named, bytes) else (folder / place if place else folder).read(file)
        pixels_chw = decode.decode(data)
    except FileNotFoundError as error:
        raise UserError(
            f"The annotations name the image {name!r}, which is not in {str(images)!r}. Give the folder of the images "
            "with --keypoints.images."
        ) from error
    except decode.DecodeError as error:
        raise UserError(f"The image {name!r} in {str(images)!r} cannot be decoded: {error}.") from error
    return Image.fromarray(pixels_chw.permute(1, 2, 0).contiguous().numpy())
