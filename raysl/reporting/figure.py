"""What all figures of reports have in common. Equal data give equal bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure as Canvas

_COLUMNS = 3


@dataclass(frozen=True)
class Figure:
    """A picture and what it says.

    Args:
        name: of its file, without the ending.
        title: a heading.
        text: what is to be seen, with the numbers.
        png: the picture.
    """

    name: str
    title: str
    text: str
    png: bytes


def drawn(draw: Callable[[Any], None], width: float = 6.4) -> bytes:
    """PNG of what `draw` puts on one pair of axes."""

    def one(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        axes.grid(alpha=0.3)
        draw(axes)

    return _png(one, width, 4.0)


def panels(draws: Mapping[str, Callable[[Any], None]], shared: bool = False) -> bytes:
    """PNG of several pairs of axes, three in a row, each under its name.

    Args:
        draws: what goes onto each pair of axes, by name.
        shared: whether all have the same axes.
    """
    columns = min(_COLUMNS, len(draws))
    lines = math.ceil(len(draws) / columns)

    def all_of_them(canvas: Canvas) -> None:
        grid = canvas.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared).flatten()
        for axes, (title, draw) in zip(grid, draws.items(), strict=False):
            axes.grid(alpha=0.3)
            axes.set_title(title, fontsize=9)
            draw(axes)
        for axes in grid[len(draws) :]:
            axes.set_visible(False)

    return _png(all_of_them, 3.4 * columns + 0.8, 2.8 * lines + 0.3)


def _png(draw: Callable[[Canvas], None], width: float, height: float) -> bytes:
    """No date and no version in it."""
    with style.context("default"):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
