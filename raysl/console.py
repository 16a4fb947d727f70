"""Print the messages of raysl for a person: plain lines, and how long unfinished work has taken.

Code of the library logs to loggers under "raysl". A message that ends in "..." begins work that may take a while; until
the next message, the console shows the seconds that have passed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# How long a terminal and any other output may be silent during work, in seconds.
_TERMINAL_S, _PLAIN_S = 0.5, 3.0


def install() -> None:
    """Print messages of raysl, unless the program has set up logging itself."""
    logger = logging.getLogger("raysl")
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Log `message`, which should end in "...", and show the seconds until the block ends."""
    logging.getLogger("raysl").info(message)
    try:
        yield
    finally:
        for handler in logging.getLogger("raysl").handlers:
            if isinstance(handler, _Handler):
                handler.rest()


class _Handler(logging.Handler):
    """Print information to standard output, and warnings to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._work = ""
        self._since_s = self._shown_s = 0.0
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._end()
            message = record.getMessage()
            self._since_s = self._shown_s = time.monotonic()
            if message.endswith("..."):
                self._begin(message)
            else:
                print(
                    message, file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True
                )
        except BrokenPipeError:
            raise
        except (OSError, ValueError):
            self.handleError(record)

    def rest(self) -> None:
        """Stop counting seconds."""
        self.acquire()
        try:
            self._end()
        finally:
            self.release()

    def _begin(self, message: str) -> None:
        self._work = message
        print(message, end="" if sys.stdout.isatty() else "\n", flush=True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="raysl-console", daemon=True)
            self._thread.start()
        self._changed.set()

    def _end(self) -> None:
        if self._work and sys.stdout.isatty():
            print(f"\r{self._work} {time.monotonic() - self._since_s:.0f} s", flush=True)
        self._work = ""

    def _watch(self) -> None:
        while True:
            if not self._work:
                self._changed.wait()
            self._changed.clear()
            self._changed.wait(_TERMINAL_S)
            self.acquire()
            try:
                if self._work:
                    self._show(time.monotonic())
            finally:
                self.release()

    def _show(self, now_s: float) -> None:
        if sys.stdout.isatty():
            print(f"\r{self._work} {now_s - self._since_s:.0f} s", end="", flush=True)
        elif now_s - self._shown_s >= _PLAIN_S:
            self._shown_s = now_s
            print(f"{self._work} {now_s - self._since_s:.0f} s", flush=True)
