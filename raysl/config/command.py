"""Write a configuration as a command."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from raysl.config import Pretraining, defaults, methods
from raysl.fields import hints, name_typed


def command(config: Pretraining) -> str:
    """Return the `raysl pretrain` command of a configuration.

    Fields that the command line would choose from the data are always named; others only if they differ from their
    defaults.
    """
    words = ["raysl", "pretrain"]
    plain = Pretraining(config.data, config.run, config.method)
    for name in ("data", "run", "method"):
        words += [f"--{name}", getattr(config, name)]
    words += _flags(config, plain, "")
    for part in methods.parse(config.method).config_types():
        words += _flags(config.parts[part], plain.parts[part], f"{part}.")
    return " ".join(shlex.quote(word) for word in words)


def wrapped(line: str) -> str:
    """Return a command broken into several lines, which a shell reads as one."""
    kept = re.sub(" (?!--)", "\0", line)  # a flag and its value stay together
    text = textwrap.fill(kept, 90, break_long_words=False, break_on_hyphens=False)
    return text.replace("\n", " \\\n    ").replace("\0", " ")


def _flags(value: Any, default: Any, prefix: str) -> Iterator[str]:
    for name, hint in hints(type(value)).items():
        own, other = getattr(value, name), getattr(default, name)
        if name in ("data", "run", "method", "parts"):
            continue
        if dataclasses.is_dataclass(own):
            yield from _flags(own, other, f"{prefix}{name}.")
            continue
        if own == other and f"{prefix}{name}" not in defaults.CHOSEN:
            continue
        flag = f"{prefix}{name_typed(name, hint)}".replace("_", "-")
        if isinstance(own, bool):
            head, _, tail = flag.rpartition(".")
            yield f"--{flag}" if own else f"--{head}{'.' if head else ''}no-{tail}"
        else:
            yield f"--{flag}"
            yield from map(str, own) if isinstance(own, tuple) else [str(own)]
