"""Draw figures of reports to PNG. Equal data give equal bytes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure as Canvas

_COLUMNS = 3
_TITLE_WIDTH = 40  # characters that fit above one of three panels


@dataclass(frozen=True)
class Figure:
    """A picture and its description."""

    name: str  # name of its file without the ending; `raysl.storage.escaping.file_name` makes it safe
    title: str  # heading above the picture
    text: str  # description of what it shows, with the numbers
    png: bytes  # the picture


def plot_png(draw: Callable[[Any], None], width: float = 6.4) -> bytes:
    """Return a PNG of one pair of axes that `draw` fills."""

    def fill(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        axes.grid(alpha=0.3)
        draw(axes)

    return _png(fill, width, 4.0)


def panels_png(draws: Mapping[str, Callable[[Any], None]]) -> bytes:
    """Return a PNG of several pairs of axes, three in a row, each with its title and filled by its function."""
    columns = min(_COLUMNS, len(draws))
    lines = math.ceil(len(draws) / columns)

    def fill(canvas: Canvas) -> None:
        grid = canvas.subplots(lines, columns, squeeze=False).flatten()
        for axes, (title, draw) in zip(grid, draws.items(), strict=False):
            axes.grid(alpha=0.3)
            axes.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize=9)
            draw(axes)
        for axes in grid[len(draws) :]:
            axes.set_visible(False)

    return _png(fill, 3.4 * columns + 0.8, 2.8 * lines + 0.3)


def _png(draw: Callable[[Canvas], None], width: float, height: float) -> bytes:
    """Return a PNG without a date or version, so that equal figures are equal bytes."""
    # Names are data: a dollar sign in one must not begin a formula.
    with style.context(["default", {"text.parse_math": False}]):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
