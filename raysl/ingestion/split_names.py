"""Recognise splits by the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

# The names that data sets give to their splits.
_SPLIT = r"train|training|trainval|test|testing|val|valid|validation|dev|unlabell?ed|extra"
_IS_SPLIT = re.compile(rf"({_SPLIT})[ _-]?(set|data|images?|\d+|[ab])?", re.IGNORECASE)
_ENDS_AS_SPLIT = re.compile(rf".*[ _-]({_SPLIT})", re.IGNORECASE)
# "data-00000-of-00002.arrow" is how Hugging Face names the files of every split.
_NUMBERED = re.compile(r"(?!data-|part-|shard-)([A-Za-z]\w*?)-\d+-of-\d+")


def is_split(name: str, strictly: bool = True) -> bool:
    """Return True if a folder or a file is named like a split, such as "train", "Test", "val2017", "training_set".

    Args:
        strictly: do not take names that only end like a split, such as "seg_train".
    """
    return bool(_IS_SPLIT.fullmatch(name) or (not strictly and _ENDS_AS_SPLIT.fullmatch(name)))


def by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of every split, as the names of the files or of their folders state it; "" if they state none.

    "train-00000-of-00002.parquet", "imagenet-train-000017.tar" and "train/0000.parquet" are of the split "train".
    "mytrain.parquet" and "mytest.parquet" are two splits, too.
    """
    paths = list(paths)
    splits = {path: _split_of(path) for path in paths}
    stems = {
        path: re.fullmatch(r"(.*(?:train|test|val|valid|validation))\.\w+", path.rpartition("/")[2])
        for path in paths
    }
    if not any(splits.values()) and all(stems.values()):
        splits = {path: match[1] for path, match in stems.items() if match}
    found: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda path: splits[path]):
        found.setdefault(splits[path], []).append(path)
    return found


def _split_of(path: str) -> str:
    if named := re.search(r"(?:^|/)split=([^/]+)/", path):
        return named[1]
    words = [*re.split(r"[-_.]", path.rpartition("/")[2]), PurePosixPath(path).parent.name]
    match = _NUMBERED.match(path.rpartition("/")[2])
    return match[1] if match else next((word for word in words if _IS_SPLIT.fullmatch(word)), "")
