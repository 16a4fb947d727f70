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
from raysl.errors import MissingValueError, UserError
from raysl.objectives import Setup
from raysl.pretext import Geometry

# A run large enough that only the parts themselves can refuse it.
_IMAGE_SIZE, _NUM_IMAGES, _NUM_CLASSES, _WIDTH = 96, 1_000_000, 10, 8

_TITLE = "Methods: OBJECTIVE or OBJECTIVE-TRANSFORM; with '+' one transform after the other, with ',' several tasks"


def describe() -> list[Table]:
    """Return tables of the objectives, of the transforms, and of the methods that they make. They fit 80 columns."""
    usual = listing("Objectives, one file each", "objective", "description")
    experimental = listing("Experimental objectives", "objective", "description")
    combined = listing(_TITLE, "objective", "alone", "with a transform")
    for name in methods.objective_names():
        (experimental if methods.is_experimental(name) else usual).add_row(
            name, summary(methods.load_objective(name)[1])
        )
        fitting = [transform for transform in pretext.names() if combines(name, transform) == "yes"]
        every = "every one" if len(fitting) == len(pretext.names()) else ", ".join(fitting)
        combined.add_row(name, "yes" if combines(name, "") == "yes" else "no", every or "none")
    transforms = listing("Transforms, one file each", "transform", "description")
    for name in pretext.names():
        transforms.add_row(name, summary(pretext.load(name)[1]))
    return [usual, experimental, transforms, combined]


def listing(title: str, name: str, *others: str) -> Table:
    """Return an empty table without a frame, whose first column is never broken."""
    first = Column(name, no_wrap=True)
    return Table(first, *others, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


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
    except MissingValueError:
        return "yes"
    except UserError as error:
        return str(error).partition(". ")[0]
    return "yes"
