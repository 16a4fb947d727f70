"""Stop signals while a run is saved."""

from __future__ import annotations

import os
import signal

from raysl.training.signals import catch_stop_signals


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As in programs that `nohup` started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_stop_signals(lambda: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert not signals.received.is_set()
            assert signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler)
    finally:
        signal.signal(signal.SIGHUP, before)
