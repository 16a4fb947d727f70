"""Write the page of the probes from their docstrings, primary metrics and Configs, and tables of flags in Markdown."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from raysl import probes
from raysl.config import defaults
from raysl.fields import hints, name_typed
from raysl.probes import EncoderProbe, FeatureProbe, LabelledProbe

_INTRODUCTION = """A probe measures a frozen representation. Tables and sweeps show one of its numbers, the primary
metric. The same probe is run on the untrained backbone and on raw pixels, for comparison. A value depends on its
protocol: the version of the probe, the flags below and --bn-statistics. Values of different protocols never
share a table.

This page is generated from the code by `raysl methods --pages docs/methods`."""

_NEEDS = {
    LabelledProbe: "labelled features of each requested layer",
    FeatureProbe: "features of each requested layer, without labels",
    EncoderProbe: "images and the network itself",
}
_LEARNS = " It learns from the train images, and refuses test images that are the same."


def page() -> str:
    """Return the page in Markdown."""
    sections = [section(name) for name in probes.names()]
    return "\n\n".join(["# Probes", _INTRODUCTION, *sections]) + "\n"


def section(name: str) -> str:
    """Return the section of one probe. Raises UserError if the name is unknown."""
    config_type, probe_type = probes.load(name)
    config = config_type()
    probe = probe_type(config)
    module = importlib.import_module(config_type.__module__)
    said = inspect.getdoc(module) or ""
    flags = [f"{flag} VALUE" for flag in probes.required(name)]
    usual = " ".join(["raysl probe RUN --train DATA --test DATA --probes", name, *flags])
    command = getattr(module, "COMMAND", usual)
    needs = next(what for kind, what in _NEEDS.items() if isinstance(probe, kind))
    better = "more is better" if probes.is_score(name) else "it is no score, and more is not always better"
    lines = [
        f"- Primary metric: `{probe.primary_metric}`; {better}.",
        f"- Version of the protocol: {config_type.version}.",
        f"- Needs: {needs}.{_LEARNS if probes.learns(name) else ''}",
    ]
    table = hyperparameters(name.replace("_", "-"), config)
    return "\n\n".join([f"## {name}", said, f"```\n{command}\n```", "\n".join(lines), table])


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
    described: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        described.update(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    return described
