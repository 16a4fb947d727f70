"""Write what people read: the report of a sweep or of runs, and the pages of the methods with their pictures."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from raysl.errors import UserError, install_hint
from raysl.evaluation.results import check_writable
from raysl.reporting.page import ReportConfig
from raysl.storage import Folder
from raysl.storage.escaping import file_name
from raysl.tuning.journal import NAME as JOURNAL

__all__ = ["ReportConfig", "check_installed", "report"]


def check_installed() -> None:
    """Raise UserError if a package that reports need is missing."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"A report needs {' and '.join(missing)}, not installed here. {install_hint('report')}"
        )


def report(folders: str | Sequence[str], config: ReportConfig) -> Folder:
    """Write the report of one sweep, finished or not, or of one or more runs, and return its folder.

    The same sweep or runs give the same bytes. No file is written outside of the report's folder.

    Args:
        folders: the folder of one sweep; or folders of runs, or of other models that `raysl probe` has measured.

    Raises UserError if a folder holds neither a sweep nor a run, several sweeps are given, a package is missing, or the
    report cannot be written.
    """
    check_installed()
    given = [folders] if isinstance(folders, str) else folders
    places = list({_same(Folder(path)): path for path in given}.values())
    sweeps = [path for path in places if Folder(path).exists(JOURNAL)]
    if sweeps and len(places) > 1:
        raise UserError(
            f"The folder {sweeps[0]!r} holds a sweep, but {len(places)} folders are given. Give one sweep alone, or "
            "only runs."
        )
    if sweeps:
        from raysl.reporting import sweep_page

        page, drawn = sweep_page.page(sweeps[0], config)
    else:
        from raysl.reporting import runs_page

        page, drawn = runs_page.page(places, config)
    out = Folder(config.out or ("report" if len(places) > 1 else f"{places[0].rstrip('/')}/report"))
    check_writable(out, "report")
    for figure in drawn:
        out.write(f"{file_name(figure.name)}.png", figure.png)
    out.write("index.html", page.encode())
    return out


def _same(folder: Folder) -> str:
    """Return a text that is the same for all paths of a folder, so that no run counts twice."""
    return os.path.realpath(folder.uri) if folder.is_local else folder.uri
