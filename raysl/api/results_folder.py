"""Check the folder of results before anything slow starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raysl.errors import UserError

if TYPE_CHECKING:
    from raysl.config import Pretraining


def check_results(config: Pretraining, out: str, trains: bool) -> None:
    """Raise UserError if a run, or the results in `out` instead, would lie among its images or cannot be written.

    A finished run need not be written.
    """
    from raysl.run import Run

    _check_outside(config.data, out, config.run)
    if trains and not (not out and (begun := Run.find(config.run)) and begun.is_finished()):
        check_writable(out or config.run)


def check_writable(folder: str) -> None:
    """Raise UserError if files cannot be written into a folder; "" stands for none."""
    from raysl.storage import Folder

    if folder:
        Folder(folder).check_writable()


def _check_outside(data: str, out: str, run: str) -> None:
    """Raise UserError if a new run, or the results in `out` instead, would lie among the images of a folder.

    They would be taken for a class.
    """
    from raysl.dataset import DataSet
    from raysl.storage import Folder

    flag, results = ("--out", out) if out else ("--run", run)
    source, place = (Path(Folder(one).uri) for one in (data.partition("#")[0], results))
    has_content = place.is_dir() and any(place.iterdir())  # That it holds a run is checked elsewhere.
    if results == "-" or DataSet.exists_at(data) or not source.is_dir() or has_content:
        return
    if place.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{flag} is {results!r}, a folder among the images of --data {data!r}, where it would be read as images "
            f"the next time. Give {flag} a folder outside of it, such as "
            f"{source.resolve().parent / 'runs' / place.name}."
        )
