"""The values that a sweep gives a field which is not told otherwise. They stand in the annotation of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Values worth trying, as in `temperature: Annotated[float, Range((0.05, 0.1, 0.2), log=True)] = 0.07`.

    A field without one has a range all the same where its type names its values: a Literal or a bool.

    Args:
        values: of a grid, in order. Between the least and the greatest number of them others are drawn.
        log: whether ratios matter rather than differences, in drawing and in figures.
        live: whether the value may change in the middle of a run, as population based training does.
    """

    values: tuple[Any, ...]
    log: bool = False
    live: bool = False
