"""List objectives, transforms and their combinations as tables."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

import torch
from rich import box
from rich.table import Column, Table

from raysl import pretext
from raysl.backbone import network
from raysl.config import methods
from raysl.errors import Unset, UserError
from raysl.objectives import Setup
from raysl.pretext import Geometry

# A run large enough that only the parts themselves can refuse it.
_IMAGE_SIZE, _NUM_IMAGES, _NUM_CLASSES, _WIDTH = 96, 1_000_000, 10, 8

_TITLE = "Methods: OBJECTIVE or OBJECTIVE-TRANSFORM; with '+' one transform after the other, with ',' several tasks"


def describe() -> list[Table]:
    """Return tables of the parts, of the combinations, and of the reasons why others do not combine."""
    parts = Table("part", "name", "description", title="Parts, one file each", show_lines=False)
    for name in methods.objective_names():
        kind = "experimental objective" if methods.is_experimental(name) else "objective"
        parts.add_row(kind, name, summary(methods.load_objective(name)[1]))
    for name in pretext.names():
        parts.add_row("transform", name, summary(pretext.load(name)[1]))
    # Fits 80 columns with every name whole.
    columns = (Column(name, overflow="fold") for name in methods.objective_names())
    first = Column("transform", no_wrap=True)
    grid = Table(first, *columns, title=_TITLE, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    reasons: dict[str, list[str]] = {}
    for transform in ("", *pretext.names()):
        answers = {name: combines(name, transform) for name in methods.objective_names()}
        grid.add_row(transform or "(none)", *("yes" if a == "yes" else "-" for a in answers.values()))
        for objective, answer in answers.items():
            if answer != "yes":
                reasons.setdefault(answer, []).append(f"{objective}-{transform}".rstrip("-"))
    why = Table("why not", "methods", title="What does not combine")
    for reason, refused in reasons.items():
        why.add_row(reason, ", ".join(refused))
    return [parts, grid, why]


def summary(part: type[object]) -> str:
    """Return the first paragraph of the file that defines a class, in one line."""
    docstring = inspect.getdoc(importlib.import_module(part.__module__)) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


_transform = cache(lambda name, geometry: pretext.build(name, {}, geometry))
_skeleton = cache(network.skeleton)


def combines(objective: str, transform: str) -> str:
    """Return "yes", or the reason why an objective and a transform ("" for none) do not combine."""
    config_type, objective_type = methods.load_objective(objective)
    geometry = Geometry(_IMAGE_SIZE, 0.2, objective_type.predicts)
    try:
        setup = Setup(
            pretext=_transform(transform, geometry) if transform else None,
            identity=_transform("identity", geometry),
            width=_WIDTH,
            num_images=_NUM_IMAGES,
            num_classes=_NUM_CLASSES,
            seed=0,
            backbone=_skeleton(methods.example_backbone(objective)),
        )
        with torch.device("meta"):
            objective_type(config_type(), setup)
    except Unset:
        return "yes"
    except UserError as error:
        return str(error).partition(". ")[0]
    return "yes"
