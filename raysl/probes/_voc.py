"""Read images with boxes in the layout of PASCAL VOC: JPEGImages, Annotations and ImageSets/Main.

A box is kept as the corners (left, top, right, bottom) of an area. VOC counts pixels from 1 and its last pixel belongs
to the box, so a box over the whole image is 1, 1, width, height in a file and 0, 0, width, height here. (torchvision's
VOCDetection reads local folders only, and does not check annotations.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from raysl.errors import MissingValueError, UserError, explained, unknown
from raysl.fields import flag, prefix
from raysl.probes import Settings, field_values
from raysl.storage import Folder
from raysl.stream import decode

IMAGES, ANNOTATIONS, SPLITS = "JPEGImages", "Annotations", "ImageSets/Main"
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocSettings(Settings):
    """Images of a probe that does not use --train and --test.

    Args:
        data: a folder in the layout of PASCAL VOC, with JPEGImages, Annotations and ImageSets/Main; or several with
            commas between, such as VOC2007,VOC2012 for VOC07+12. A folder adds the splits that it has.
        train_split: name of the list of images to learn from.
        test_split: name of the list of images to score.
    """

    data: str = ""
    train_split: str = "trainval"
    test_split: str = "test"

    @property
    def splits(self) -> tuple[str, str]:
        return self.train_split, self.test_split

    @property
    def folders(self) -> tuple[Folder, ...]:
        return tuple(Folder(one) for one in self.data.split(",") if one)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Workers have another working directory.
        folders = [str(Folder(one.strip())) for one in self.data.split(",") if one.strip()]
        if len(set(folders)) < len(folders):
            raise UserError(f"{self._flag} names a folder twice: {self.data!r}. Give every folder once.")
        object.__setattr__(self, "data", ",".join(folders))

    @property
    def _flag(self) -> str:
        return flag(f"{prefix(type(self))}data")

    def settings(self) -> dict[str, Any]:
        """Return the settings with the fingerprint of both splits in place of their folder."""
        found = fingerprint(self.folders, self.splits) if self.data else ""
        return {**field_values(self), "data": found}

    def check_given(self, wanted: str) -> None:
        """Raise MissingValueError, with the images that the probe needs in words, if no folder is given."""
        if not self.data:
            raise MissingValueError(
                f"The probe {self._flag[2:-5]} needs {wanted}. Give {self._flag} FOLDER, a folder in the layout of "
                f"PASCAL VOC, with {IMAGES}, {ANNOTATIONS} and {SPLITS}."
            )


@dataclass(frozen=True)
class Picture:
    """An image and its boxes."""

    name: str  # name in the split
    image: bytes  # the encoded file
    size: tuple[int, int]  # height and width in pixels
    # float32 (n, 4): left, top, right, bottom in pixels, inside the image, with an area above 0.
    boxes_n4: NDArray[np.float32]
    classes: tuple[str, ...]  # names of the classes of the n boxes
    difficult_n: NDArray[np.bool_]  # bool (n,): boxes that are not judged
    dropped: int = 0  # number of boxes that had no area inside the image
    clipped: int = 0  # number of boxes that reached out of the image by more than a pixel


def read(folder: Folder, split: str) -> list[Picture]:
    """Return the images of a split in its order, all in memory, with boxes clipped to their images.

    Raises UserError if the folder is not in this layout, the split does not exist or names no image, a file is missing,
    an image is damaged, or annotations are malformed.
    """
    return [_picture(folder, name, *_files(folder, name, file)) for name, file in _listed(folder, split)]


def union(folders: Sequence[Folder], split: str) -> list[Picture]:
    """Return the images of a split of all folders that have it. Of several folders, names begin with the folder.

    Raises as `read`, and UserError if no folder has the split.
    """
    if len(folders) == 1:
        return read(folders[0], split)
    return [
        replace(one, name=f"{folder}/{one.name}")
        for folder in _having(folders, split)
        for one in read(folder, split)
    ]


def _having(folders: Sequence[Folder], split: str) -> list[Folder]:
    """Return the folders that have a split; all of them if none has it, so that reading one names its splits."""
    return [folder for folder in folders if f"{split}.txt" in (folder / SPLITS).list()] or list(folders)


@lru_cache(maxsize=8)
def fingerprint(folders: tuple[Folder, ...], splits: tuple[str, ...]) -> str:
    """Return a hash of the images and annotations of splits, without decoding them. Raises UserError as `union`."""
    digest = hashlib.blake2b(digest_size=16)
    for folder, split in [(folder, one) for one in splits for folder in _having(folders, one)]:
        for name, file in _listed(folder, split):
            for part in (split.encode(), name.encode(), *_files(folder, name, file)):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _listed(folder: Folder, split: str) -> list[tuple[str, str]]:
    """Return the names in a split and the file names of their images."""
    splits = [name.removesuffix(".txt") for name in (folder / SPLITS).list() if name.endswith(".txt")]
    if not splits:
        raise UserError(
            f"{str(folder)!r} is not in the layout of PASCAL VOC: there are no lists of images in {SPLITS}. "
            f"Give the folder that holds {IMAGES}, {ANNOTATIONS} and {SPLITS}."
        )
    if split not in splits:
        raise unknown(f"split of {str(folder)!r}", split, splits)
    lines = (folder / SPLITS).read(f"{split}.txt").decode().splitlines()
    # In the list of a class a mark follows each name.
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"The split {split!r} of {str(folder)!r} names no image. Give another split.")
    files = {name.rpartition(".")[0]: name for name in (folder / IMAGES).list()}
    return [(name, files.get(name, f"{name}.jpg")) for name in names]


def _files(folder: Folder, name: str, file: str) -> tuple[bytes, bytes]:
    what = f"A split of {str(folder)!r} names {name!r}, and one of its files is missing"
    remedy = f"Restore {IMAGES}/{file} and {ANNOTATIONS}/{name}.xml, or remove the name from the split."
    with explained(what, remedy, FileNotFoundError):
        return (folder / IMAGES).read(file), (folder / ANNOTATIONS).read(f"{name}.xml")


def _picture(folder: Folder, name: str, image: bytes, xml: bytes) -> Picture:
    what = f"The image {name!r} in {IMAGES} of {str(folder)!r} cannot be decoded"
    with explained(what, "Restore the file.", decode.DecodeError):
        height, width = decode.decode(image).shape[1:]
    what = f"The annotations {ANNOTATIONS}/{name}.xml of {str(folder)!r} are malformed"
    remedy = "Each object has a name and a bndbox of the numbers xmin, ymin, xmax and ymax."
    with explained(what, remedy, ElementTree.ParseError, ValueError):
        objects = ElementTree.fromstring(xml).findall("object")
        classes = [_text(one, "name") for one in objects]
        difficult = [one.findtext("difficult", "0").strip() == "1" for one in objects]
        corners_n4 = [[float(_text(one, f"bndbox/{side}")) for side in _SIDES] for one in objects]
        corners = np.array(corners_n4, dtype=np.float64).reshape(-1, 4) - (1, 1, 0, 0)
        if not np.isfinite(corners).all():
            raise ValueError("a box is not finite")
    boxes_n4 = corners.clip(0, (width, height, width, height)).astype(np.float32)
    kept_n = np.all(boxes_n4[:, :2] < boxes_n4[:, 2:], axis=1)
    return Picture(
        name,
        image,
        (height, width),
        boxes_n4[kept_n],
        tuple(name for name, kept in zip(classes, kept_n.tolist(), strict=True) if kept),
        np.array(difficult, dtype=bool)[kept_n],
        int((~kept_n).sum()),
        int((np.abs(corners - boxes_n4).max(axis=1, initial=0) > 1)[kept_n].sum()),
    )


def _text(one: ElementTree.Element, path: str) -> str:
    """Return the text of an element of an object. Raises ValueError if there is none."""
    text = one.findtext(path, "").strip()
    if not text:
        raise ValueError(f"an object has no {path}")
    return text


def classes_of(*splits: Sequence[Picture]) -> list[str]:
    """Return every class that is shown, those of the first split first."""
    return list(
        dict.fromkeys(
            name for pictures in splits for name in sorted({c for one in pictures for c in one.classes})
        )
    )


def check_disjoint(
    train: Sequence[Picture], test: Sequence[Picture], splits: tuple[str, str], probe: str
) -> None:
    """Raise UserError if the two splits of a probe share images."""
    shared = {one.name for one in train} & {one.name for one in test}
    if shared:
        raise UserError(
            f"The splits {splits[0]!r} and {splits[1]!r} share {len(shared)} images, the first being {min(shared)!r}. "
            f"Give --{probe}.train-split and --{probe}.test-split two splits that share no image."
        )
