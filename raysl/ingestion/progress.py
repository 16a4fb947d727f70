"""How far an ingest is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """What an ingest tells while it runs."""

    def say(self, text: str) -> None:
        """One sentence."""
        ...

    def update(self, doing: str, done: int, total: int, bad: int) -> None:
        """So many images are done of those that were listed, and so many of them are bad."""
        ...

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        pass

    def update(self, doing: str, done: int, total: int, bad: int) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Terminal:
    """Tells on stderr: a bar on a terminal, else a line every few seconds."""

    _LINE_EVERY_S = 5.0

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn(
                "{task.completed}/{task.total} images, {task.fields[rate]:.0f}/s, {task.fields[bad]} bad"
            ),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._doing = ""
        self._start_s = self._line_s = 0.0
        self._first = 0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, doing: str, done: int, total: int, bad: int) -> None:
        now_s = time.monotonic()
        if doing != self._doing:
            self._doing, self._start_s, self._first = doing, now_s, done
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(doing, total=total, rate=0.0, bad=bad)
        rate = (done - self._first) / max(now_s - self._start_s, 1e-9) if done > self._first else 0.0
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, rate=rate, bad=bad)
        if not self._console.is_terminal and (now_s - self._line_s > self._LINE_EVERY_S or done == total):
            self._line_s = now_s
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            self.say(f"{doing}: {done}/{total} images, {rate:.0f} images/s, {bad} bad{left}")

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
