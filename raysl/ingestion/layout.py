"""Recognize the layout of a tree of image files, from the counts of the files in its folders.

A layout says which folder is read, what the splits are, and which class an image belongs to. It is the same for a
folder and for the names inside an archive. Class folders are those of torchvision's ImageFolder: the first folder below
the root, whatever lies deeper.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Literal

from raysl.errors import counted
from raysl.ingestion.found import Found, LeftOut, join_names, printable
from raysl.ingestion.labels import composed
from raysl.ingestion.listing import IMAGE, NOTES, TABLE, Survey, join

Labels = Literal["auto", "folders", "none"]
# Returns the split to take of those that the source holds, or raises UserError.
Choose = Callable[[list[str]], str]

# Folders of pictures that are not the images: masks, depths, and what tools write beside the images.
_MASK = (
    r"(masks?|segmentations?|segmentation(class|object)(aug)?|trimaps?|ground_?truths?|gt|gt(fine|coarse)|"
    r"annotations?|labels?|labelids|depths?|disparit(y|ies))"
)
_THUMBNAILS = re.compile(r"(.*[_ -])?(thumb(nail)?s?|previews?)", re.IGNORECASE)
_MASKS = re.compile(rf"(?!(with|without|no|non)[_ -])(.*[_ -])?{_MASK}", re.IGNORECASE)
# What tools add to the name of an image for its mask, as in 0001_mask.png.
_SUFFIX = re.compile(rf"[_ -]{_MASK}([_ -].*)?", re.IGNORECASE)
_JPEG = (".jpg", ".jpeg")
# Folders beside which others hold masks, crops or depths of the same images.
_IMAGES = re.compile(r"images?|imgs?|jpegimages|rgb|(left|right)img8bit", re.IGNORECASE)
# Folders that hold images of any class.
_GENERIC = re.compile(
    r"(.*[_ -])?(images?|imgs?|jpegimages|rgb|photos?|pictures?|pics?|frames?|data|all|files?|jpe?gs?|pngs?)([_ -].*)?",
    re.IGNORECASE,
)
_OBJECTS = (
    "they name any number of objects in an image (Pascal VOC, COCO, YOLO), "
    "and a data set holds one class for each image"
)
_NOTES_OF_OBJECTS = re.compile(r"(coco|annotations?|instances|labels)[^/]*\.(json|xml)$")
_OTHER_PICTURES = "masks or other pictures of the same images"
BESIDE_CLASSES = "images beside the class folders"
_TRAIN = re.compile(r"train", re.IGNORECASE)
# The names that data sets give to their splits.
_SPLIT = r"train|training|trainval|test|testing|val|valid|validation|dev|unlabell?ed|extra"
_IS_SPLIT = re.compile(rf"({_SPLIT})[ _-]?(set|data|images?|\d+|[ab])?", re.IGNORECASE)
_ENDS_AS_SPLIT = re.compile(rf".*[ _-]({_SPLIT})", re.IGNORECASE)
# "data-00000-of-00002.arrow" is how Hugging Face names the files of every split.
_NUMBERED = re.compile(r"(?!data-|part-|shard-)([A-Za-z]\w*?)-\d+-of-\d+")
_STEM_OF_SPLIT = re.compile(r"(.*(?:train|test|val|valid|validation))\.\w+")
_NUMBER = re.compile(r"\d{5,}")


@dataclass
class Layout:
    """How the images of a tree of folders are read."""

    found: Found  # only the counts of the images are missing
    base: str = ""  # folder to read; "" is the root
    excluded: set[str] = field(default_factory=set)  # folders below it that are not read
    classes_in: str | None = None  # folder that holds the class folders; None if folders are no classes
    inner_split: str = ""  # split inside of every class folder; "" if there is none
    class_of: dict[str, str] | None = None  # class of an image by its composed path, for classes in a file
    masks_beside: Callable[[str], bool] | None = None  # True for 0001_mask.png beside 0001.png

    def excludes(self, folder: str) -> bool:
        """Return True if a folder is excluded, or lies below one that is."""
        while folder and folder not in self.excluded:
            folder = folder.rpartition("/")[0]
        return bool(folder)

    def label(self, path: str) -> str | None:
        """Return the class of an image. Raises Skip if it is not read, with the reason if it is still to be counted."""
        folder = path.rpartition("/")[0]
        if not is_within(folder, self.base) or self.excludes(folder):
            raise Skip
        if self.masks_beside and self.masks_beside(path):
            raise Skip(_OTHER_PICTURES)
        if self.class_of is not None:
            return self.class_of.get(composed(path))
        if self.classes_in is None:
            return None
        rest = path[len(self.classes_in) + 1 :] if self.classes_in else path
        name, *deeper = rest.split("/")
        if not deeper or (self.inner_split and deeper[0] != self.inner_split):
            raise Skip
        return name


class Skip(Exception):
    """The image is not read."""


def is_within(folder: str, parent: str) -> bool:
    """Return True if a folder is `parent` or lies below it."""
    return not parent or folder == parent or folder.startswith(f"{parent}/")


def recognize(survey: Survey, choose: Choose, labels: Labels, left_out: LeftOut) -> Layout:
    """Return the layout of a tree.

    Args:
        labels: "folders" takes the first folders as classes, whatever their names; "none" takes no labels.
        left_out: what the listing has left out.
    """
    found = Found("", left_out=left_out)
    layout = Layout(found)
    _descend(survey, layout, labels)
    splits, beside = _splits(survey, layout.base, labels)
    if splits:
        found.splits = tuple(splits)
        found.split = choose(splits)
        for name in beside:
            where = join(layout.base, name)
            left_out.add("images in folders beside the splits", survey.first(where), survey.images(where))
        if stray := survey.images(layout.base, direct=True):
            left_out.add("images beside the splits", survey.examples[layout.base, IMAGE], stray)
        layout.base = join(layout.base, found.split)
        _descend(survey, layout, labels)
    layout.masks_beside = _masks_beside(survey, layout.base) if labels != "folders" else None
    _classes(survey, layout, labels, choose)
    if not found.splits:
        choose([])
    left_out.update(survey.others())
    return layout


def _descend(survey: Survey, layout: Layout, labels: Labels) -> None:
    """Go down folders that only wrap others, and past folders of masks."""
    while True:
        base = layout.base
        children = _without_masks(survey, layout, labels, base)
        if survey.images(base, direct=True) or len(children) != 1:
            return
        only = join(base, children[0])
        holds_splits = bool(_splits(survey, only, labels)[0])
        # Archives are often unpacked into a folder of their own name, as train/train.
        again = children[0].lower() == base.rpartition("/")[2].lower()
        if (is_split(children[0]) and not again) or (survey.images(only, direct=True) and not holds_splits):
            return
        layout.base = only


def _without_masks(
    survey: Survey, layout: Layout, labels: Labels, folder: str, inside: bool = False
) -> list[str]:
    """Exclude the folders of masks inside a folder, and return the names of the others that hold images."""
    masks = _masks(survey, folder, labels, inside)
    for name in masks:
        where = join(folder, name)
        if where not in layout.excluded:
            layout.excluded.add(where)
            layout.found.left_out.add(_OTHER_PICTURES, survey.first(where), survey.images(where))
    return [name for name in survey.children(folder) if name not in masks]


def _exclude_below(survey: Survey, layout: Layout, labels: Labels, folders: list[str]) -> None:
    """Exclude the folders of masks at any depth below folders that may be classes."""
    while folders:
        kept = ((at, _without_masks(survey, layout, labels, at, inside=True)) for at in folders)
        folders = [join(at, name) for at, names in kept for name in names]


def _masks(survey: Survey, folder: str, labels: Labels, inside: bool = False) -> list[str]:
    """Return the folders inside a folder that hold masks or other pictures of the same images.

    A name is not enough, because a class may be called "surgical mask". The folder must lie beside a folder named like
    images; or its files must be named after images outside of it and not be JPEG, which does not keep the values of
    masks. Thumbnails may be JPEG.

    Args:
        inside: the folder may be a class. Beside its `images/`, others may hold more photos of it, as in cat/flickr;
            only those that are called like masks, or whose files are named after images as above, are returned.
    """
    if labels == "folders":
        return []
    children = survey.children(folder)
    named = [name for name in children if _MASKS.fullmatch(name) or _THUMBNAILS.fullmatch(name)]
    others = [name for name in children if name not in named]
    pictures = [name for name in others if _IMAGES.fullmatch(name)][:1]
    certain, unclear = list[str](), named
    if pictures:
        certain, unclear = named, [name for name in others if name not in pictures]
        if any(is_split(name) for name in children):
            return named
        if not inside:
            return named + unclear
    if not unclear:
        return certain
    deeper = [survey.first_below(join(folder, name)) for name in pictures or others]
    beside = chain(survey.first_paths.get(folder, []), *deeper)
    stems = {PurePosixPath(file).stem for file in beside}
    return certain + [name for name in unclear if _are_named_after(stems, survey, join(folder, name))]


def _are_named_after(stems: set[str], survey: Survey, folder: str) -> bool:
    """Return True if most files of a folder are named after images, and no JPEG but for thumbnails."""
    may_be_jpeg = bool(_THUMBNAILS.fullmatch(folder.rpartition("/")[2]))
    files = [PurePosixPath(file) for file in survey.first_below(folder)]
    kept = [file for file in files if may_be_jpeg or file.suffix.lower() not in _JPEG]
    same = [file for file in kept if file.stem in stems or _SUFFIX.sub("", file.stem) in stems]
    return 2 * len(same) > len(files)


def _image_of_mask(path: str) -> str:
    """Return the image, without its suffix, to which a mask belongs by its name; "" if the file is no mask."""
    file = PurePosixPath(path)
    stem = _SUFFIX.sub("", file.stem)
    is_mask = stem not in (file.stem, "") and file.suffix.lower() not in _JPEG
    return str(file.with_name(stem)) if is_mask else ""


def _masks_beside(survey: Survey, base: str) -> Callable[[str], bool] | None:
    """Return the function that recognizes masks, if at least a quarter of the files are masks of files beside them."""
    first = [path for at in survey.first_paths if is_within(at, base) for path in survey.first_paths[at]]
    stems = {str(PurePosixPath(path).with_suffix("")) for path in first}
    if not first or 4 * sum(_image_of_mask(path) in stems for path in first) < len(first):
        return None
    known = survey.all_files()
    stems = {str(PurePosixPath(file.path).with_suffix("")) for file in known or ()}
    return lambda path: bool(image := _image_of_mask(path)) and (known is None or image in stems)


def _splits(survey: Survey, base: str, labels: Labels) -> tuple[list[str], list[str]]:
    """Return the splits inside the base, and the other folders with images; nothing of either without splits."""
    masks = _masks(survey, base, labels)
    children = [name for name in survey.children(base) if name not in masks]
    for strictly in (True, False):
        named = [name for name in children if is_split(name, strictly)]
        training = [name for name in named if _TRAIN.search(name)]
        if named and (len(named) == len(children) or 0 < len(training) < len(named)):
            return named, [name for name in children if name not in named]
    return [], []


def _classes(survey: Survey, layout: Layout, labels: Labels, choose: Choose) -> None:
    """Decide where the labels come from."""
    found, base = layout.found, layout.base
    children = _without_masks(survey, layout, labels, base)
    direct = survey.images(base, direct=True)
    inside = sum(survey.images(join(base, name)) for name in children)
    example = printable(survey.first(join(base, children[0]) if children else base))
    where = f"{printable(base)!r}" if base else "the source"
    why = ""
    if labels == "none":
        why = "--labels none was given"
    elif not children:
        why = f"all images lie in one folder, as {example}"
    elif labels == "auto":
        if direct and 2 * direct >= inside:
            why = (
                f"{counted(direct, 'image')} {'lies' if direct == 1 else 'lie'} beside the folders in {where} "
                f"({printable(survey.examples[base, IMAGE])}), so "
                "the folders are not taken for classes; --labels folders takes them and leaves those images out"
            )
        elif len(children) == 1 and _GENERIC.fullmatch(children[0]):
            why = f"the only folder is called {printable(children[0])!r}, as {example}"
        elif all("JPEGImages" in survey.children(join(base, name)) for name in children):
            why = f"the folders are years or parts of Pascal VOC, as {example}"
        elif all(_NUMBER.fullmatch(name) for name in children) and _has_text(survey, base, children):
            why = f"the folders are numbered parts with a text for each image, as {example}"
    classes = [join(base, name) for name in children]
    if why:
        _exclude_below(survey, layout, labels, classes)
        found.layout = found.layout or "a folder of images"
        found.labels = f"none, because {why}{_unused(survey)}"
        return
    inner = [_without_masks(survey, layout, labels, at, inside=True) for at in classes]
    inner_splits = sorted(set(chain(*inner)))
    found.layout = "class folders" + (f" in the split {found.split!r}" if found.split else "")
    if all(inner) and all(map(is_split, inner_splits)) and len(inner_splits) > 1:
        found.splits = tuple(inner_splits)
        found.split = layout.inner_split = choose(inner_splits)
        found.layout = "class folders with splits inside"
        classes = [join(at, found.split) for at in classes]
    _exclude_below(survey, layout, labels, classes)
    example = printable(_first_read(survey, layout, classes[0])) or example
    if base and base != found.split:
        found.layout += f", in {printable(base)}/"
    layout.classes_in = base
    if direct:
        found.left_out.add(BESIDE_CLASSES, survey.examples[base, IMAGE], direct)
    found.labels = f"the folder of each image, as {example}"
    depth = base.count("/") + 1 if base else 0
    deeper = [at for at in survey.folders if at.count("/") > depth and is_within(at, base)]
    inside_classes = sum(survey.images(at, direct=True) > 0 and not layout.excludes(at) for at in deeper)
    if inside_classes and not layout.inner_split:
        found.labels = (
            f"the first folder of each image, as {example}; the folders inside class folders ({inside_classes:,}) give "
            "no labels"
        )
    found.labels += _same_inside(survey, layout, classes, join(base, children[0]))


def _same_inside(survey: Survey, layout: Layout, classes: list[str], first: str) -> str:
    """Return a sentence for class folders that all hold the same folders, as folds or splits of other names do."""
    inside = [[name for name in survey.children(at) if not layout.excludes(join(at, name))] for at in classes]
    if len(classes) < 2 or len(inside[0]) < 2 or any(names != inside[0] for names in inside):
        return ""
    return (
        f". Every class folder holds the same folders ({join_names(inside[0], 6)}): if these are the classes, give one "
        f"of the outer folders as the source, such as {printable(first)}"
    )


def _first_read(survey: Survey, layout: Layout, folder: str) -> str:
    """Return the first image below a folder that is in no folder of masks."""
    paths = sorted(survey.first_below(folder), key=lambda path: path.split("/"))
    some = [survey.first(folder), *paths]
    return next((path for path in some if not layout.excludes(path.rpartition("/")[0])), "")


def _has_text(survey: Survey, base: str, children: list[str]) -> bool:
    """Return True if there is a text or a JSON file for most images, as img2dataset writes."""
    folders = [join(base, name) for name in children]
    counts = [survey.folders.get(at, Counter()) for at in folders]
    notes = sum(max(count["text files"], count[NOTES]) for count in counts)
    return 2 * notes >= sum(map(survey.images, folders))


def _unused(survey: Survey) -> str:
    """Return a sentence about annotations and tables that are not used; "" without any."""
    for (_, kind), path in survey.examples.items():
        if kind == NOTES and _NOTES_OF_OBJECTS.search(path.lower()):
            return f". The annotations in {printable(path)} are not used: {_OBJECTS}"
    for folder, counts in survey.folders.items():
        notes = counts[NOTES] or counts["text files"]
        if notes and re.search(r"/(annotations?|labels)/", f"/{folder.lower()}/"):
            return f". The annotations in {printable(folder)}/ are not used: {_OBJECTS}"
    table = next((path for (_, kind), path in survey.examples.items() if kind == TABLE), "")
    if not table:
        return ""
    return (
        f". If {printable(table)} holds labels, give that table as the source, with --image-column and --label-column "
        "where its columns have names of their own"
    )


def is_split(name: str, strictly: bool = True) -> bool:
    """Return True for a name like "train", "Test" or "training_set", and, if not strictly, for one like "seg_train"."""
    return bool(_IS_SPLIT.fullmatch(name) or (not strictly and _ENDS_AS_SPLIT.fullmatch(name)))


def by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of every split, as the names of the files or of their folders state it; "" if they state none.

    "train-00000-of-00002.parquet", "imagenet-train-000017.tar" and "train/0000.parquet" are of the split "train".
    "mytrain.parquet" and "mytest.parquet" are two splits, too.
    """
    splits = {path: _split_of(path) for path in paths}
    if not any(splits.values()):
        stems = {path: _STEM_OF_SPLIT.fullmatch(path.rpartition("/")[2]) for path in splits}
        if all(stems.values()):
            splits = {path: match[1] for path, match in stems.items() if match}
    found: dict[str, list[str]] = {}
    for path in sorted(splits, key=splits.__getitem__):
        found.setdefault(splits[path], []).append(path)
    return found


def _split_of(path: str) -> str:
    if named := re.search(r"(?:^|/)split=([^/]+)/", path):
        return named[1]
    words = [*re.split(r"[-_.]", path.rpartition("/")[2]), PurePosixPath(path).parent.name]
    match = _NUMBERED.match(path.rpartition("/")[2])
    return match[1] if match else next((word for word in words if _IS_SPLIT.fullmatch(word)), "")
