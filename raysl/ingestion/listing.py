"""What lies below a folder at any URI, in an order that does not depend on the file system."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from raysl.storage import Folder, filesystem

# The names that data sets give to their splits; a folder or a file of another name is not taken for a split.
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "unlabeled", "extra")
_NUMBERED = re.compile(r"([A-Za-z]\w*?)-\d+-of-\d+")


@dataclass(frozen=True)
class File:
    """A file of a source.

    Args:
        path: below the root that was listed, with "/" between its parts; "" when the root is the file itself.
        num_bytes: its size.
        mtime_ns: when it was last changed, in nanoseconds; 0 where the file system does not know.
    """

    path: str
    num_bytes: int
    mtime_ns: int


def files_below(uri: str, depth: int = 100) -> Iterator[File]:
    """All files below a folder, or the one file at `uri`, sorted part by part of their paths.

    Hidden files and folders, of which the names start with ".", are left out. One folder at a time is held in
    memory.

    Args:
        depth: how many levels of folders to go down; 1 is the files directly inside.

    Raises:
        OSError: something may not be read. Nothing is yielded when nothing is there.
    """
    fs, root = filesystem(Folder(uri).uri)
    root = root.rstrip("/") or "/"
    info = fs.get_file_info([root])[0]
    if info.type == pafs.FileType.File:
        yield _file("", info)
    elif info.type == pafs.FileType.Directory:
        yield from _walk(fs, root, "", depth)


def folders_in(uri: str) -> list[str]:
    """Names of the folders directly inside a folder, sorted, without the hidden ones."""
    fs, root = filesystem(Folder(uri).uri)
    found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    names = (info.base_name for info in found if info.type == pafs.FileType.Directory)
    return sorted(name for name in names if not name.startswith("."))


def is_folder(uri: str) -> bool:
    """Whether a folder is there."""
    fs, root = filesystem(Folder(uri).uri)
    return bool(fs.get_file_info([root])[0].type == pafs.FileType.Directory)


def _walk(fs: pafs.FileSystem, folder: str, prefix: str, depth: int) -> Iterator[File]:
    found = fs.get_file_info(pafs.FileSelector(folder))
    for info in sorted(found, key=lambda info: str(info.base_name)):
        name = info.base_name
        if name.startswith("."):
            continue
        if info.type == pafs.FileType.File:
            yield _file(prefix + name, info)
        elif info.type == pafs.FileType.Directory and depth > 1:
            yield from _walk(fs, info.path, f"{prefix}{name}/", depth - 1)


def _file(path: str, info: pafs.FileInfo) -> File:
    # Arrow says None for a size or a time that an object store does not give.
    return File(path, info.size or 0, info.mtime_ns or 0)


def stamp(files: Iterable[File]) -> str:
    """A hash that changes when a file is added, removed, renamed, resized or written to."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path}\0{file.num_bytes}\0{file.mtime_ns}\n".encode())
    return digest.hexdigest()


def split_of(path: str) -> str:
    """The split that a shard's name or folder says it belongs to; "" when they say none.

    "train-00000-of-00002.parquet", "imagenet-train-000017.tar" and "train/0000.parquet" are of the split "train".
    """
    file = PurePosixPath(path)
    if match := _NUMBERED.match(file.name):
        return match[1]
    words = [*re.split(r"[-_.]", file.name), file.parent.name]
    return next((word for word in words if word.lower() in SPLITS), "")
