"""The space of a sweep: fields of the configuration by their dotted names, and the values that they take."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raysl import fields, methods, rng
from raysl.config import FREE, Pretraining
from raysl.errors import UserError, unknown
from raysl.fields import Range

Values = dict[str, Any]

# Fields that name another run instead of another trial, and fields that trials must share to be comparable.
_FIXED = (*FREE, "seed", "epochs", "parts")


@dataclass(frozen=True)
class Field:
    """A field of the configuration that can vary.

    Args:
        name: dotted name, as on the command line: "pirl.lam".
        path: keys to its value in the JSON value of a Pretraining.
        hint: its type.
        range: the values that its definition lists.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    range: Range | None


@dataclass(frozen=True)
class Dimension:
    """The values that one field takes: a list, or an interval.

    Args:
        name: dotted name of the field.
        path: see `Field`.
        values: the choices, in order; empty for an interval.
        low: least value of the interval.
        high: greatest value of the interval.
        whole: the interval holds whole numbers only.
        log: values are drawn on a logarithmic scale.
        mutable: the value may change in the middle of a run.
    """

    name: str
    path: tuple[str, ...]
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    mutable: bool = False

    def at(self, share: float) -> Any:
        """Return the value at a share in 0..1 of the way."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            return self.rounded(
                math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
            )
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float:
        """Return the value inside the interval, as a whole number or with four significant digits."""
        clipped = min(max(value, self.low), self.high)
        return round(clipped) if self.whole else float(f"{clipped:.4g}")

    def ends(self) -> tuple[Any, ...]:
        """Return the least and the greatest value; all choices of a list."""
        return self.values or (self.at(0.0), self.at(1.0))

    def domain(self) -> Any:
        """Return the domain of Ray Tune with the same values."""
        from ray import tune

        if self.values:
            return tune.choice(list(self.values))
        if self.whole:  # Tune's upper bounds of whole numbers are exclusive.
            draw = tune.lograndint if self.log else tune.randint
            return draw(int(self.low), int(self.high) + 1)
        return (tune.loguniform if self.log else tune.uniform)(self.low, self.high)


@dataclass(frozen=True)
class Space:
    """All dimensions of a sweep."""

    dimensions: tuple[Dimension, ...]

    @property
    def names(self) -> list[str]:
        return [dimension.name for dimension in self.dimensions]

    def grid(self) -> list[Values]:
        """Return every combination of the choices; the last field varies fastest."""
        rows = itertools.product(*(dimension.values for dimension in self.dimensions))
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def drawn(self, seed: int, trial: int) -> Values:
        """Return the point of a trial of a random search. It depends on the seed and the number of the trial only."""
        shares = rng.generator(seed, "sweep", trial).random(len(self.dimensions))
        return {d.name: d.at(float(share)) for d, share in zip(self.dimensions, shares, strict=True)}

    def ends(self) -> Iterator[Values]:
        """Yield points that hold every end of every dimension; all corners of a space that has few."""
        ends = [dimension.ends() for dimension in self.dimensions]
        rows = itertools.product(*ends) if math.prod(map(len, ends)) <= 256 else itertools.zip_longest(*ends)
        for row in rows:
            values = [each[0] if value is None else value for each, value in zip(ends, row, strict=True)]
            yield dict(zip(self.names, values, strict=True))

    def mutations(self) -> dict[str, Any]:
        """Return the space as PopulationBasedTraining takes it."""
        return {d.name: list(d.values) if d.values else d.domain() for d in self.dimensions}

    def clipped(self, config: Values) -> Values:
        """Return the values that PopulationBasedTraining has changed, moved back into their intervals."""
        found = {d.name: config[d.name] if d.values else d.rounded(config[d.name]) for d in self.dimensions}
        return {**config, **found}


def configured(base: Pretraining, values: Mapping[str, Any]) -> Pretraining:
    """Return the base configuration with some fields replaced.

    Args:
        base: supplies all other fields.
        values: new values by dotted or short field names, as Ray Tune resolves them.

    Raises:
        UserError: a field does not exist or cannot vary, or a value is not allowed.
    """
    tree = base.to_json()
    tree["method"] = values.get("method", base.method)
    known = methods.parse(tree["method"]).config_types()
    tree["parts"] = {name: part for name, part in tree["parts"].items() if name in known}
    known_fields = _fields([tree["method"]])
    for name, value in values.items():
        field = _resolve(name, known_fields)
        node = tree
        for key in field.path[:-1]:
            node = node.setdefault(key, {})
        node[field.path[-1]] = _fitting(field, value)
    return Pretraining.from_json(tree)


def space(base: Pretraining, vary: Sequence[str], listed: bool) -> Space:
    """Return the space that `--vary` describes.

    Args:
        base: what does not vary.
        vary: see `SweepConfig.vary`.
        listed: every dimension must be a list of values, as for a grid.

    Raises:
        UserError: a field does not exist or cannot vary, a range is empty, or a value is of the wrong type.
    """
    named = dict(text.partition("=")[::2] for text in vary)
    swept = named.get("method", "")
    known = _fields(swept.split(",") if swept else [base.method])
    dimensions = []
    for text in vary:
        name, equals, values = text.partition("=")
        dimensions.append(_dimension(_resolve(name, known), values if equals else None, listed))
    return _without_repeats(dimensions)


def _without_repeats(dimensions: Sequence[Dimension]) -> Space:
    names = [d.name for d in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"The field {name!r} is varied twice. Give it once, with all of its values.")
    return Space(tuple(dimensions))


def tune_space(base: Pretraining, param_space: Mapping[str, Any]) -> Space:
    """Return the space that the `param_space` of a `tune.Tuner` describes.

    Raises:
        UserError: a field does not exist or cannot vary, or its domain is a function, unbounded, empty or of another
            type than the field.
    """
    from ray.tune.search.sample import Categorical, Domain, Float, Integer

    method = param_space.get("method", base.method)
    known = _fields([method] if isinstance(method, str) else list(_choices(method)))
    dimensions = []
    for name, domain in param_space.items():
        field = _resolve(name, known)
        if isinstance(domain, (Float, Integer)):
            if not (math.isfinite(domain.lower) and math.isfinite(domain.upper)):
                raise UserError(
                    f"The domain of {name!r} has no bounds. Use tune.uniform(low, high) or tune.choice."
                )
            # Tune's upper bounds of whole numbers are exclusive.
            ends = domain.lower, domain.upper - isinstance(domain, Integer)
            dimensions.append(_interval(field, *(_fitting(field, end) for end in ends)))
            continue
        if isinstance(domain, Domain) and not isinstance(domain, Categorical):
            raise UserError(
                f"The domain of {name!r} is a function. Use a domain with known values, such as "
                "tune.uniform(low, high) or tune.choice."
            )
        dimensions.append(_listed(field, [_fitting(field, value) for value in _choices(domain)]))
    return _without_repeats(dimensions)


def _choices(domain: Any) -> Sequence[Any]:
    """Return the values of a `tune.choice` or `tune.grid_search`, or a value itself."""
    if isinstance(domain, Mapping):
        return list(domain.get("grid_search", [domain]))
    return list(getattr(domain, "categories", [domain]))


def _fields(method_names: Sequence[str]) -> dict[str, Field]:
    """Return the fields that all of these methods have and that can vary, by their dotted names."""
    found: list[dict[str, Field]] = []
    for method in method_names:
        here = {field.name: field for field in _walk(Pretraining, "", ())}
        for part, kind in methods.parse(method).config_types().items():
            here |= {field.name: field for field in _walk(kind, f"{part}.", ("parts", part))}
        found.append(here)
    return {name: field for name, field in found[0].items() if all(name in other for other in found)}


def _walk(kind: type[Any], prefix: str, path: tuple[str, ...]) -> Iterator[Field]:
    for name, hint in fields.hints(kind).items():
        extras: Sequence[Any] = ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
        if not path and name in _FIXED:
            continue
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{prefix}{name}.", (*path, name))
            continue
        own = next((extra for extra in extras if isinstance(extra, Range)), None)
        if own is None and typing.get_origin(hint) is Literal:
            own = Range(typing.get_args(hint))
        yield Field(f"{prefix}{name}", (*path, name), hint, Range((False, True)) if hint is bool else own)


def _resolve(name: str, known: Mapping[str, Field]) -> Field:
    """Return a field by its dotted name, or by the last part of it where only one field has that."""
    # `lambda` is a keyword of Python, so the field is named `lam`; both names are accepted.
    wanted = re.sub(r"(^|\.)lambda$", r"\1lam", name.strip().replace("-", "_"))
    if wanted in known:
        return known[wanted]
    matches = [f for f in known.values() if wanted in (f.name.rpartition(".")[2], f.path[-1])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(sorted(field.name for field in matches))
        raise UserError(f"Several fields are named {name!r}. Give the full name of one of them: {names}.")
    if wanted.rpartition(".")[2] in _FIXED:
        raise UserError(
            f"The field {name!r} cannot vary: it does not change what is learned, or trials that differ in it cannot "
            "be compared. Seeds are given to --seeds."
        )
    group = wanted.partition(".")[0]
    inside = [one for one in known if one.startswith(f"{group}.")]
    if wanted == group and inside:
        raise UserError(f"{name!r} is a group of fields. Vary one of {', '.join(sorted(inside))}.")
    raise unknown("field to vary", name, inside or known)


def _dimension(field: Field, text: str | None, listed: bool) -> Dimension:
    own = field.range
    if text is None:
        if own is None:
            raise UserError(
                f"The field {field.name!r} has no list of values in its definition. Give the values, as in "
                f"--vary {field.name}=A,B,C."
            )
        if listed or not all(_is_number(value) or value is None for value in own.values):
            return _listed(field, own.values)
        numbers = [value for value in own.values if value is not None]
        return _interval(field, min(numbers), max(numbers))
    if ".." in text:
        if listed:
            raise UserError(
                f"{field.name}={text} is an interval, and --searcher grid needs a list of values. Write "
                f"{field.name}=A,B,C, or use --searcher random."
            )
        low, _, high = text.partition("..")
        return _interval(field, _parsed(field, low), _parsed(field, high))
    return _listed(field, [_parsed(field, item) for item in text.split(",") if item.strip()])


def _listed(field: Field, values: Sequence[Any]) -> Dimension:
    if not values:
        raise UserError(f"The range of {field.name!r} is empty. Write it as --vary {field.name}=A,B,C.")
    return Dimension(field.name, field.path, tuple(dict.fromkeys(values)), **_scale(field))


def _interval(field: Field, low: Any, high: Any) -> Dimension:
    if not (_is_number(low) and _is_number(high) and low < high):
        raise UserError(
            f"The range {low}..{high} of {field.name!r} is empty. Give two numbers, the lower one first."
        )
    scale = _scale(field)
    scale["log"] = scale["log"] and low > 0
    return Dimension(field.name, field.path, (), low, high, not fields.has_type(0.5, field.hint), **scale)


def _scale(field: Field) -> dict[str, bool]:
    own = field.range or Range(())
    return {"log": own.log, "mutable": own.mutable}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fitting(field: Field, value: Any) -> Any:
    """Return a value that Ray Tune has resolved, as a plain Python value of the field's type."""
    value = value.item() if isinstance(value, np.generic) else value
    if callable(value):
        raise UserError(
            f"The value of {field.name!r} is a function. Give a value, or a domain such as tune.uniform(low, high)."
        )
    if _is_number(value) and not fields.has_type(value, field.hint):
        if not math.isfinite(value) or value != int(value):
            raise UserError(
                f"The field {field.name!r} takes whole numbers and was given {value}. Use tune.randint or tune.choice."
            )
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def _parsed(field: Field, text: str) -> Any:
    """Return a value from the command line, of the field's type. Raise UserError when the text is no such value."""
    text = text.strip()
    read: list[Any] = [{"none": None, "true": True, "false": False}.get(text.lower(), text)]
    with contextlib.suppress(ValueError, SyntaxError):
        read.insert(0, ast.literal_eval(text))
    for value in read:
        if text and fields.has_type(value, field.hint):
            return float(value) if _is_number(value) and fields.has_type(0.5, field.hint) else value
    raise UserError(
        f"The value {text!r} of {field.name!r} is not allowed: it must be {fields.described(field.hint)}."
    )
