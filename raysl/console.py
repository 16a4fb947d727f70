"""Print the messages of raysl for a person: plain lines, and how long unfinished work has taken.

Code of the library logs to loggers under "raysl". A message that ends in "..." begins work that may take a while; until
the next message, the console shows the seconds that have passed. Between other messages of a verb, it does so when the
next one is late.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import raysl

# How long a terminal and any other output may be silent during work, in seconds.
_TERMINAL_S, _PLAIN_S = 0.5, 3.0
# How old another message becomes before a line says that the work goes on, in seconds. Where messages come regularly,
# twice the time between the last two counts, up to the limit.
_OLD_S, _MOST_OLD_S = 5.0, 60.0
P = ParamSpec("P")
T = TypeVar("T")


def add_handler() -> None:
    """Print messages of raysl, unless the program has set up logging itself."""
    logger = logging.getLogger("raysl")
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)


@contextmanager
def working(message: str, *, is_start_line: bool = False) -> Iterator[None]:
    """Log `message`, which should end in "...", and show the seconds until the block ends.

    Args:
        message: a line.
        is_start_line: it is the first line of a verb. On a terminal no seconds are added to it, because the verb prints
            next.
    """
    handlers = [one for one in logging.getLogger("raysl").handlers if isinstance(one, _Handler)]
    for handler in handlers:
        handler.depth += 1
    logging.getLogger("raysl").info(message, extra={"is_start_line": is_start_line})
    try:
        yield
    finally:
        for handler in handlers:
            handler.depth -= 1
            handler.stop_timer()


@contextmanager
def verb(name: str) -> Iterator[None]:
    """Print the first line of a verb, before anything slow is imported, unless that has been done."""
    add_handler()
    inside = any(isinstance(one, _Handler) and one.depth for one in logging.getLogger("raysl").handlers)
    if inside:
        yield
    else:
        with working(f"raysl {raysl.__version__}: {name} ...", is_start_line=True):
            yield


def prints_start_line(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function of the API that is a verb."""

    @functools.wraps(function)
    def run(*arguments: P.args, **fields: P.kwargs) -> T:
        with verb(function.__name__):
            return function(*arguments, **fields)

    return run


class _Handler(logging.Handler):
    """Print information to standard output, and warnings to standard error.

    Attributes:
        depth: number of blocks of `working` around the running code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self._work = ""
        self._announced = self._open = False
        self._since_s = self._shown_s = 0.0
        self._silent_s = _PLAIN_S
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            between_s = self._waited_s() if self._work and not self._announced else 0.0
            self._end()
            message = record.getMessage()
            on_terminal = sys.stdout.isatty()
            is_start_line = getattr(record, "is_start_line", False)
            self._announced = message.endswith("...") and not (is_start_line and on_terminal)
            self._silent_s = _PLAIN_S if self._announced else min(max(_OLD_S, 2 * between_s), _MOST_OLD_S)
            self._open = self._announced and on_terminal
            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            print(message, file=stream, end="" if self._open else "\n", flush=True)
            if self._announced or self.depth:
                self._begin(message if self._announced else "Still working ...")
        except BrokenPipeError:
            raise
        except RuntimeError:  # A signal that is logged arrived while a line was written.
            pass
        except (OSError, ValueError):
            self.handleError(record)

    def stop_timer(self) -> None:
        """Stop counting seconds."""
        self.acquire()
        try:
            self._end()
        finally:
            self.release()

    def _begin(self, work: str) -> None:
        self._work = work
        self._since_s, self._shown_s = time.monotonic(), 0.0
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="raysl-console", daemon=True)
            self._thread.start()

    def _waited_s(self) -> float:
        return time.monotonic() - self._since_s

    def _end(self) -> None:
        if self._open:
            print(f"\r{self._work} {self._waited_s():.0f} s", flush=True)
        self._work, self._open = "", False

    def _watch(self) -> None:
        # No event wakes this thread: its lock would be taken twice when a signal arrives in `emit` and is logged.
        while True:
            time.sleep(_TERMINAL_S)
            self.acquire()
            try:
                if self._work:
                    self._show(self._waited_s())
            except (OSError, ValueError):
                self._work = ""  # The reader of a pipe has ended, or the output is closed.
            finally:
                self.release()

    def _show(self, waited_s: float) -> None:
        # Rich takes the place of standard output while it shows a progress bar, which is a sign of life itself.
        if not self._announced and (waited_s < self._silent_s or type(sys.stdout).__name__ == "FileProxy"):
            return
        if self._announced and sys.stdout.isatty():
            self._open = True
            print(f"\r{self._work} {waited_s:.0f} s", end="", flush=True)
        # In a file, the lines become rarer: after 3, 6, 9 ... 30 s, then at least a tenth of the time apart.
        elif waited_s - self._shown_s >= max(self._silent_s, min(waited_s / 10, 60)):
            self._shown_s = waited_s
            print(f"{self._work} {waited_s:.0f} s", flush=True)
