"""Show how far an ingest is: a bar on a terminal, and a line of the log every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_log = logging.getLogger("raysl.ingestion")
_LINE_EVERY_S = 5.0


def show(steps: Iterable[tuple[int, int]], doing: str, done: int, total: int) -> None:
    """Take all steps of work, and show what is done after each.

    Args:
        steps: (images written, images that could not be decoded) of each.
        doing: name of the work.
        done: images that were done before.
        total: images in all.
    """
    start_s = line_s = time.monotonic()
    first, bad = done, 0
    columns = (TextColumn(doing), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    quiet = not sys.stderr.isatty() or not _log.isEnabledFor(logging.INFO)
    if quiet and done < total:
        # The console shows the seconds that pass until the first line of progress.
        _log.info("%s %s images ...", doing, f"{total - done:,}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(doing, total=total, completed=done, text="")
        for step in steps:
            done, bad, now_s = done + sum(step), bad + step[1], time.monotonic()
            rate = (done - first) / max(now_s - start_s, 1e-9)
            text = f"{done:,}/{total:,} images, {rate:,.0f} images/s, {bad:,} bad"
            bar.update(task, completed=done, text=text)
            if quiet and (
                now_s - line_s > _LINE_EVERY_S or (done >= total and now_s - start_s > _LINE_EVERY_S)
            ):
                line_s = now_s
                _log.info("%s: %s, %.0f s left", doing, text, max(total - done, 0) / max(rate, 1e-9))
