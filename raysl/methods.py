"""Methods by name: an objective, and where it needs one a pretext transform. Both are found by their file name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from raysl import plugins, pretext
from raysl.errors import UserError, unknown


@dataclass(frozen=True)
class Method:
    """A name such as "pirl-jigsaw", "pirl-rotation+jigsaw" or "multitask-rotation,jigsaw", taken apart.

    Args:
        objective: what stands before the first "-".
        pretext: transforms joined by "+" are applied one after the other, and by "," stand beside each other; empty
            when the method names none.
    """

    objective: str
    pretext: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """What stands beside each other."""
        return tuple(self.pretext.split(",")) if self.pretext else ()

    @property
    def transforms(self) -> tuple[str, ...]:
        """Every transform."""
        return tuple(_split(self.pretext))

    def config_types(self) -> dict[str, type[Any]]:
        """The Config classes of the parts, by their names."""
        types = {self.objective: objective_config_type(self.objective)}
        types.update({name: pretext.config_type(name) for name in self.transforms})
        return types


def objective_names() -> list[str]:
    """Return the names of all objectives."""
    return plugins.names(plugins.OBJECTIVES)


def objective_config_type(name: str) -> type[Any]:
    """Return the Config of an objective. Raises UserError when there is none of that name."""
    return plugins.config_type(plugins.OBJECTIVES, name, "objective")


def load_objective(name: str) -> tuple[type[Any], type[Any]]:
    """Return the Config and the class of an objective. Raises UserError when there is none of that name."""
    return plugins.load(plugins.OBJECTIVES, name, "objective")


def parse(name: str) -> Method:
    """Takes the name of a method apart.

    Raises:
        UserError: the objective or a transform does not exist.
    """
    objective, _, transforms = name.strip().partition("-")
    if objective not in objective_names():
        known = [o + t for o in objective_names() for t in ("", *(f"-{name}" for name in pretext.names()))]
        raise unknown("method", name, known)
    for transform in filter(None, _split(transforms)):
        pretext.config_type(transform)
    if "" in _split(transforms):
        raise UserError(f"The method {name!r} has an empty transform. Write them as 'pirl-rotation+jigsaw'.")
    method = Method(objective, transforms)
    if len(method.tasks) > 1 and not getattr(load_objective(objective)[1], "several", False):
        raise UserError(
            f"The method {name!r} names {len(method.tasks)} tasks, and {objective!r} takes one. Write "
            f"'multitask-{transforms}', or join transforms with '+' to apply one after the other."
        )
    if len(set(method.tasks)) < len(method.tasks):
        raise UserError(
            f"The method {name!r} names a task twice. Give each once; --multitask.weights weighs them."
        )
    return method


def _split(transforms: str) -> list[str]:
    return re.split("[+,]", transforms) if transforms else []
