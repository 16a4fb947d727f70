"""Write the fields of a configuration as a table of command-line flags in Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from raysl.config import defaults
from raysl.fields import hints, name_typed


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def hyperparameters(prefix: str, config: Any) -> str:
    """Return the fields of a Config as a table of flags, in Markdown."""
    rows = [f"| `--{flag}` | {default} | {described} |" for flag, default, described in _rows(prefix, config)]
    return (
        "\n".join(["| flag | default | description |", "|---|---|---|", *rows]) if rows else "There are none."
    )


def _rows(prefix: str, config: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (flag, default, description) of every field; the fields of a nested dataclass follow it."""
    described = _documented(type(config))
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        flag = f"{prefix}.{name_typed(name, hint)}"
        if dataclasses.is_dataclass(value):
            yield f"{flag}.*", "", cell(described[name])
            yield from _rows(flag, value)
        else:
            default = f"`{value!r}`" if value in ("", ()) else f"`{value}`"
            chosen = flag.replace("-", "_") in defaults.CHOSEN
            yield flag, "(chosen from the data)" if chosen else default, cell(described[name])


def _documented(config_type: type[Any]) -> dict[str, str]:
    """Return the description of each field from the docstrings of a Config and its bases."""
    described: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        described.update(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    return described
