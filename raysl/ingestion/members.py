"""List the members of an archive: its images, and the labels and tables beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from raysl.errors import UserError
from raysl.ingestion import labels
from raysl.ingestion.found import LeftOut, join_names, printable
from raysl.ingestion.listing import HEAD_BYTES, HIDDEN, IMAGE, LABEL_TABLES, OTHER, VIDEO, is_hidden, kind_of
from raysl.ingestion.sources import ReadConfig
from raysl.stream.formats import looks_like_image

# Larger members are not taken into memory.
MOST_BYTES = 1 << 30
_MOST_LABEL_BYTES = 1 << 24
_LABELS = ("cls", "json")


class Member(NamedTuple):
    """A member of an archive: its name, the offset of its content (in a stream its number), and its size."""

    name: str
    offset: int
    size: int


@dataclass
class Listing:
    """The members of an archive, by kind. A sample is named by the name of its members without the suffix."""

    path: str
    format: str  # "tar", "stream" (a compressed tar, read from its beginning) or "zip"
    name: str
    images: dict[str, Member] = field(default_factory=dict)  # by name, in the order of the archive
    videos: dict[str, Member] = field(default_factory=dict)
    classes: dict[str, str | None] = field(default_factory=dict)  # label in `.cls` or `.json`, by sample
    in_cls: set[str] = field(default_factory=set)  # samples with a `.cls` member, which wins
    unusable: dict[str, str] = field(default_factory=dict)  # why the label of a sample cannot be used
    no_label: str = ""  # why the first `.json` member without a label has none
    tables: dict[str, bytes] = field(default_factory=dict)  # see `raysl.ingestion.metadata`
    left_out: LeftOut = field(default_factory=LeftOut)

    def take(self, member: Member, is_file: bool, content: Callable[[], bytes], config: ReadConfig) -> None:
        """Add a member to its kind, or count it as left out."""
        name, size = plain(member.name), member.size
        if not is_file:
            self.left_out.add("links and devices in archives", name)
        elif name.startswith("/") or ".." in name.split("/"):
            self.left_out.add("members with absolute paths or ..", name)
        elif is_hidden(name):
            self.left_out.add(HIDDEN, name)
        elif size > MOST_BYTES:
            self.left_out.add(f"members larger than {MOST_BYTES >> 20} MB", name)
        else:
            base = name.rpartition("/")[2]
            suffix = base.rpartition(".")[2].lower()
            kind = kind_of(name) or (f"members called .{suffix}" if "." in base else OTHER)
            small = size <= _MOST_LABEL_BYTES and config.labels == "auto"
            if kind == OTHER and looks_like_image(content()[:HEAD_BYTES]):
                kind = IMAGE
            if kind in (IMAGE, VIDEO):
                taken = self.images if kind == IMAGE else self.videos
                if taken.pop(name, None):
                    self.left_out.add("members replaced by later ones of the same name", name)
                taken[name] = member
            elif small and base in LABEL_TABLES:
                self.tables[name] = content()
            elif small and suffix in _LABELS:
                self._take_label(name, content(), config.label_column)
            elif suffix not in _LABELS:
                self.left_out.add(kind, name)

    def _take_label(self, name: str, data: bytes, wanted: str) -> None:
        """Read the label in a `.cls` or `.json` member. Raises UserError for an unexpected name in a `.cls`."""
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() == "cls":
            self.in_cls.add(stem)
        elif stem in self.in_cls:
            return
        self.classes.pop(stem, None)
        self.unusable.pop(stem, None)
        try:
            if suffix.lower() == "cls":
                label = labels.as_class_of_text(data.decode())
                if label is not None and not label.removeprefix("-").isdigit() and wanted != "cls":
                    raise UserError(
                        f"The member {printable(name)!r} of {self.name!r} holds {label[:80]!r}, and a .cls of "
                        "WebDataset holds the number of a class. Add --label-column cls to take such texts for the "
                        "names of classes, or --labels none."
                    )
                self.classes[stem] = label
            elif reason := self._take_json(stem, data, wanted, name):
                self.no_label = self.no_label or f"{printable(name)} {reason}"
        except labels.NoClassesError as error:
            self.unusable[stem] = f"{printable(name)} {error}"
        except ValueError as error:
            self.unusable[stem] = f"{printable(name)} is damaged: {error}"

    def _take_json(self, stem: str, data: bytes, wanted: str, name: str) -> str:
        """Read the label in the JSON of a sample. Return why it has none, or "". Raises as `labels.as_class`."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            return f"is damaged: {error}"
        if not isinstance(value, dict):
            return "holds no JSON object with named fields"
        column = wanted if wanted in value else labels.find(list(value), "", name)
        if not column:
            return f"has no label, its fields are {join_names(list(value))} (--label-column)"
        self.classes[stem] = labels.as_class(value[column])
        return ""


def plain(name: str) -> str:
    """Return the name of a member with "/" between its parts, also where Windows wrote "\\"."""
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./")
