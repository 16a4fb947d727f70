"""Errors shown to users: what is wrong and how to fix it."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

# Ctrl-C, the request to end, and the end of the terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RESUME = "The same command resumes the work."

# Characters of a value that an error repeats.
_LONGEST = 80
# A message lists up to _MOST_LISTED names; of more, only the _NEAREST that are spelled like the one given.
_MOST_LISTED, _NEAREST = 150, 10


class UserError(Exception):
    """A mistake in the input, the configuration or the machine that the user can fix.

    The message is one paragraph: it names the thing, its value, what is allowed and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class MissingValueError(UserError):
    """A required value is missing. Everything else is valid."""


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to stop. The message says how to resume."""

    number = signal.SIGINT


def quoted(value: object) -> str:
    """Return a value as Python writes it; of a long one the beginning and its length."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def path_text(path: object) -> str:
    """Return a path or a URI as text. Raises UserError for a value of another type."""
    if isinstance(path, str | os.PathLike) and isinstance(text := os.fspath(path), str):
        return text
    raise UserError(f"{quoted(path)} is given where a path or a URI is expected.")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, as "1 image" or "2 classes"."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


def unknown(kind: str, name: str, known: Iterable[str], listed: Iterable[str] = ()) -> UserError:
    """Return the error for a name that does not exist, with the nearest name that does.

    Args:
        kind: kind of thing in the words of the user ("backbone", "pretext transform").
        name: the name that was given.
        known: every name that is accepted.
        listed: names to print in place of `known`, if these are many.
    """
    names = sorted(known)
    shown = sorted(listed) or names
    if len(shown) > _MOST_LISTED:
        nearest = difflib.get_close_matches(name.lower(), shown, n=_NEAREST, cutoff=0)
        shown = [*sorted(nearest), f"and {len(shown) - len(nearest):,} others"]
    return UserError(f"Unknown {kind} {quoted(name)}. {did_you_mean(name, names)}Known: {', '.join(shown)}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known names, and a space; "" if none is near."""
    names = sorted(known)
    # Users often give only the last part of a dotted name.
    by_lower = {known_name.rpartition(".")[2].lower(): known_name for known_name in names}
    by_lower |= {known_name.lower(): known_name for known_name in names}
    given, last = name.lower(), name.lower().rpartition(".")[2]
    words = [word for word in dict.fromkeys((given, last)) if len(word) > 2]
    begun = [sorted((lower for lower in by_lower if lower.startswith(word)), key=len)[:1] for word in words]
    near = next(filter(None, begun), []) or difflib.get_close_matches(given, by_lower, n=1, cutoff=0.5)
    return f"Did you mean {by_lower[near[0]]!r}? " if near else ""


@contextlib.contextmanager
def explained(
    what: str, remedy: str, *kinds: type[Exception], show: Callable[[object], str] = str
) -> Iterator[None]:
    """Turn errors of some kinds inside the block into a UserError: what has failed, the error, and what to do."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {show(error).rstrip('.')}. {remedy}") from error


@contextlib.contextmanager
def name_plugin_in_errors() -> Iterator[None]:
    """Turn an error that the code of a plugin raises in the block into a UserError with the plugin's file and line.

    Errors of the machine pass as they are: of a disk or a network, of memory, and of exchanges between workers.
    """
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        own = [(frame.f_code, line) for frame, line in frames if _is_of_plugin(frame)]
        of_machine = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
        if not own or of_machine or any(_exchanges(frame) for frame, _ in frames):
            raise
        code, line = own[-1]
        raise UserError(
            f"The code in {code.co_filename!r} failed in line {line}, in {code.co_name!r}: {type(error).__name__}: "
            f"{error}. Correct the file, and give the command again."
        ) from error


def _exchanges(frame: FrameType) -> bool:
    """Return True for code that waits for other workers, of which one may be lost."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(("torch.distributed.", "raysl.communication."))


def _is_of_plugin(frame: FrameType) -> bool:
    """Return True for code of a file or module that `raysl.plugins` has imported, also where it came by pickle."""
    name = str(frame.f_globals.get("__name__", ""))
    trusted = os.environ.get("RAYSL_PLUGINS", "").split(os.pathsep)
    return name.startswith("raysl_plugin_") or any(f"{name}.".startswith(f"{one}.") for one in trusted if one)


def install_hint(extra: str) -> str:
    """Return how to install an extra of raysl for the Python that runs. An environment that uv made has no pip."""
    uv = "uv" if shutil.which("uv") else ".uv/bin/uv"  # `make` fetches uv into the checkout if there is none.
    pip = f"{sys.executable} -m pip install"
    command = pip if importlib.util.find_spec("pip") else f"{uv} pip install --python {sys.executable}"
    return f"It is in the extra {extra!r}: in the checkout of raysl, run `{command} -e '.[{extra}]'`."


def package(module: str, what: str, extra: str, more: str = "", name: str = "") -> Any:
    """Import a module of an optional package; raise UserError, which says how to install it, if that fails.

    Args:
        what: what needs the package, the subject of the sentence.
        extra: the extra of raysl that holds the package.
        more: added to the error.
        name: of the package, where pip knows it by another than Python.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {name or module.partition('.')[0]}, which is not installed. "
            f"{install_hint(extra)}{more}"
        ) from error


@contextlib.contextmanager
def exit_on_errors(program: str) -> Iterator[None]:
    """Wrap a whole program: print a UserError and exit with 2; print a line after a signal and exit with 128 + number.

    Ctrl-C, SIGTERM and SIGHUP (the terminal is closed) interrupt the program, and the next signal ends it at once. A
    signal that is ignored, as by nohup, stays ignored.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    _on_stop(functools.partial(_interrupt, program))
    try:
        yield
    except UserError as error:
        _exit_with(f"{program}: {error}", 2)
    except Exception as error:
        if not _is_of_lost_process(error) or os.environ.get("RAYSL_LOG_TO_DRIVER") == "1":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))
        _exit_with(f"{program}: A process of Ray was lost. {why} {_RESUME}", 1)
    except KeyboardInterrupt as error:
        # A signal that arrives in a callback of C may raise a plain KeyboardInterrupt.
        stop = error if isinstance(error, Interrupted) else Interrupted(f"Interrupted. {_RESUME}")
        _exit_with(f"\n{program}: {stop}", 128 + stop.number)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # A program in C has set it.
                    signal.signal(number, handler)


def _is_of_lost_process(error: Exception) -> bool:
    """Return True if Ray tells by an error that one of its processes or a machine was lost."""
    known = sys.modules.get("ray.exceptions")
    if known is None:
        return False
    lost = (
        *(known.RayActorError, known.NodeDiedError, known.WorkerCrashedError, known.LocalRayletDiedError),
        *(known.ObjectLostError, known.RpcError),
    )
    if "creation task" in str(error):  # The code of an actor failed, and would fail again.
        return False
    return isinstance(error, lost) or isinstance(getattr(error, "cause", None), lost)


def _on_stop(handler: Callable[[int, FrameType | None], object]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


def _interrupt(program: str, number: int, frame: FrameType | None) -> None:
    _on_stop(functools.partial(_exit_at_once, program))
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    stop = Interrupted(f"Interrupted by {name}. {_RESUME}")
    stop.number = signal.Signals(number)
    raise stop


def _exit_at_once(program: str, number: int, frame: FrameType | None) -> None:
    os.write(2, f"\n{program}: Ended at once. {_RESUME}\n".encode())
    os._exit(128 + number)


def _exit_with(message: str, code: int) -> None:
    """Stop a Ray that this process started, and exit."""
    print(message, file=sys.stderr)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.exit(code)
