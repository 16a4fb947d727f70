"""The space of a sweep: which fields of the configuration vary, over which values, and the points in it."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raysl import methods, rng
from raysl.config import FREE, Pretraining
from raysl.errors import UserError
from raysl.fields import Range

Values = dict[str, Any]

# What makes a run another run rather than another trial, and what trials must share to be compared.
_FIXED = (*FREE, "seed", "epochs", "parts")
# The steps of population based training: Jaderberg et al. 2017, arXiv 1711.09846, section 4.
_FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Field:
    """A field of the configuration that can vary.

    Args:
        name: dotted, as the command line has it: "pirl.lam".
        path: where its value is in the JSON value of a Pretraining.
        hint: its type.
        range: the values that it names itself.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    range: Range | None


@dataclass(frozen=True)
class Dimension:
    """The values that one field takes: those listed, or an interval.

    Args:
        name: of the field, dotted.
        path: see `Field`.
        values: the choices, in order; empty for an interval.
        low: least value of the interval.
        high: greatest.
        whole: whether only whole numbers lie in it.
        log: whether it is drawn on a logarithmic scale.
        live: whether the value may change in the middle of a run.
    """

    name: str
    path: tuple[str, ...]
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    live: bool = False

    def at(self, share: float) -> Any:
        """The value at a share in 0..1 of the way."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        # Four digits are enough to tell trials apart, and can be typed again.
        return round(value) if self.whole else float(f"{value:.4g}")

    def ends(self) -> tuple[Any, ...]:
        """The values beyond which there are none; all choices where they are listed."""
        return self.values or (self.at(0.0), self.at(1.0))

    def near(self, value: Any, generator: np.random.Generator) -> Any:
        """A neighbour of a value: the choice before or after it, or a fifth less or more."""
        up = int(generator.integers(2))
        if self.values:
            place = self.values.index(value) + (1 if up else -1)
            return self.values[min(max(place, 0), len(self.values) - 1)]
        moved = value * _FACTORS[up] if self.log else value + (up - 0.5) * 0.4 * (self.high - self.low)
        clipped = min(max(moved, self.low), self.high)
        return round(clipped) if self.whole else float(f"{clipped:.4g}")


@dataclass(frozen=True)
class Space:
    """All dimensions of a sweep."""

    dimensions: tuple[Dimension, ...]

    def grid(self) -> list[Values]:
        """Every combination of the choices, the last field varying fastest."""
        names = [d.name for d in self.dimensions]
        return [
            dict(zip(names, row, strict=True))
            for row in itertools.product(*(d.values for d in self.dimensions))
        ]

    def drawn(self, seed: int, trial: int) -> Values:
        """The point of a trial of a random search: a function of its number, whatever came before."""
        shares = rng.generator(seed, "sweep", trial).random(len(self.dimensions))
        return {d.name: d.at(float(share)) for d, share in zip(self.dimensions, shares, strict=True)}

    def ends(self) -> Iterator[Values]:
        """Points that hold every end of every dimension, and all corners of a space that has few."""
        ends = [d.ends() for d in self.dimensions]
        names = [d.name for d in self.dimensions]
        rows = itertools.product(*ends) if math.prod(map(len, ends)) <= 256 else itertools.zip_longest(*ends)
        for row in rows:
            values = [each[0] if value is None else value for each, value in zip(ends, row, strict=True)]
            yield dict(zip(names, values, strict=True))

    def near(self, values: Values, generator: np.random.Generator) -> Values:
        """A neighbour of a point in every dimension."""
        return {d.name: d.near(values[d.name], generator) for d in self.dimensions}

    def configured(self, base: Pretraining, values: Mapping[str, Any]) -> Pretraining:
        """The configuration at a point.

        Raises:
            UserError: a value is not allowed.
        """
        tree = base.to_json()
        tree["method"] = values.get("method", base.method)
        known = methods.parse(tree["method"]).config_types()
        tree["parts"] = {name: part for name, part in tree["parts"].items() if name in known}
        for dimension in self.dimensions:
            node = tree
            for name in dimension.path[:-1]:
                node = node.setdefault(name, {})
            node[dimension.path[-1]] = values[dimension.name]
        return Pretraining.from_json(tree)


def space(base: Pretraining, vary: Sequence[str], listed: bool) -> Space:
    """The space that `--vary` describes.

    Args:
        base: what does not vary.
        vary: see `SweepConfig.vary`.
        listed: whether choices are wanted, as for a grid, and not intervals.

    Raises:
        UserError: a field does not exist or cannot vary, a range is empty, or a value is of the wrong kind.
    """
    named = dict(text.partition("=")[::2] for text in vary)
    swept = named.get("method", "")
    known = _fields(swept.split(",") if swept else [base.method])
    dimensions = []
    for text in vary:
        name, equals, values = text.partition("=")
        dimensions.append(_dimension(_resolve(name, known), values if equals else None, listed))
    names = [d.name for d in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"The field {name!r} is varied twice. Give it once, with all of its values.")
    return Space(tuple(dimensions))


def _fields(method_names: Sequence[str]) -> dict[str, Field]:
    """The fields that can vary, of configurations of all of these methods, by their dotted names."""
    found: list[dict[str, Field]] = []
    for method in method_names:
        here = {field.name: field for field in _walk(Pretraining, "", ())}
        for part, kind in methods.parse(method).config_types().items():
            here |= {field.name: field for field in _walk(kind, f"{part}.", ("parts", part))}
        found.append(here)
    return {name: field for name, field in found[0].items() if all(name in other for other in found)}


def _walk(kind: type[Any], prefix: str, path: tuple[str, ...]) -> Iterator[Field]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint: Any = hints[field.name]
        extras: list[Any] = []
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
        if not path and field.name in _FIXED:
            continue
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{prefix}{field.name}.", (*path, field.name))
            continue
        own = next((e for e in extras if isinstance(e, Range)), None) or _implied(hint)
        yield Field(f"{prefix}{field.name}", (*path, field.name), hint, own)


def _implied(hint: Any) -> Range | None:
    """The range of a type that names its values."""
    if typing.get_origin(hint) is Literal:
        return Range(typing.get_args(hint))
    return Range((False, True)) if hint is bool else None


def _resolve(name: str, known: Mapping[str, Field]) -> Field:
    """A field by its dotted name, or by the last part of it where only one field has that."""
    # `lambda` is a keyword of Python, so the field is named `lam`; both are accepted.
    wanted = re.sub(r"(^|\.)lambda$", r"\1lam", name.strip().replace("-", "_"))
    if wanted in known:
        return known[wanted]
    matches = [f for f in known.values() if wanted in (f.name.rpartition(".")[2], f.path[-1])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(sorted(field.name for field in matches))
        raise UserError(
            f"The field {name!r} is not the only one of that name: give one of {names} to --vary."
        )
    if wanted.rpartition(".")[2] in _FIXED:
        raise UserError(
            f"The field {name!r} cannot vary: it does not change what is learned, or trials that differ in it cannot "
            "be compared. Seeds are given to --seeds."
        )
    raise _unknown(name, wanted, list(known))


def _unknown(name: str, wanted: str, known: Sequence[str]) -> UserError:
    """The error for a field that does not exist: the nearest by its last part, in the group that was named if any."""
    group, _, last = wanted.rpartition(".")
    inside = [field for field in known if field.startswith(f"{group or last}.")]
    if inside and not group:
        return UserError(f"{name!r} is a group of fields. Give one of {', '.join(sorted(inside))} to --vary.")
    by_last: dict[str, list[str]] = {}
    for field in inside or known:
        by_last.setdefault(field.rpartition(".")[2], []).append(field)
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    hint = f"Did you mean {' or '.join(by_last[near[0]])}? " if near else ""
    fields = ", ".join(sorted(inside or known))
    return UserError(f"Unknown field to vary {name!r}. {hint}Those that can vary: {fields}.")


def _dimension(field: Field, text: str | None, listed: bool) -> Dimension:
    own = field.range
    about = {"log": own.log, "live": own.mutable} if own else {"log": False, "live": False}
    if text is None:
        if own is None:
            raise UserError(
                f"The field {field.name!r} names no values of its own. Write them, as in --vary {field.name}=A,B,C."
            )
        if listed or not all(_is_number(value) or value is None for value in own.values):
            return Dimension(field.name, field.path, own.values, **about)
        numbers = [value for value in own.values if value is not None]
        return _interval(field, min(numbers), max(numbers), about)
    if ".." in text:
        low, _, high = text.partition("..")
        if listed:
            raise UserError(
                f"{field.name}={text} is an interval, and a grid takes values one by one. Write {field.name}=A,B,C, or "
                "use --searcher random."
            )
        return _interval(field, _parsed(field, low), _parsed(field, high), about)
    values = tuple(dict.fromkeys(_parsed(field, item) for item in text.split(",") if item.strip()))
    if not values:
        raise UserError(f"The range of {field.name!r} is empty. Write it as --vary {field.name}=A,B,C.")
    return Dimension(field.name, field.path, values, **about)


def _interval(field: Field, low: Any, high: Any, about: dict[str, bool]) -> Dimension:
    if not (_is_number(low) and _is_number(high) and low < high):
        raise UserError(
            f"The range {low}..{high} of {field.name!r} is empty. The lower end comes first, and both are numbers."
        )
    if about["log"] and low <= 0:
        about = {**about, "log": False}
    kinds = typing.get_args(field.hint) or (field.hint,)
    return Dimension(field.name, field.path, (), low, high, float not in kinds, **about)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parsed(field: Field, text: str) -> Any:
    """A value from the command line, of the field's type. Raises UserError when it is none."""
    text = text.strip()
    union = typing.get_origin(field.hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.hint) if union else (field.hint,)
    for kind in kinds:
        if kind is types.NoneType and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is Literal:
            for value in typing.get_args(kind):
                if str(value) == text:
                    return value
        if kind in (int, float):
            try:
                number = kind(text)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
        if kind is str and text:
            return text
    wanted = " or ".join(_described(kind) for kind in kinds)
    raise UserError(f"The value {text!r} of {field.name!r} is none that it may have: it must be {wanted}.")


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    return named.get(kind, "none" if kind is types.NoneType else "something that no sweep can vary")
