"""The space of a sweep: fields of the configuration by their dotted names, and the values that they take."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raysl import fields, rng
from raysl.config import MAY_CHANGE, Pretraining, methods
from raysl.errors import UserError, unknown
from raysl.fields import Range

Values = dict[str, Any]

# Fields that name another run instead of another trial, and fields that trials must share to be comparable.
_FIXED = (*MAY_CHANGE, "seed", "epochs", "parts")
# A space with no more corners than this is checked at all of them.
_MAX_CORNERS = 256


@dataclass(frozen=True)
class Dimension:
    """The values that one field takes: a list, or an interval."""

    name: str  # dotted name of the field, as on the command line: "pirl.lam"
    values: tuple[Any, ...] = ()  # the choices, in order; empty for an interval
    low: float = 0.0  # least value of the interval
    high: float = 0.0  # greatest value of the interval
    whole: bool = False  # the interval holds whole numbers only
    log: bool = False  # values are drawn on a logarithmic scale
    mutable: bool = False  # the value may change in the middle of a run

    def __str__(self) -> str:
        tried = ", ".join(map(str, self.values)) or f"{self.low:g} to {self.high:g}"
        return f"{self.name} {tried}"

    def interpolate(self, fraction: float) -> Any:
        """Return the value at a fraction in 0..1 of the way."""
        if self.values:
            return self.values[min(int(fraction * len(self.values)), len(self.values) - 1)]
        # Each whole number has an interval of its own, so that the ends are as likely as the others.
        low, high = self.low, self.high + self.whole
        if self.log:
            value = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
        else:
            value = low + fraction * (high - low)
        return self.rounded(math.floor(value + 1e-9) if self.whole else value)

    def rounded(self, value: float) -> float:
        """Return the value inside the interval, as a whole number or with four significant digits."""
        short = round(value) if self.whole else float(f"{value:.4g}")
        return min(max(short, self.low), self.high)

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

    def sample(self, seed: int, trial: int) -> Values:
        """Return the point of a trial of a random search. It depends on the seed and the number of the trial only."""
        shares = rng.generator(seed, "sweep", trial).random(len(self.dimensions))
        return {d.name: d.interpolate(float(share)) for d, share in zip(self.dimensions, shares, strict=True)}

    def corners(self) -> Iterator[Values]:
        """Yield points with the ends of all intervals and all choices; see `corners`."""
        return corners(
            {d.name: d.values or (d.interpolate(0.0), d.interpolate(1.0)) for d in self.dimensions}
        )

    def mutations(self) -> dict[str, Any]:
        """Return the space as PopulationBasedTraining takes it."""
        return {d.name: list(d.values) if d.values else d.domain() for d in self.dimensions}

    def clipped(self, config: Values) -> Values:
        """Return the values that PopulationBasedTraining has changed, moved back into their intervals."""
        found = {d.name: config[d.name] if d.values else d.rounded(config[d.name]) for d in self.dimensions}
        return {**config, **found}


def corners(ends: Mapping[str, Sequence[Any]]) -> Iterator[Values]:
    """Yield points that hold each of the given values; all combinations where they are few."""
    columns = list(ends.values())
    few = math.prod(map(len, columns)) <= _MAX_CORNERS
    for row in itertools.product(*columns) if few else itertools.zip_longest(*columns):
        values = [column[0] if value is None else value for column, value in zip(columns, row, strict=True)]
        yield dict(zip(ends, values, strict=True))


def apply_values(base: Pretraining, values: Mapping[str, Any]) -> Pretraining:
    """Return the base configuration with values of Ray Tune for some fields, by dotted or short names.

    Raises:
        UserError: a field does not exist, cannot vary or is named twice, or a value is not allowed.
    """
    tree = base.to_json()
    tree["method"] = values.get("method", base.method)
    parts = methods.parse(tree["method"]).config_types()
    # Another method has as many negatives: the number of its class may be more than the data set has.
    numbers = [one["num_negatives"] for one in tree["parts"].values() if "num_negatives" in one]
    negatives = {"num_negatives": numbers[0]} if numbers else {}
    tree["parts"] = {
        name: tree["parts"].get(name, dict(negatives) if hasattr(kind, "num_negatives") else {})
        for name, kind in parts.items()
    }
    known, seen = _fields([tree["method"]]), list[str]()
    for given, value in values.items():
        name = _resolve(given, known)
        *groups, last = name.split(".")
        node = tree["parts"] if groups and groups[0] in parts else tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = _as_field_type(name, known[name], value)
        seen.append(name)
    _refuse_repeats(seen)
    return Pretraining.from_json(tree)


def with_method_values(values: Values, method_values: Mapping[str, Values]) -> dict[str, Any]:
    """Return the values of a trial, and those of its method for fields that the trial does not vary."""
    return {**method_values.get(str(values.get("method")), {}), **values}


def space(base: Pretraining, vary: Sequence[str], listed: bool) -> Space:
    """Return the space that `--vary` describes. If it is `listed`, all dimensions are lists of values, as for a grid.

    Raises:
        UserError: a field does not exist, cannot vary or is named twice, a range is empty, or a value is of the wrong
            type.
    """
    given = [text.partition("=") for text in vary]
    varied = next((values for name, _, values in given if name == "method" and values), "")
    names = [name.strip() for name in varied.split(",") if name.strip()] if varied else [base.method]
    known = _fields(names)
    for text, _, _ in given:
        _refuse_unshared(text, known, names)
    named = [(_resolve(text, known), values if equals else None) for text, equals, values in given]
    space_ = Space(tuple(_dimension(name, known[name], values, listed) for name, values in named))
    _refuse_repeats(space_.names)
    return space_


def domain_ends(param_space: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Return both ends, or all choices, of each domain in the `param_space` of a `tune.Tuner`.

    Raises:
        UserError: a domain is a function, unbounded or empty.
    """
    from ray.tune.search.sample import Categorical, Domain, Float, Integer

    found: dict[str, Sequence[Any]] = {}
    for name, domain in param_space.items():
        if isinstance(domain, (Float, Integer)):
            if not (math.isfinite(domain.lower) and math.isfinite(domain.upper)):
                raise UserError(
                    f"The domain of {name!r} has no bounds. Use tune.uniform(low, high) or tune.choice."
                )
            # Tune's upper bounds of whole numbers are exclusive.
            low, high = domain.lower, domain.upper - isinstance(domain, Integer)
            found[name] = (low, high) if low <= high else ()
        elif isinstance(domain, Domain) and not isinstance(domain, Categorical):
            raise UserError(
                f"The domain of {name!r} is a function. Use a domain with known values, such as "
                "tune.uniform(low, high) or tune.choice."
            )
        elif isinstance(domain, Mapping) and "grid_search" in domain:
            found[name] = domain["grid_search"]
        else:
            found[name] = getattr(domain, "categories", [domain])
        if not found[name]:
            raise UserError(
                f"The domain of {name!r} is empty. Give at least one value, the lower bound first."
            )
    return found


def _refuse_repeats(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"The field {name!r} is varied twice. Give it once, with all of its values.")


def _fields(method_names: Sequence[str]) -> dict[str, Any]:
    """Return the annotated types, by dotted names, of the fields that can vary and that all of the methods have."""
    found = []
    for method in method_names:
        here = dict(_walk(Pretraining, ""))
        for part, kind in methods.parse(method).config_types().items():
            here.update(_walk(kind, f"{part}."))
        found.append(here)
    return {name: hint for name, hint in found[0].items() if all(name in other for other in found)}


def _walk(kind: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in fields.hints(kind).items():
        plain = _plain(hint)
        if not prefix and name in _FIXED:
            continue
        if dataclasses.is_dataclass(plain):
            yield from _walk(typing.cast(type, plain), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _range(hint: Any) -> Range:
    """Return the values that the definition of a field lists; all values of a bool or a Literal."""
    plain = _plain(hint)
    if plain is bool:
        return Range((False, True))
    own = next((extra for extra in typing.get_args(hint) if isinstance(extra, Range)), None)
    return own or Range(typing.get_args(plain) if typing.get_origin(plain) is Literal else ())


def _refuse_unshared(given: str, known: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UserError if a field belongs to some of several methods, and not to all.

    Args:
        known: the fields that all of the methods have.
        names: names of the methods.
    """
    wanted = given.strip().replace("-", "_")

    def matches(fields_of: Iterable[str]) -> list[str]:
        return [name for name in fields_of if wanted in (name, name.rpartition(".")[2])]

    found = {name: own for name in names if (own := matches(_fields([name])))}
    if found and not matches(known):
        fields_of = ", ".join(f"{own[0]} of {name}" for name, own in found.items())
        raise UserError(
            f"{given!r} cannot vary together with the method: it is {fields_of}, and not a field of all methods. Sweep "
            "it for one method at a time."
        )


def _resolve(given: str, known: Mapping[str, Any]) -> str:
    """Return the dotted name of a field, which may be given by its last part where only one field has that."""
    wanted = given.strip().replace("-", "_")
    if wanted in known:
        return wanted
    matches = sorted(name for name in known if name.rpartition(".")[2] == wanted)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"Several fields are named {given!r}. Give the full name of one of them: {', '.join(matches)}."
        )
    if wanted.rpartition(".")[2] in _FIXED:
        raise UserError(
            f"The field {given!r} cannot vary: it does not change what is learned, or trials that differ in it cannot "
            "be compared. Seeds are given to --seeds."
        )
    inside = [name for name in known if name.startswith(f"{wanted.partition('.')[0]}.")]
    if "." not in wanted and inside:
        raise UserError(f"{given!r} is a group of fields. Vary one of {', '.join(sorted(inside))}.")
    raise unknown("field to vary", given, inside or known)


def _dimension(name: str, hint: Any, text: str | None, listed: bool) -> Dimension:
    """Return the dimension of `--vary NAME` (text None) or `--vary NAME=TEXT`."""
    own = _range(hint)
    values: Sequence[Any] = own.values
    if text is None:
        if not values:
            raise UserError(
                f"The field {name!r} has no list of values in its definition. Give the values, as in "
                f"--vary {name}=A,B,C."
            )
        numbers = [value for value in values if value is not None]
        # Workers divide a batch evenly, so its size is one of a list.
        if not listed and name != "batch_size" and all(map(fields.is_number, numbers)):
            return _interval(name, hint, min(numbers), max(numbers))
    elif ".." in text and fields.has_type(0, hint):
        if name == "batch_size":
            raise UserError(
                f"{name}={text} is an interval, and most of its numbers cannot be divided over workers evenly. Write "
                f"{name}=A,B,C."
            )
        if listed:
            raise UserError(
                f"{name}={text} is an interval, and --searcher grid needs a list of values. Write {name}=A,B,C, or "
                "use --searcher random."
            )
        low, _, high = text.partition("..")
        return _interval(name, hint, _parsed(name, hint, low), _parsed(name, hint, high))
    else:
        values = [_parsed(name, hint, item) for item in text.split(",") if item.strip()]
        if not values:
            raise UserError(f"The range of {name!r} is empty. Write it as --vary {name}=A,B,C.")
    return Dimension(name, tuple(dict.fromkeys(values)), log=own.log, mutable=own.mutable)


def _interval(name: str, hint: Any, low: Any, high: Any) -> Dimension:
    if not (fields.is_number(low) and fields.is_number(high) and low < high):
        raise UserError(
            f"The range {low}..{high} of {name!r} is empty. Give two numbers, the lower one first."
        )
    own, whole = _range(hint), not fields.has_type(0.5, hint)
    return Dimension(name, (), low, high, whole, own.log and low > 0, own.mutable)


def _as_field_type(name: str, hint: Any, value: Any) -> Any:
    """Return a value that Ray Tune has resolved, as a plain Python value of the field's type."""
    value = value.item() if isinstance(value, np.generic) else value
    if callable(value):
        raise UserError(
            f"The value of {name!r} is a function. Give a value, or a domain such as tune.uniform(low, high)."
        )
    if fields.is_number(value) and not fields.has_type(value, hint):
        if not math.isfinite(value) or value != int(value):
            raise UserError(
                f"The field {name!r} takes whole numbers and was given {value}. Use tune.randint or tune.choice."
            )
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def _parsed(name: str, hint: Any, text: str) -> Any:
    """Return a value from the command line, of the field's type. Raise UserError when the text is no such value."""
    text = text.strip()
    read: list[Any] = [{"none": None, "true": True, "false": False}.get(text.lower(), text)]
    with contextlib.suppress(ValueError, SyntaxError):
        read.insert(0, ast.literal_eval(text))
    for value in read:
        if text and fields.has_type(value, hint):
            return float(value) if fields.is_number(value) and fields.has_type(0.5, hint) else value
    raise UserError(f"The value {text!r} of {name!r} is not allowed: it must be {fields.described(hint)}.")
