"""Recipes: published runs at full scale, one file each, found by name.

A file `recipes/foo_r50.py` describes the recipe "foo-r50" with

    CONFIG = Pretraining("", "", ...)

or the same by `resnet50` of `_imagenet`. Its docstring names the source, the published result, the hardware that it
needs, and the differences of raysl. Flags beside `--recipe` override its values.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import ModuleType

from raysl import plugins
from raysl.config import Pretraining
from raysl.errors import unknown


def names() -> list[str]:
    """Return the names of all recipes."""
    return [name.replace("_", "-") for name in plugins.names(__name__)]


def load(name: str, data: str, run: str) -> Pretraining:
    """Return the configuration of a recipe, on a data set and in a folder.

    Raises:
        UserError: there is no recipe of that name.
    """
    config: Pretraining = _module(name).CONFIG
    return replace(config, data=data, run=run)


def summary(name: str) -> str:
    """Return the first sentence of a recipe's docstring."""
    return " ".join((inspect.getdoc(_module(name)) or "").partition("\n\n")[0].split())


def _module(name: str) -> ModuleType:
    if name not in names():
        raise unknown("recipe", name, names())
    return plugins.module(__name__, name.replace("-", "_"), "recipe")
