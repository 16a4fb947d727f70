"""Describe the fields of a configuration beside the field: its bounds, and the values that a sweep tries.

@dataclass(frozen=True)
class Config(Checked):
    momentum: Annotated[float, Bounds(0, 1, hint="PIRL uses 0.5"), Range((0.0, 0.5, 0.9))] = 0.5
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from raysl.errors import UserError, quoted


@dataclass(frozen=True)
class Range:
    """Values that a sweep tries for a field, as in `temperature: Annotated[float, Range((0.05, 0.1, 0.2), log=True)]`.

    A field of type bool or Literal has a range without it: all of its values.

    Args:
        values: the values of a grid, in order. A random search samples between the least and the greatest number.
        log: compare ratios and not differences, in sampling and in figures.
        mutable: the value may change in the middle of a run, as population based training does.
    """

    values: tuple[Any, ...]
    log: bool = False
    mutable: bool = False


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field accepts. For a tuple they hold for every element; None is not compared.

    Args:
        low: the least value.
        high: the greatest value.
        above: the value must be greater than this.
        below: the value must be less than this.
        hint: added to the error, such as "the paper uses 0.07".
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""

    def allow(self, value: float) -> bool:
        """Return whether a number lies within the bounds. NaN never does."""
        return not math.isnan(value) and not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        if self.low is not None and self.high is not None:
            return f"between {_number(self.low)} and {_number(self.high)}{hint}"
        lower = f"at least {_number(self.low)}" if self.low is not None else ""
        lower = f"above {_number(self.above)}" if self.above is not None else lower
        upper = f"at most {_number(self.high)}" if self.high is not None else ""
        upper = f"below {_number(self.below)}" if self.below is not None else upper
        return " and ".join(filter(None, (lower, upper))) + hint


# The module name of a plugin's file; see `raysl.plugins`.
_PLUGIN_FILE = re.compile(r"^raysl_plugin_(.+)_[0-9a-f]{12}$")
# A whole number that fits in 63 bits.
Seed = Annotated[int, Bounds(0, 2**63 - 1)]


class FieldError(UserError):
    """A field holds a value that it does not accept.

    Attributes:
        flag: the flag of the field, such as "--optim.momentum".
    """

    def __init__(self, flag: str, value: Any, reason: str) -> None:
        super().__init__(f"{flag} is {quoted(value)}; {reason}.")
        self.flag, self.value, self.reason = flag, value, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return FieldError, (self.flag, self.value, self.reason)

    def as_typed(self, arguments: Sequence[str]) -> FieldError:
        """Return the error with the flag as a command line has it, which may have a longer prefix.

        A class knows its own name and not where it is nested: `--optim.lr` may be `--finetune.optim.lr`.
        """
        wanted = self.flag.removeprefix("--")
        typed = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        near = (flag for flag in typed if f".{flag[2:].replace('_', '-')}".endswith(f".{wanted}"))
        return FieldError(next(near, self.flag), self.value, self.reason)


class Checked:
    """Base of a configuration dataclass: a new instance checks its fields. See `check`."""

    def __post_init__(self) -> None:
        check(self, prefix(type(self)))


class CheckedTop:
    """Base of a configuration dataclass whose flags have no prefix: a new instance checks its fields."""

    def __post_init__(self) -> None:
        check(self)


def prefix(kind: type[Any]) -> str:
    """Return the prefix of a class's flags: the module's name for a `Config`, otherwise the name without "Config"."""
    name = kind.__name__
    if name == "Config":
        module = kind.__module__.rpartition(".")[2]
        return _PLUGIN_FILE.sub(r"\1", module) + "."
    short = name.removesuffix("Config")
    return f"{short.lower()}." if short != name else ""


def flag(name: str) -> str:
    """Return the command-line flag of a dotted field name."""
    return f"--{name.replace('_', '-')}"


def check(config: Any, prefix: str = "") -> None:
    """Raise `FieldError` unless every field of a dataclass has its type and lies within its bounds.

    Numbers must be finite, a field of type int takes no fraction and no bool, a text has no NUL, and a `Literal` field
    takes one of its values. A nested dataclass is checked here, unless it is `Checked` and has checked itself. Numbers
    of NumPy and torch become Python's, which JSON can hold.

    Args:
        prefix: prefix of the flags in errors, such as "optim.".
    """
    for name, hint in hints(type(config)).items():
        value = _ordinary(given := getattr(config, name))
        if value is not given:
            object.__setattr__(config, name, value)
        if reason := _reason(value, hint):
            raise FieldError(flag(f"{prefix}{name}"), value, reason)
        if dataclasses.is_dataclass(value) and not isinstance(value, Checked | type):
            check(value, f"{prefix}{name}.")


def _ordinary(value: Any) -> Any:
    """Return a number of NumPy or torch, alone or in a tuple, as Python's; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if type(value) is tuple and any(hasattr(item, "shape") for item in value):
        return tuple(map(_ordinary, value))
    return value


def hints(kind: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass with their annotations."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def name_typed(name: str, hint: Any) -> str:
    """Return the name of a field on the command line, which an annotation of tyro may change."""
    given = [extra.name for extra in typing.get_args(hint) if getattr(extra, "name", None)]
    return (given[0] if given else name).replace("_", "-")


def _reason(value: Any, hint: Any, bounds: Bounds | None = None) -> str:
    """Return why a value is refused; an empty string for one that is accepted."""
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), bounds)
    if not has_type(value, hint):
        return f"it must be {described(hint)}" + _near(value, hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        reasons = [_reason(value, part, bounds) for part in inner if has_type(value, part)]
        return "" if "" in reasons else reasons[0]
    if origin is tuple and inner:
        parts = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(parts) != len(value):
            return f"it must have {len(parts)} values"
        found = (_reason(item, part, bounds) for item, part in zip(value, parts, strict=True))
        return next((reason.replace("it must", "each must", 1) for reason in found if reason), "")
    if is_number(value) and origin is not Literal:
        if not _is_finite(value):
            return "it must be a finite number"
        if bounds is not None and not bounds.allow(value):
            return f"it must be {bounds}"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "it must fit in 64 bits"
    if isinstance(value, str | Path) and not _is_plain(str(value)):
        return "it must be UTF-8 text of at most 4,096 characters without NUL"
    return ""


_UNIONS = (Union, types.UnionType)
_LONGEST_TEXT = 4096  # characters; the longest path of Linux


def has_type(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return has_type(value, inner[0])
    if origin in _UNIONS:
        return any(has_type(value, part) for part in inner)
    if origin is Literal:
        return any(value == known and type(value) is type(known) for known in inner)
    kind = origin or hint
    if kind is types.NoneType:
        return value is None
    if kind is float:
        return is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _near(value: Any, hint: Any) -> str:
    """Return a hint to the nearest choice of a Literal."""
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_number(value: Any) -> bool:
    """Return True for a whole number or a float, and not for a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """Return whether a number is finite as a float too, which a whole number of 400 digits is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_plain(text: str) -> bool:
    """Return whether a text may stand in a path and in a file."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text and len(text) <= _LONGEST_TEXT


def described(hint: Any) -> str:
    """Return a type in words, such as "a whole number or none"."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(described(part) for part in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    words |= {
        types.NoneType: "none",
        tuple: "a list of values",
        Sequence: "a list of values",
        Mapping: "a mapping",
    }
    if dataclasses.is_dataclass(hint):
        kind = getattr(hint, "__name__", str(hint))
        article = "an" if kind[0] in "AEIOU" else "a"
        if any(field.name == "name" for field in dataclasses.fields(hint)):
            return f"{article} {kind}, a mapping of its fields, or a name"
        return f"{article} {kind} or a mapping of its fields"
    return words.get(origin or hint, re.sub(r"^.*\.", "", str(hint)))


def _number(value: float) -> str:
    """Return a bound as it is read best: 1,048,576 and not 1048576.0."""
    if value == 2**63 - 1:
        return "2**63 - 1"
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"
