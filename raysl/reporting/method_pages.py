"""Write a page of documentation for each objective and transform from its docstring, Config and views."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
from pathlib import Path
from types import ModuleType
from typing import Any

from raysl import pretext
from raysl.augment import recipe
from raysl.config import Pretraining, ViewConfig, methods
from raysl.dataset import DataSet
from raysl.errors import MissingValueError
from raysl.model import DatasetInfo, Model
from raysl.reporting import combinations, pictures, protocols
from raysl.reporting.protocols import cell, hyperparameters
from raysl.storage import Folder
from raysl.stream.views import View
from raysl.training import recipes

# Images of the pictures; a data set of photographs would need a license.
DATA, CLIPS = "shapes:64?size=96", "clips:64?size=96"
_VIEW = ViewConfig(image_size=96)
_IMAGES = 3
_NUM_IMAGES, _NUM_CLASSES = 1_000_000, 10

_INTRODUCTION = (
    "A method is an objective and, if it needs one, a transform, joined by name as in `pirl-jigsaw`.\n"
    "These pages are generated from the code by `raysl methods --pages docs/methods`."
)

_EXPERIMENTAL = (
    "Experimental: no run of this objective in `results/` is clearly better by kNN than the untrained backbone. It may "
    "change or be removed in any version."
)

PROBES = "probes"
_RECIPES = (
    "`raysl pretrain --recipe NAME` takes the hyperparameters of a published run. The accuracies are the published",
    "ones; raysl has not run these recipes.",
)
_COMBINED = (
    "`raysl pretrain` refuses other combinations and says why. Several transforms may be joined: `rotation+jigsaw` "
    "applies\none after the other, and `multitask-rotation,jigsaw` names several tasks."
)
_REFUSED = "[All combinations](README.md#combinations)."
_PROBES = f"Measurements and protocols of the probes: [{PROBES}]({PROBES}.md)."

_SEEN = (
    f"Drawn by `raysl views --method {{method}}` from `{{data}}` with `--view.image-size {_VIEW.image_size}`."
)

# A part is shown with the first of these, and then of all, that combines with it.
_FIRST_TRANSFORMS = ("", "jigsaw")
_FIRST_OBJECTIVES = ("predict", "cpc", "pirl")


def names() -> list[str]:
    """Return the names of all objectives, then of all transforms."""
    return [*methods.objective_names(), *pretext.names()]


def write(folder: Path, images: DataSet, clips: DataSet) -> None:
    """Write all pages with their pictures, the page of the probes, and an index; make the folder.

    The pictures show `images`, or `clips` for methods that learn from them. Raises UserError if the folder cannot be
    written.
    """
    place = Folder(str(folder))
    place.write("README.md", index().encode())
    place.write(f"{PROBES}.md", protocols.page().encode())
    for name in names():
        write_part(place, name, clips if _data(typical_method(name)) == CLIPS else images)


def write_part(place: Folder, name: str, dataset: DataSet) -> None:
    """Write the page and the picture of one objective or transform."""
    place.write(f"{name}.md", page(name).encode())
    data = io.BytesIO()
    grid = pictures.views_grid(dataset, _views(typical_method(name)), count=_IMAGES)
    # 256 colors are enough, and take a third of the bytes.
    grid.quantize(256).save(data, "PNG", optimize=True)
    place.write(f"{name}.png", data.getvalue())


def index() -> str:
    """Return the index page in Markdown."""
    lines = ["# Methods", "", _INTRODUCTION, ""]
    for title, parts in (("Objectives", methods.objective_names()), ("Transforms", pretext.names())):
        rows = []
        for name in parts:
            status = "Experimental. " if methods.is_experimental(name) else ""
            rows.append(f"| [{name}]({name}.md) | {status}{cell(combinations.summary(_load(name)[1]))} |")
        lines += [f"## {title}", "", "| name | description |", "|---|---|", *rows, ""]
    lines += ["## Combinations", "", _COMBINED, "", *_combinations(), ""]
    rows = [f"| `{name}` | {cell(recipes.summary(name))} |" for name in recipes.names()]
    lines += ["## Recipes", "", *_RECIPES, ""]
    lines += ["| name | what it reproduces |", "|---|---|", *rows, ""]
    return "\n".join([*lines, "## Probes", "", _PROBES, ""])


def page(name: str) -> str:
    """Return the page of an objective or a transform in Markdown. Raises UserError if the name is unknown."""
    summary, _, rest = (inspect.getdoc(_module(name)) or "").partition("\n\n")
    method = typical_method(name)
    usual = f"raysl pretrain --data DATA --run RUN --method {method}"
    sections = [
        f"# {name}",
        summary,
        _EXPERIMENTAL if methods.is_experimental(name) else "",
        rest,
        f"```\n{getattr(_module(name), 'COMMAND', usual)}\n```",
        f"## Views\n\n![Images and their views]({name}.png)\n\n{_SEEN.format(method=method, data=_data(method))}",
        "## Hyperparameters\n\n" + hyperparameters(name.replace("_", "-"), _load(name)[0]()),
        "## Combines with\n\n" + _partners(name),
    ]
    used = [r for r in recipes.names() if name in recipes.load(r, "", "").parts]
    if used:
        listed = "\n".join(f"- `--recipe {r}`: {recipes.summary(r)}" for r in used)
        sections.append(f"## Recipes\n\n{listed}")
    return "\n\n".join(section for section in sections if section) + "\n"


def typical_method(name: str) -> str:
    """Return the method that shows a part: the part with the first partner that it combines with."""
    if name in methods.objective_names():
        found = [t for t in (*_FIRST_TRANSFORMS, *pretext.names()) if _answer(name, t) == "yes"]
        return f"{name}-{found[0]}".rstrip("-")
    own = getattr(_load(name)[1], "example_objective", None)
    if own is not None:
        return f"{own}-{name}"
    return next(
        f"{o}-{name}" for o in (*_FIRST_OBJECTIVES, *methods.objective_names()) if _answer(o, name) == "yes"
    )


def _views(method: str) -> dict[str, View]:
    """Return the views of a method, or an ordinary view if the method needs a file of the user."""
    backbone = methods.example_backbone(methods.parse(method).objective)
    config = Pretraining("", "", method, view=_VIEW, backbone=backbone)
    try:
        return Model(config, DatasetInfo(_NUM_IMAGES, _NUM_CLASSES)).views()
    except MissingValueError:
        geometry = pretext.Geometry(_VIEW.image_size, _VIEW.min_scale)
        return {"image": View(pretext.build("identity", {}, geometry), recipe(_VIEW.recipe))}


_answer = functools.cache(combinations.combines)


@functools.cache
def _data(method: str) -> str:
    return CLIPS if any(view.of_clips for view in _views(method).values()) else DATA


def _module(name: str) -> ModuleType:
    return importlib.import_module(_load(name)[1].__module__)


def _load(name: str) -> tuple[Any, Any]:
    return methods.load_objective(name) if name in methods.objective_names() else pretext.load(name)


def _partners(name: str) -> str:
    """Return the methods that contain a part."""
    if name in methods.objective_names():
        found = [f"{name}-{t}".rstrip("-") for t in ("", *pretext.names()) if _answer(name, t) == "yes"]
    else:
        found = [f"{o}-{name}" for o in methods.objective_names() if _answer(o, name) == "yes"]
    return f"Methods: {', '.join(f'`{method}`' for method in found)}. {_REFUSED}"


def _combinations() -> list[str]:
    """Return a table of the objectives and of what they combine with, in Markdown."""
    rows = []
    for name in methods.objective_names():
        fitting = [t for t in pretext.names() if _answer(name, t) == "yes"]
        every = "every one" if len(fitting) == len(pretext.names()) else ", ".join(fitting) or "none"
        rows.append(f"| {name} | {'yes' if _answer(name, '') == 'yes' else 'no'} | {every} |")
    return ["| objective | alone | with a transform |", "|---|---|---|", *rows]
