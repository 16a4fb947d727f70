"""Write the page of the probes from their docstrings, primary metrics and Configs."""

from __future__ import annotations

import importlib
import inspect

from raysl import probes
from raysl.probes import EncoderProbe, FeatureProbe, LabelledProbe, Probe
from raysl.reporting.hyperparameters import hyperparameters

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
    """Return the section of one probe.

    Raises:
        UserError: the name is unknown.
    """
    config_type, probe_type = probes.load(name)
    config = config_type()
    probe = probe_type(config)
    module = importlib.import_module(config_type.__module__)
    said = inspect.getdoc(module) or ""
    flags = [f"{flag} VALUE" for flag in probes.required(name)]
    usual = " ".join(["raysl probe RUN --train DATA --test DATA --probes", name, *flags])
    command = getattr(module, "COMMAND", usual)
    better = "more is better" if probes.is_score(name) else "it is no score, and more is not always better"
    lines = [
        f"- Primary metric: `{probe.primary_metric}`; {better}.",
        f"- Version of the protocol: {config_type.version}.",
        f"- Needs: {needs(probe)}.{_LEARNS if probes.learns(name) else ''}",
    ]
    table = hyperparameters(name.replace("_", "-"), config)
    return "\n\n".join([f"## {name}", said, f"```\n{command}\n```", "\n".join(lines), table])


def needs(probe: Probe) -> str:
    """Return the inputs of a probe in words."""
    return next(what for kind, what in _NEEDS.items() if isinstance(probe, kind))
