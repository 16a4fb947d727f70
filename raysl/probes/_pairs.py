"""Read folders of images, each with a file of the same name in another folder that says something about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from raysl.errors import UserError
from raysl.storage import Folder

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pair:
    """An image and its target, which are read when they are used.

    Args:
        folder: folder of a split.
        image_name: name of the image in it, with its folder.
        target_name: name of the target.
    """

    folder: Folder
    image_name: str
    target_name: str

    def image(self) -> bytes:
        """Return the encoded image."""
        return self._read(self.image_name)

    def target(self) -> bytes:
        """Return the content of the target."""
        return self._read(self.target_name)

    def _read(self, name: str) -> bytes:
        place, _, file = name.rpartition("/")
        return (self.folder / place).read(file)


def pairs(folder: Folder, names: tuple[str, str]) -> list[Pair]:
    """Return the pairs of a split, sorted by name.

    Args:
        folder: folder of the split.
        names: names of the folders of images and of targets in it.

    Raises:
        UserError: there are no images, or an image has no target.
    """
    images, targets = (_by_stem(folder / name) for name in names)
    if not images:
        raise UserError(
            f"There are no images in {str(folder / names[0])!r}. Give a folder with {_layout(names)}."
        )
    if missing := sorted(images.keys() - targets.keys()):
        raise UserError(
            f"{len(missing)} images in {str(folder / names[0])!r} have no file of their name in {names[1]!r}, the "
            f"first being {images[missing[0]]!r}. Add these files, or remove the images."
        )
    return [
        Pair(folder, f"{names[0]}/{images[stem]}", f"{names[1]}/{targets[stem]}") for stem in sorted(images)
    ]


@lru_cache(maxsize=8)
def fingerprint(folder: Folder, names: tuple[str, str]) -> str:
    """Return a hash of all files of both splits, without decoding them. Raises UserError as `pairs`."""
    digest = hashlib.blake2b(digest_size=16)
    for split in _SPLITS:
        for one in pairs(folder / split, names):
            for part in (split.encode(), one.image_name.encode(), one.image(), one.target()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _by_stem(folder: Folder) -> dict[str, str]:
    """Return the names of files without their ending, and their full names."""
    return {name.rpartition(".")[0] or name: name for name in folder.list() if not name.startswith(".")}


def _layout(names: tuple[str, str]) -> str:
    return ", ".join(f"{split}/{name}" for split in _SPLITS for name in names)
