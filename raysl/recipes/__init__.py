"""Recipes: published runs at full scale, one file each, found by its name.

A file `recipes/foo_r50.py` describes the recipe "foo-r50" with

    def pretraining(data: str, run: str) -> Pretraining: ...

Its docstring names the source, the published result, the hardware that it needs, and where raysl does otherwise. Flags
beside `--recipe` override what it says.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from raysl.config import Pretraining
from raysl.errors import unknown


def names() -> list[str]:
    """Every recipe there is."""
    files = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in files)


def load(name: str, data: str, run: str) -> Pretraining:
    """The configuration of a recipe, on a data set and in a folder.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in names():
        raise unknown("recipe", name, names())
    config: Pretraining = _module(name).pretraining(data, run)
    return config


def summary(name: str) -> str:
    """The first sentence of a recipe's docstring."""
    return " ".join((inspect.getdoc(_module(name)) or "").partition("\n\n")[0].split())


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
