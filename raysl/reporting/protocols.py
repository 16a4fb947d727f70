"""Write the page of the probes from their docstrings, primary metrics and Configs, and tables of flags in Markdown."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from raysl import probes
from raysl.config import defaults
from raysl.fields import hints, name_typed
from raysl.optim import OptimConfig
from raysl.probes import EncoderProbe, FeatureProbe, LabeledProbe

_INTRODUCTION = """A probe measures a frozen representation. Tables and sweeps show one of its numbers, the primary
metric. The same probe is run on the untrained backbone and on raw pixels, for comparison. A value depends on its
protocol: the version of the probe, the flags below and --bn-statistics. Values of different protocols never
share a table.

`knn` and `linear` are the probes that `raysl probe` runs by default. `finetune`, `semisup` and `detection` train the
whole network, so they take longer than probes of frozen features.

This page is generated from the code by `raysl methods --pages docs/methods`."""

_NEEDS = {
    LabeledProbe: "labeled features of each requested layer",
    FeatureProbe: "features of each requested layer, without labels",
    EncoderProbe: "images and the network itself",
}
_CHOSEN = "[chosen by raysl](../design.md#defaults-that-raysl-chooses)"
_LEARNS = " It learns from the train images, and refuses test images that are the same."
_OWN_IMAGES = (
    " `raysl probe` requires `--train` and `--test`, but this probe does not use them; give any data."
)
_OPTIMIZER = "optimizer"
_OF_OPTIMIZER = f"""## {_OPTIMIZER}

The flags of the optimizer, of the probes that train a network; `PROBE` is the name of the probe. Its section says
which defaults are others."""


def page() -> str:
    """Return the page in Markdown."""
    rows = [f"| [{name}](#{name}) | {_summary(name)} | {_needs(name)} |" for name in probes.names()]
    table = "\n".join(["| probe | what it measures | needs |", "|---|---|---|", *rows])
    sections = [section(name) for name in probes.names()]
    optimizer = f"{_OF_OPTIMIZER}\n\n{hyperparameters('PROBE.optim', OptimConfig())}"
    return "\n\n".join(["# Probes", _INTRODUCTION, table, *sections, optimizer]) + "\n"


def _summary(name: str) -> str:
    """Return the first paragraph of the docstring of a probe, in one line."""
    module = importlib.import_module(probes.config_type(name).__module__)
    return cell((inspect.getdoc(module) or "").partition("\n\n")[0])


def _needs(name: str) -> str:
    config_type, probe_type = probes.load(name)
    probe = probe_type(config_type())
    return next(what for kind, what in _NEEDS.items() if isinstance(probe, kind))


def section(name: str) -> str:
    """Return the section of one probe. Raises UserError if the name is unknown."""
    config_type, probe_type = probes.load(name)
    config = config_type()
    module = importlib.import_module(config_type.__module__)
    said = inspect.getdoc(module) or ""
    flags = [f"{flag} VALUE" for flag in probes.required(name)]
    usual = " ".join(["raysl probe RUN --train DATA --test DATA --probes", name, *flags])
    command = getattr(module, "COMMAND", usual)
    better = (
        "more is better"
        if probes.is_score(name)
        else "it is not a score: a higher value is not always better"
    )
    learns = _LEARNS if probes.learns(name) else ""
    own_images = _OWN_IMAGES if getattr(probe_type, "own_images", False) else ""
    lines = [
        f"- Primary metric: `{probe_type(config).primary_metric}`; {better}.",
        f"- Version of the protocol: {config_type.version}.",
        f"- Needs: {_needs(name)}.{learns}{own_images}",
    ]
    others = {probes.config_type(other): other for other in probes.names()}
    table = hyperparameters(name.replace("_", "-"), config, {**others, OptimConfig: _OPTIMIZER})
    return "\n\n".join([f"## {name}", said, f"```\n{command}\n```", "\n".join(lines), table])


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def hyperparameters(prefix: str, config: Any, sections: Mapping[type[Any], str] | None = None) -> str:
    """Return the fields of a Config as a table of flags, in Markdown.

    Args:
        prefix: the words before the first dot of a flag.
        config: the Config.
        sections: headings of the page by the Config that they describe. Where such a Config is a field, its row links
            to the heading and gives the values that are not the defaults there.
    """
    listed = _rows(prefix, config, sections or {})
    rows = [f"| `--{flag}` | {default} | {described} |" for flag, default, described in listed]
    return (
        "\n".join(["| flag | default | description |", "|---|---|---|", *rows]) if rows else "There are none."
    )


def _rows(prefix: str, config: Any, sections: Mapping[type[Any], str]) -> Iterator[tuple[str, str, str]]:
    """Yield (flag, default, description) of every field; the fields of a nested dataclass follow it."""
    described = _documented(type(config))
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        flag = f"{prefix}.{name_typed(name, hint)}"
        if heading := sections.get(type(value)):
            link = f"The flags are those of [{heading}](#{heading})."
            yield f"{flag}.*", _unusual(value), f"{cell(described[name])} {link}"
        elif dataclasses.is_dataclass(value):
            yield f"{flag}.*", "", cell(described[name])
            yield from _rows(flag, value, sections)
        else:
            default = f"`{value!r}`" if value in ("", ()) else f"`{value}`"
            chosen = f" or {_CHOSEN}" if flag.replace("-", "_") in defaults.CHOSEN else ""
            yield flag, f"{default}{chosen}", cell(described[name])


def _unusual(config: Any) -> str:
    """Return the fields of a Config that do not have the values of its class, in Markdown."""
    usual = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    differing = [name for name in names if getattr(config, name) != getattr(usual, name)]
    return ", ".join(f"`{name.replace('_', '-')} {_short(getattr(config, name))}`" for name in differing)


def _short(value: Any) -> str:
    """Return a value with at most four digits, and a tuple as a flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _documented(config_type: type[Any]) -> dict[str, str]:
    described: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        described.update(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    return described
