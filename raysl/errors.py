"""Errors shown to users: what is wrong and how to fix it."""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator

# Characters of a value that an error repeats.
_LONGEST = 80


class UserError(Exception):
    """A mistake in the input, the configuration or the machine that the user can fix.

    The message is one paragraph: it names the thing, its value, what is allowed and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class Unset(UserError):
    """A required value is missing. Everything else is valid."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work that was saved. The message says how to resume."""


def quoted(value: object) -> str:
    """Return a value as Python writes it; of a long one the beginning and its length."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist, with the nearest name that does.

    Args:
        kind: kind of thing in the words of the user ("backbone", "pretext transform").
        name: the name that was given.
        known: every name that is accepted.
    """
    names = sorted(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    hint = f"Did you mean {by_lower[near[0]]!r}? " if near else ""
    return UserError(f"Unknown {kind} {quoted(name)}. {hint}Known: {', '.join(names)}.")


@contextlib.contextmanager
def answered(program: str) -> Iterator[None]:
    """Wrap a whole program: print a UserError and exit with 2; print a line after an interruption and exit with 130.

    SIGHUP (the terminal is closed) interrupts as Ctrl-C does, unless it is ignored (nohup).
    """
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    ):
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except UserError as error:
        _leave(f"{program}: {error}", 2)
    except Interrupted as error:
        _leave(f"\n{program}: {error}", 130)
    except KeyboardInterrupt:
        _leave(f"\n{program}: interrupted. The same command resumes the work.", 130)


def _leave(message: str, code: int) -> None:
    """Stop a Ray that this process started, and exit."""
    print(message, file=sys.stderr)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.exit(code)
