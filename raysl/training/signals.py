"""Save a run when this process is told to stop: Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raysl.errors import STOP_SIGNALS, Interrupted

_log = logging.getLogger("raysl.training")


class Signals:
    """The first stop signal that this process got.

    Attributes:
        received: set when a signal has arrived.
        number: the signal.
    """

    def __init__(self) -> None:
        self.received = threading.Event()
        self.number = signal.SIGINT

    def exception(self, step: int) -> BaseException:
        """Return the exception that ends a run which was saved at `step`."""
        name = "Ctrl-C" if self.number == signal.SIGINT else self.number.name
        where = f"after step {step}, which is saved" if step else "before the first checkpoint"
        message = (
            f"Stopped by {name} {where}. The same command {'resumes from there' if step else 'begins again'}."
        )
        if self.number == signal.SIGINT:
            return Interrupted(message)
        _log.info(message)
        return SystemExit(128 + self.number)


@contextmanager
def catch_stop_signals(act: Callable[[], object]) -> Iterator[Signals]:
    """During the block, record the first SIGINT, SIGTERM or SIGHUP and call `act`; the next one acts as it did before.

    Python runs signal handlers in the main thread only; in another thread nothing changes.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # Programs started by `nohup`, or in the background of a script, ignore a signal and go on ignoring it.
    before = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        restore()
        signals.number = signal.Signals(number)
        signals.received.set()
        _log.info("Saving the run. The same signal again stops at once, without saving.")
        act()

    for number in before:
        signal.signal(number, handle)
    try:
        yield signals
    finally:
        restore()
