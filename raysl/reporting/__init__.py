"""Reports: one page of a sweep, or of runs side by side, made of what lies in their folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from raysl.errors import UserError
from raysl.reporting.page import ReportConfig
from raysl.storage import Folder
from raysl.tuning.journal import NAME as JOURNAL

__all__ = ["ReportConfig", "check_installed", "report"]


def check_installed() -> None:
    """Raises UserError when a package is missing that reports are made with."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"A report needs {' and '.join(missing)}, which is not installed. Install raysl[report]."
        )


def report(folders: str | Sequence[str], config: ReportConfig) -> Folder:
    """Writes the report of a sweep, finished or not, or of one or more runs, and returns where. The same sweep or runs
    give the same bytes.

    Args:
        folders: of one sweep; or of runs, or of other people's models that `raysl probe` has measured.
        config: see `ReportConfig`.

    Raises:
        UserError: there is neither sweep nor run, several sweeps are given, a package is missing, or the report cannot
            be written.
    """
    check_installed()
    places = [folders] if isinstance(folders, str) else list(folders)
    sweeps = [place for place in places if Folder(place).exists(JOURNAL)]
    if sweeps and len(places) > 1:
        raise UserError(
            f"The folder {sweeps[0]!r} holds a sweep, and {len(places)} folders were given. Give one sweep, or runs "
            "alone."
        )
    if sweeps:
        from raysl.reporting import sweep_page

        page, drawn = sweep_page.page(sweeps[0], config)
    else:
        from raysl.reporting import runs_page

        page, drawn = runs_page.page(places, config)
    out = Folder(config.out or ("report" if len(places) > 1 else f"{places[0].rstrip('/')}/report"))
    for figure in drawn:
        out.write(f"{figure.name}.png", figure.png)
    out.write("index.html", page.encode())
    return out
