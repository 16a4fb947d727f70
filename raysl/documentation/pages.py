"""One page of documentation for each objective and each transform, made of its docstring, its Config and its views."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import io
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from raysl import methods, objectives, pretext, recipes
from raysl.augment import recipe
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.documentation import combinations, pictures
from raysl.errors import Unset
from raysl.model import DataFacts, Model
from raysl.storage import Folder
from raysl.stream.views import View

# Of the pictures: any data set of photographs would need a licence, and these are drawn on the spot.
DATA = "shapes:64?size=96"
_VIEW = ViewConfig(image_size=96)
_IMAGES = 3
_NUM_IMAGES, _NUM_CLASSES = 1_000_000, 10

_INTRODUCTION = (
    "A method is an objective and, where it needs one, a transform, joined by name as in `pirl-jigsaw`.\n"
    "These pages are made from the code, by `raysl methods --pages docs/methods`."
)

# The page that `raysl.documentation.protocols` makes.
PROBES = "probes"
_PROBES = f"What each probe measures, and its protocol: [{PROBES}]({PROBES}.md)."

_SEEN = f"As `raysl views --method {{method}}` draws it, of `{DATA}` and with `--view.image-size {_VIEW.image_size}`."

# With what a part is shown: the first of these, and then of all, that combine with it.
_FIRST_TRANSFORMS = ("", "jigsaw")
_FIRST_OBJECTIVES = ("predict", "cpc", "pirl")


def names() -> list[str]:
    """Every objective, then every transform."""
    return [*methods.objective_names(), *pretext.names()]


def write(folder: Path, dataset: DataSet) -> None:
    """Writes all pages, that of the probes, their index and their pictures; makes the folder.

    Args:
        folder: where.
        dataset: whose images are shown.

    Raises:
        UserError: the place cannot be written.
    """
    from raysl.documentation import protocols  # is made of parts of this file

    place = Folder(str(folder))
    place.write("README.md", index().encode())
    place.write(f"{PROBES}.md", protocols.page().encode())
    for name in names():
        write_part(place, name, dataset)


def write_part(place: Folder, name: str, dataset: DataSet) -> None:
    """Writes the page and the picture of one objective or transform; see `write`."""
    place.write(f"{name}.md", page(name).encode())
    data = io.BytesIO()
    sheet = pictures.views_sheet(dataset, _views(typical_method(name)), count=_IMAGES)
    # 256 colours show what there is to see, in a third of the bytes.
    sheet.quantize(256).save(data, "PNG", optimize=True)
    place.write(f"{name}.png", data.getvalue())


def index() -> str:
    """The page that lists the others, in Markdown."""
    lines = ["# Methods", "", _INTRODUCTION, ""]
    for title, parts in (("Objectives", methods.objective_names()), ("Transforms", pretext.names())):
        rows = [
            f"| [{name}]({name}.md) | {cell(_docstring(name).partition(chr(10) * 2)[0])} |" for name in parts
        ]
        lines += [f"## {title}", "", "| name | what it is |", "|---|---|", *rows, ""]
    rows = [f"| `{name}` | {cell(recipes.summary(name))} |" for name in recipes.names()]
    lines += ["## Recipes", "", "`raysl pretrain --recipe NAME` is a published run at full scale.", ""]
    lines += ["| name | what it reproduces |", "|---|---|", *rows, ""]
    return "\n".join([*lines, "## Probes", "", _PROBES, ""])


def page(name: str) -> str:
    """The page of an objective or a transform, in Markdown.

    Raises:
        UserError: there is no part of that name.
    """
    summary, _, rest = _docstring(name).partition("\n\n")
    method = typical_method(name)
    usual = f"raysl pretrain --data DATA --run RUN --method {method}"
    sections = [
        f"# {name}",
        summary,
        rest,
        f"```\n{getattr(_module(name), 'COMMAND', usual)}\n```",
        f"## What the network sees\n\n![Images and their views]({name}.png)\n\n{_SEEN.format(method=method)}",
        "## Hyperparameters\n\n" + _dials(name),
        "## Combines with\n\n" + _partners(name),
    ]
    used = [r for r in recipes.names() if name in recipes.load(r, "", "").parts]
    if used:
        listed = "\n".join(f"- `--recipe {r}`: {recipes.summary(r)}" for r in used)
        sections.append(f"## Recipes\n\n{listed}")
    return "\n\n".join(section for section in sections if section) + "\n"


def typical_method(name: str) -> str:
    """The method by which a part is shown: with the first partner that it combines with."""
    if name in methods.objective_names():
        found = [t for t in (*_FIRST_TRANSFORMS, *pretext.names()) if _answer(name, t) == "yes"]
        return f"{name}-{found[0]}".rstrip("-")
    return next(
        f"{o}-{name}" for o in (*_FIRST_OBJECTIVES, *methods.objective_names()) if _answer(o, name) == "yes"
    )


def _views(method: str) -> dict[str, View]:
    """The views of a method; the ordinary one where the method needs a file of the user's before it can be made."""
    backbone = methods.example_backbone(methods.parse(method).objective)
    config = Pretraining("", "", method, view=_VIEW, backbone=backbone)
    try:
        return Model(config, DataFacts(_NUM_IMAGES, _NUM_CLASSES)).views()
    except Unset:
        geometry = pretext.Geometry(_VIEW.image_size, _VIEW.min_scale)
        return {"image": View(pretext.build("identity", {}, geometry), recipe(_VIEW.recipe))}


@functools.cache
def _answer(objective: str, transform: str) -> str:
    return combinations.combines(objective, transform)


def _module(name: str) -> ModuleType:
    package = objectives if name in methods.objective_names() else pretext
    return importlib.import_module(f"{package.__name__}.{name}")


def _docstring(name: str) -> str:
    return inspect.getdoc(_module(name)) or ""


def cell(text: str) -> str:
    """Text in a cell of a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _dials(name: str) -> str:
    load = methods.load_objective if name in methods.objective_names() else pretext.load
    return hyperparameters(name, load(name)[0]())


def hyperparameters(prefix: str, config: Any) -> str:
    """The fields of a Config as a table of flags, in Markdown.

    Args:
        prefix: what stands before the fields on the command line.
        config: whose values are the defaults.
    """
    rows = [
        f"| `--{flag}` | {f'`{default}`' if default else ''} | {said} |"
        for flag, default, said in _rows(prefix, config)
    ]
    return (
        "\n".join(["| flag | default | what it is |", "|---|---|---|", *rows]) if rows else "There are none."
    )


def _rows(prefix: str, config: Any) -> Iterator[tuple[str, str, str]]:
    """Flag, default and what it is, of every field; a field of several values is followed by them."""
    said = _documented(type(config))
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"{prefix}.{_flag(field.name, hints[field.name])}"
        if dataclasses.is_dataclass(value):
            yield f"{flag}.*", "", cell(said[field.name])
            yield from _rows(flag, value)
        else:
            yield flag, _default(value), cell(said[field.name])


def _default(value: Any) -> str:
    return repr(value) if value in ("", ()) else str(value)


def _documented(config_type: type[Any]) -> dict[str, str]:
    """What the docstrings of a Config and its bases say of each field."""
    said: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        said.update(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    return said


def _flag(field: str, hint: Any) -> str:
    """As on the command line, where a field may have a name of its own."""
    named = [m.name for m in getattr(hint, "__metadata__", ()) if getattr(m, "name", None)]
    return (named[0] if named else field).replace("_", "-")


def _partners(name: str) -> str:
    """What makes a method with a part, and why the rest does not."""
    if name in methods.objective_names():
        answers = {f"{name}-{t}".rstrip("-"): _answer(name, t) for t in ("", *pretext.names())}
    else:
        answers = {f"{o}-{name}": _answer(o, name) for o in methods.objective_names()}
    lines = ["Methods: " + ", ".join(f"`{m}`" for m, answer in answers.items() if answer == "yes") + "."]
    reasons: dict[str, list[str]] = {}
    for method, answer in answers.items():
        reasons.setdefault(answer, []).append(f"`{method}`")
    lines += [
        f"- not {', '.join(found)}: {reason.rstrip('.')}."
        for reason, found in reasons.items()
        if reason != "yes"
    ]
    return "\n".join([lines[0], *([""] if lines[1:] else []), *lines[1:]])
