"""List the files of a source, in an order that does not depend on the file system."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, BinaryIO, cast

from raysl.errors import UserError
from raysl.ingestion.found import LINKS_AGAIN, LINKS_OUT, LeftOut, of_kind, printable
from raysl.storage import Folder, filesystem, retry
from raysl.stream.formats import EXTENSIONS, looks_like_image

IMAGE, TABLE, ARCHIVE = "image", "tables", "archives"
NOTES, VIDEO = "JSON or XML files", "videos"
_Inode = tuple[int, int]
_FEW_FILES = 100_000
# Bytes at the beginning of a file that tell whether it is an image.
HEAD_BYTES = 4096
_FIRST_NAMES = 20
_KINDS = {
    "text files": ".txt .md .rst .log .py .m .ipynb .sh .html .htm .css .js .yaml .yml .cfg .ini .toml .names .license",
    NOTES: ".json .xml",
    TABLE: ".csv .tsv .jsonl .ndjson .parquet .arrow .feather .xls .xlsx .sqlite .db",
    ARCHIVE: ".tar .zip .gz .tgz .bz2 .xz .zst .7z .rar",
    VIDEO: ".mp4 .avi .mov .mkv .webm .mpg .mpeg .wmv .m4v .ogv .flv .3gp",
    "audio files": ".wav .mp3 .flac .ogg",
    "images in formats that are not read": ".dcm .exr .hdr .fits .fit .nii .nrrd .mha .mhd .pam .xcf .czi .nd2 .svs",
    "data in formats that are not read": ".rec .mds .beton .tfrecord .tfrecords .tfrec .mdb .lmdb .lance .zarr",
    "arrays and weights": ".npy .npz .mat .h5 .hdf5 .pkl .pickle .pt .pth .safetensors .onnx",
    "documents": ".pdf .doc .docx .ppt .pptx .eps .ps",
}
_KIND_OF = {
    **{suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()},
    **dict.fromkeys(EXTENSIONS, IMAGE),
}
OTHER = "files of unknown kind"
_HIDDEN_PART = re.compile(
    r"(?:^|/)(?:\.|(?:__MACOSX|Thumbs\.db|desktop\.ini|Icon\r|lost\+found|\$RECYCLE\.BIN|System Volume Information|"
    r"@eaDir|#recycle|#snapshot)(?:/|$))|~$"
)
HIDDEN = "hidden files and folders"
_BROKEN_LINKS = "links that lead nowhere"
_NOT_FILES = "pipes, sockets and devices"

# Files that hold the labels of images beside them, see `raysl.ingestion.metadata`.
LABEL_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "val_annotations.txt")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source. Its path is relative to the listed root, or "" if the root is the file itself. Its time is 0
    if the file system does not know it.
    """

    path: str
    num_bytes: int
    mtime_ns: int


def is_hidden(path: str) -> bool:
    """Return True for files that systems and editors leave behind, and for names that start with a dot."""
    return bool(_HIDDEN_PART.search(path))


def kind_of(path: str) -> str:
    """Return the kind of a file by the end of its name: `IMAGE`, another kind, or "" if the name does not tell."""
    return _KIND_OF.get(os.path.splitext(path)[1].lower(), "")


def files_below(
    uri: str, depth: int = 100, left_out: LeftOut | None = None, follow_links: bool = False, base: str = ""
) -> Iterator[File]:
    """Yield all files below a folder, or the one file at `uri`, sorted part by part of their paths.

    Hidden files, links that lead nowhere, pipes, sockets and devices are left out. A link to a folder is followed
    once, and never into a folder that it lies in.

    Args:
        depth: levels of folders to go down; 1 is the files directly inside.
        left_out: what is left out is added here.
        follow_links: follow links that lead out of the folder.
        base: folder inside `uri` to start at; paths still begin at `uri`.

    Raises UserError if a folder may not be read, or a link leads out of the source.
    """
    left_out = LeftOut() if left_out is None else left_out
    root, prefix = Folder(uri).uri, join(base, "")
    if "://" not in root:
        if os.path.isfile(root):
            info = os.stat(root)
            yield File("", info.st_size, info.st_mtime_ns)
        elif os.path.isdir(root):
            walk = _LocalWalk(os.path.realpath(root), left_out, follow_links)
            yield from walk.below(os.path.join(root, base), prefix, depth, ())
            walk.refuse_links_out()
        return
    fs, folder = filesystem(root)
    folder = folder.rstrip("/") or "/"
    info = retry(root, "read", lambda: fs.get_file_info([folder])[0])
    if info.is_file:
        yield _remote_file("", info)
    elif info.type.name == "Directory":
        yield from _walk_remote(fs, f"{folder}/{base}" if base else folder, prefix, depth, left_out)


@dataclass
class _LocalWalk:
    """A walk over the folders of a local disk."""

    root: str
    left_out: LeftOut
    follow_links: bool
    _followed: set[_Inode] = field(default_factory=set)
    _outside: list[tuple[str, str]] = field(default_factory=list)

    def below(self, folder: str, prefix: str, depth: int, above: tuple[_Inode, ...]) -> Iterator[File]:
        try:
            info = os.stat(folder)
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            raise UserError(
                f"The folder {printable(folder)!r} may not be read. Give yourself access to it, or move it out of the "
                "source."
            ) from None
        above = (*above, (info.st_dev, info.st_ino))
        if not found and prefix:
            self.left_out.add("empty folders", prefix.rstrip("/"))
        for entry in found:
            path = prefix + entry.name
            if is_hidden(entry.name):
                self.left_out.add(HIDDEN, path)
                continue
            if entry.is_symlink() and not self._may_follow(entry, path, above):
                continue
            info = entry.stat()
            if stat.S_ISREG(info.st_mode):
                yield File(path, info.st_size, info.st_mtime_ns)
            elif stat.S_ISDIR(info.st_mode):
                if depth > 1:
                    yield from self.below(entry.path, f"{path}/", depth - 1, above)
            else:
                self.left_out.add(_NOT_FILES, path)

    def _may_follow(self, entry: os.DirEntry[str], path: str, above: tuple[_Inode, ...]) -> bool:
        try:
            info = os.stat(entry.path)
        except OSError:
            self.left_out.add(_BROKEN_LINKS, path)
            return False
        target = os.path.realpath(entry.path)
        if not self.follow_links and os.path.commonpath([self.root, target]) != self.root:
            self._outside.append((path, target))
            return False
        if stat.S_ISDIR(info.st_mode):
            key = (info.st_dev, info.st_ino)
            if key in above or key in self._followed:
                self.left_out.add(LINKS_AGAIN, path)
                return False
            self._followed.add(key)
        return True

    def refuse_links_out(self) -> None:
        if self._outside:
            path, target = self._outside[0]
            raise UserError(
                f"The source {printable(self.root)!r} holds {of_kind(LINKS_OUT, len(self._outside))}, the first being "
                f"{printable(path)!r} to {printable(target)!r}. Add --follow-links to read what they lead to, or "
                "remove them."
            )


def _walk_remote(fs: Any, folder: str, prefix: str, depth: int, left_out: LeftOut) -> Iterator[File]:
    import pyarrow.fs as pafs

    found = retry(f"{fs.type_name}://{folder}", "list", lambda: fs.get_file_info(pafs.FileSelector(folder)))
    for info in sorted(found, key=lambda info: str(info.base_name)):
        path = prefix + info.base_name
        if is_hidden(info.base_name):
            left_out.add(HIDDEN, path)
        elif info.is_file:
            yield _remote_file(path, info)
        elif info.type.name == "Directory" and depth > 1:
            yield from _walk_remote(fs, info.path, f"{path}/", depth - 1, left_out)


def _remote_file(path: str, info: Any) -> File:
    # Arrow returns None for a size or a time that an object store does not know.
    return File(path, info.size or 0, info.mtime_ns or 0)


def is_folder(uri: str) -> bool:
    """Return True if there is a folder at `uri`."""
    root = Folder(uri).uri
    if "://" not in root:
        return os.path.isdir(root)
    fs, path = filesystem(root)
    return bool(retry(root, "read", lambda: fs.get_file_info([path])[0].type.name == "Directory"))


def read_bytes(root: str, path: str, limit: int = -1) -> bytes:
    """Return the first `limit` bytes of a file of a source, or all of it. Raises OSError or StorageError."""
    if "://" not in root:
        with open(os.path.join(root, path) if path else root, "rb", buffering=0) as file:
            # Python allocates the requested number of bytes before it reads, and most files are smaller.
            small = limit < 0 or os.fstat(file.fileno()).st_size <= limit
            return file.read() if small else file.read(limit)
    with Folder(root).open(path) as stream:
        return stream.read(limit)


def open_file(root: str, path: str) -> BinaryIO:
    """Open a file of a source for reading, seekable, whatever its name is. Raises OSError or StorageError."""
    if "://" in root:
        return Folder(root).open(path)
    place, (fs, _) = os.path.join(root, path), filesystem(root)
    return cast(BinaryIO, retry(place, "read", lambda: fs.open_input_file(os.fsencode(place))))


def stamp(files: Iterable[File]) -> str:
    """Return a hash that changes when a file is added, removed, renamed, resized or written to."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_line(file))
    return digest.hexdigest()


def _line(file: File) -> bytes:
    return f"{file.path}\0{file.num_bytes}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape")


@dataclass
class Survey:
    """Counts of the files in every folder of a source, by kind, from which a layout is recognized."""

    folders: dict[str, Counter[str]] = field(default_factory=dict)  # files in each, by kind; "" is the root
    examples: dict[tuple[str, str], str] = field(default_factory=dict)  # first file of each folder and kind
    first_paths: dict[str, list[str]] = field(default_factory=dict)  # the first images of each folder
    sniffed: set[str] = field(default_factory=set)  # recognized by their content: their names do not tell
    num_bytes: Counter[str] = field(default_factory=Counter)  # of all files, by kind
    tables: set[str] = field(default_factory=set)  # files that may hold labels of the images beside them
    digest: str = ""  # changes when a file is added or removed or an image changes
    first_files: list[File] = field(default_factory=list)  # so that small sources are walked only once
    num_files: int = 0
    about: str = IMAGE  # the kind of files that count as the images of the layout

    def all_files(self) -> list[File] | None:
        """Return all files; None if there are more than are kept."""
        return self.first_files if self.num_files == len(self.first_files) else None

    @staticmethod
    def of(files: Iterable[File], head: Callable[[str], bytes], about: str = IMAGE) -> Survey:
        """Count files. `head` returns the first bytes of a file, which show its kind if its name does not."""
        files = iter(files)
        survey = Survey(first_files=list(islice(files, _FEW_FILES)), about=about)
        digest = hashlib.blake2b(digest_size=16)
        for file in chain(survey.first_files, files):
            folder, _, name = file.path.rpartition("/")
            kind = kind_of(file.path) or survey._sniff(file.path, head)
            if about != IMAGE:
                kind = {about: IMAGE, IMAGE: "images"}.get(kind, kind)
            counts = survey.folders.setdefault(folder, Counter())
            if not counts[kind]:
                survey.examples[folder, kind] = file.path
            counts[kind] += 1
            if kind == IMAGE and counts[kind] <= _FIRST_NAMES:
                survey.first_paths.setdefault(folder, []).append(file.path)
            survey.num_bytes[kind] += file.num_bytes
            survey.num_files += 1
            if name in LABEL_TABLES:
                survey.tables.add(file.path)
            # A changed text file beside the images does not require another ingest, so only its name is hashed.
            matters = kind == IMAGE or file.path in survey.tables
            digest.update(_line(file if matters else File(file.path, 0, 0)))
        survey.digest = digest.hexdigest()
        return survey

    def _sniff(self, path: str, head: Callable[[str], bytes]) -> str:
        with suppress(OSError):
            if looks_like_image(head(path)):
                self.sniffed.add(path)
                return IMAGE
        return OTHER

    def is_image(self, path: str) -> bool:
        return kind_of(path) == self.about or path in self.sniffed

    def images(self, folder: str = "", direct: bool = False) -> int:
        """Return the number of images below a folder, or directly inside it."""
        return self.folders.get(folder, Counter())[IMAGE] if direct else self._tree[0][folder]

    @cached_property
    def _tree(self) -> tuple[Counter[str], dict[str, set[str]]]:
        """The number of images below every folder, and the names of the folders inside it."""
        below: Counter[str] = Counter()
        children: dict[str, set[str]] = {}
        for folder, counts in self.folders.items():
            below[folder] += counts[IMAGE]
            while folder:
                parent, _, name = folder.rpartition("/")
                children.setdefault(parent, set()).add(name)
                below[parent] += counts[IMAGE]
                folder = parent
        return below, children

    def children(self, folder: str) -> list[str]:
        """Return the names of the folders directly inside a folder that hold images, sorted."""
        below, children = self._tree
        return sorted(name for name in children.get(folder, ()) if below[join(folder, name)])

    def first_below(self, folder: str) -> list[str]:
        """Return the first images of a folder and of each folder below it."""
        _, children = self._tree
        below = [folder]
        for at in below:  # `below` grows inside of the loop
            below += [join(at, name) for name in children.get(at, ())]
        return [path for at in below for path in self.first_paths.get(at, ())]

    def first(self, folder: str = "") -> str:
        """Return the first image below a folder."""
        return self._first.get(folder, "")

    @cached_property
    def _first(self) -> dict[str, str]:
        """The first image below every folder."""
        first: dict[str, str] = {}
        for (folder, kind), path in self.examples.items():
            while kind == IMAGE and first.setdefault(folder, path) == path and folder:
                folder = folder.rpartition("/")[0]
        return first

    def others(self) -> LeftOut:
        """Return the files that are not images."""
        left = LeftOut()
        for folder, counts in self.folders.items():
            for kind, count in counts.items():
                if kind != IMAGE:
                    left.add(kind, self.examples[folder, kind], count)
        return left


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
