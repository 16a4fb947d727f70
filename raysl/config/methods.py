"""Look up methods by name: an objective and, where it needs one, a pretext transform."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from raysl import plugins, pretext
from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError, unknown


@dataclass(frozen=True)
class Method:
    """The parts of a name such as "pirl-jigsaw", "pirl-rotation+jigsaw" or "multitask-rotation,jigsaw"."""

    objective: str  # the part before the first "-"
    # The transforms: "+" applies one after the other, "," separates tasks; empty without transforms.
    pretext: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks: transforms, or compositions of them."""
        return tuple(self.pretext.split(",")) if self.pretext else ()

    @property
    def transforms(self) -> tuple[str, ...]:
        """Return the names of all transforms."""
        return tuple(_split(self.pretext))

    def config_types(self) -> dict[str, type[Any]]:
        """Return the Config classes of the objective and the transforms by name."""
        types = {self.objective: objective_config_type(self.objective)}
        types.update({name: pretext.config_type(name) for name in self.transforms})
        return types


def objective_names() -> list[str]:
    """Return the names of all objectives."""
    return plugins.names(plugins.OBJECTIVES)


def is_experimental(objective: str) -> bool:
    """Return True if the use of an objective is not shown yet; see `raysl.experimental`."""
    return plugins.is_experimental(plugins.OBJECTIVES, objective)


def objective_config_type(name: str) -> type[Any]:
    """Return the Config of an objective. Raises UserError when there is none of that name."""
    return plugins.config_type(plugins.OBJECTIVES, name, "objective")


def load_objective(name: str) -> tuple[type[Any], type[Any]]:
    """Return the Config and the class of an objective. Raises UserError when there is none of that name."""
    return plugins.load(plugins.OBJECTIVES, name, "objective")


def example_backbone(objective: str) -> BackboneConfig:
    """Return a backbone that an objective can use: its class attribute `example_backbone`, otherwise "small"."""
    found: BackboneConfig = getattr(load_objective(objective)[1], "example_backbone", BackboneConfig())
    return found


def parse(name: str) -> Method:
    """Parse the name of a method.

    Raises:
        UserError: the objective or a transform does not exist.
    """
    objective, _, transforms = name.strip().partition("-")
    if objective not in objective_names():
        if {*name.split("+")} <= {*pretext.names()}:
            raise UserError(
                f"The method {name!r} lacks an objective. Write 'predict-{name}' to predict what the transform did, or "
                f"'pirl-{name}' for features that do not depend on it; `raysl methods` lists what fits together."
            )
        known = [o + t for o in objective_names() for t in ("", *(f"-{name}" for name in pretext.names()))]
        raise unknown("method", name, known, objective_names())
    for transform in filter(None, _split(transforms)):
        pretext.config_type(transform)
    if "" in _split(transforms):
        raise UserError(f"The method {name!r} has an empty transform. Write it as in 'pirl-rotation+jigsaw'.")
    method = Method(objective, transforms)
    if len(method.tasks) > 1 and not getattr(load_objective(objective)[1], "several", False):
        raise UserError(
            f"The method {name!r} names {len(method.tasks)} tasks and {objective!r} takes one. Write "
            f"'multitask-{transforms}', or join the transforms with '+' to apply one after the other."
        )
    if len(set(method.tasks)) < len(method.tasks):
        raise UserError(
            f"The method {name!r} names a task twice. Name each once; --multitask.weights sets their frequency."
        )
    return method


def _split(transforms: str) -> list[str]:
    return re.split("[+,]", transforms) if transforms else []
