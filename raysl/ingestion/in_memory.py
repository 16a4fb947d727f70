"""Images in memory as the tables of a source: one array of many, or a sequence such as a data set of torch."""

from __future__ import annotations

import json
import operator
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from raysl.errors import UserError, counted
from raysl.ingestion import labels, png
from raysl.ingestion.pixel_files import (
    are_images,
    encode,
    file_of,
    image_of,
    is_pixels,
    is_tensor,
    no_images,
    pixels_of,
)
from raysl.ingestion.sources import UnitSize, in_units

# The most that is held in memory of what is written.
_PIECE = UnitSize(256, 64 << 20)


class Item(NamedTuple):
    """An image, and its label if `has_label`."""

    image: Any
    label: Any
    has_label: bool

    @staticmethod
    def of(value: Any) -> Item:
        """Take an item of a sequence apart: an image, or a tuple or list of an image, its label and more."""
        if not isinstance(value, tuple | list) or not value:
            return Item(value, None, False)
        return Item(value[0], value[1] if len(value) > 1 else None, len(value) > 1)


def item(source: Any, number: int, name: str) -> Item:
    """Return an item of a sequence. Raises UserError, which names it, if the sequence fails."""
    try:
        return Item.of(source[number])
    except Exception as error:  # raised by the user's code
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise UserError(
            f"Item {number} of {name} cannot be read: {why}. Correct it, or leave it out."
        ) from error


def of_stack(stack: Any, given: Any) -> tuple[str, Iterator[pa.Table]]:
    """Return the name of an array or a tensor of many images, and its images as tables of PNG files.

    Args:
        stack: a uint8 array (n, h, w) or (n, h, w, c), or a uint8 tensor (n, h, w) or (n, c, h, w); c is 1 or 3.
        given: n labels, or None.
    """
    tensor, shape = is_tensor(stack), tuple(stack.shape)
    kind, many = ("a tensor", "(n, 3, h, w)") if tensor else ("an array", "(n, h, w, 3)")
    # A tensor of one gray image and of many is the same; NumPy has the channels last.
    if are_images(stack) and (stack.ndim == 2 or (stack.ndim == 3 and not (tensor and shape[0] == 1))):
        raise UserError(
            f"The source is {kind} of the shape {shape}, which is one image. Give several as {many}, or this one as "
            "images[None]."
        )
    name = f"{kind} of {counted(len(stack) if shape else 0, 'image')}"
    images = stack
    if stack.ndim == 3:  # Gray.
        images = stack[:, None] if tensor else stack[..., None]
    if 0 not in shape[:1] and not are_images(images):
        raise no_images(stack, "The source is")
    classes = None if given is None else label_list(given, len(stack), name)
    return name, _of_stack(images, classes, name)


def _of_stack(images: Any, classes: list[Any] | None, name: str) -> Iterator[pa.Table]:
    step = max(1, min(_PIECE.num_images, _PIECE.num_bytes // max(1, int(np.prod(images.shape[1:])))))
    for start in range(0, len(images), step):
        files = png.encode(np.ascontiguousarray(pixels_of(images[start : start + step])))
        of_files = None
        if classes is not None:
            some = enumerate(classes[start : start + step], start)
            of_files = [_class_of(label, number, name) for number, label in some]
        yield table("image", pa.array(files, pa.binary()), of_files)


def of_items(source: Any, name: str, given: Any, with_labels: bool) -> Iterator[pa.Table]:
    """Return the images of a sequence as tables. Its attribute `classes` names those that numbers stand for.

    Args:
        source: has a length; its items are images, or tuples of an image, its label and more. An image is of PIL, a
            uint8 array (h, w) or (h, w, c), a uint8 tensor (h, w) or (c, h, w), or the bytes of a file.
        name: names the source for the user.
        given: a label for each item; None if items hold them.
        with_labels: False leaves the labels out.
    """
    classes = None if given is None else label_list(given, len(source), name)
    if classes is not None and item(source, 0, name).has_label:
        raise labeled_twice(name)
    return _of_items(source, name, classes, with_labels)


def labeled_twice(name: str, number: int = 0) -> UserError:
    return UserError(f"Item {number} of {name} holds a label, and labels= is given too. Give one of them.")


def _of_items(source: Any, name: str, given: list[Any] | None, with_labels: bool) -> Iterator[pa.Table]:
    items = (item(source, number, name) for number in range(len(source)))
    names: list[str] = []
    has_labels = False
    files = (
        (number, _file(one.image, number, name), one if given is None else Item(None, given[number], True))
        for number, one in enumerate(items)
    )
    for piece in in_units(files, _PIECE, lambda row: (1, len(row[1]))):
        if piece[0][0] == 0:
            first = piece[0][2]
            has_labels = with_labels and first.has_label
            names = names_of(source, first.label) if has_labels else []
        if with_labels and not has_labels and (odd := next((i for i, _, one in piece if one.has_label), 0)):
            raise UserError(f"Item {odd} of {name} holds a label, and item 0 none. Give None as its label.")
        told = [label_of(one.label, number, name, names) for number, _, one in piece] if has_labels else None
        yield table("image", pa.array([data for _, data, _ in piece], pa.binary()), told, names)


def label_of(label: Any, number: int, name: str, names: Sequence[str]) -> Any:
    """Return the label of item `number` of `name` as `table` takes it."""
    return (_number if names else _class_of)(label, number, name)


def table(
    column: str, images: pa.Array, of_files: Sequence[Any] | None, names: Sequence[str] = ()
) -> pa.Table:
    """Return images and their labels as a table; labels are numbers of `names` if there are any, or else classes."""
    columns: dict[str, Any] = {column: images}
    if of_files is not None:
        columns["label"] = pa.array(of_files, pa.int64() if names else pa.string())
    about = {"info": {"features": {"label": {"names": [*names], "_type": "ClassLabel"}}}}
    return pa.table(columns, metadata={"huggingface": json.dumps(about)} if names else None)


def label_list(given: Any, count: int, name: str) -> list[Any]:
    """Return the labels of `count` images as a list."""
    values = given.tolist() if hasattr(given, "tolist") else given
    try:
        values = [*values]
    except TypeError:
        values = [values]
    if len(values) != count:
        raise UserError(f"labels= holds {counted(len(values), 'label')} for {name}. Give one for each image.")
    return values


def names_of(source: Any, label: Any) -> list[str]:
    """Return the names of the classes of a data set, or of the one that it is a part of; empty if it has none, or its
    first label is no number.
    """
    if not isinstance(_plain_label(label), int):
        return []
    while not hasattr(source, "classes") and hasattr(source, "dataset"):
        source = source.dataset
    found = getattr(source, "classes", None)
    if not isinstance(found, list | tuple):
        return []
    return labels.distinct(
        [", ".join(map(str, one)) if isinstance(one, list | tuple) else str(one) for one in found]
    )


def _plain_label(label: Any) -> Any:
    return label.tolist() if isinstance(label, np.generic) or is_pixels(label) else label


def _number(label: Any, number: int, name: str) -> int | None:
    label = _plain_label(label)
    try:
        return None if label is None else operator.index(label)
    except TypeError:
        raise UserError(
            f"Item {number} of {name} has the label {reprlib.repr(label)}, and item 0 the number of a class. Give such "
            "numbers for all, or None for an image without a label."
        ) from None


def _class_of(label: Any, number: int, name: str) -> str | None:
    try:
        return labels.as_class_of_object(label)
    except labels.NoClassesError as error:
        raise UserError(
            f"Item {number} of {name} has the label {reprlib.repr(label)}, which {error}. {labels.PLAIN} "
            "labels='none' ingests without labels."
        ) from None


def _file(image: Any, number: int, name: str) -> bytes:
    """Return an image as a file: its own if it is not decoded yet, or else a new one without loss."""
    subject = f"Item {number} of {name}"
    if isinstance(image, bytes):
        return image
    if is_pixels(image):
        pixels = pixels_of(image, f"{subject} is")
        if pixels.ndim == 4:
            raise no_images(image, f"{subject} is")
        return encode(image_of(pixels), small=True)
    if isinstance(image, str | os.PathLike):
        raise UserError(
            f"{subject} is a path, and item 0 is an image. All items must be paths, or all images."
        )
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{subject} is of the type {type(image).__name__}. Each item must be an image (of PIL, a uint8 array or "
            "tensor, or the bytes of a file), or the path of one, or a tuple of one of these and a label."
        )
    try:
        return file_of(image) or encode(image, small=True)
    except (OSError, ValueError, AttributeError, SyntaxError) as error:
        raise UserError(f"{subject} cannot be read: {error}. Open it again, or leave it out.") from error
