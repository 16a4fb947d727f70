"""Parse the flags of a run. The method decides which parts, and so which flags, there are."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from raysl import plugins
from raysl.api.arguments import ONE_SOURCE
from raysl.config import Pretraining, defaults, methods
from raysl.errors import UserError
from raysl.fields import hints as hints_of
from raysl.ingestion.found import SEVERAL
from raysl.training import recipes

_RECIPE = (
    "name of a published training recipe at full scale, such as pirl-r50-800ep; `raysl methods` lists them. Flags that "
    "you give override it."
)
_CHOSEN = tyro.conf.arg(help_behavior_hint="(default: chosen by raysl, which prints it)")


@dataclass(frozen=True)
class Parsed:
    """The flags of a run."""

    given: dict[str, Any]  # fields from flags or a recipe; see `raysl.config.defaults.choose_defaults`
    config: Pretraining  # the same, completed with the defaults of the classes
    beside: dict[str, Any]  # the additional dataclasses of `parse`, by name


def parse_pretraining(arguments: Sequence[str], program: str) -> Pretraining:
    """Return the configuration of flags, completed with the defaults of the classes."""
    return parse(arguments, program).config


def parse(arguments: Sequence[str], program: str, beside: Mapping[str, type[Any]] | None = None) -> Parsed:
    """Parse the flags of a run.

    The flags of a method's parts have the names of their files as prefix: `--pirl.temperature 0.1`. `--recipe` sets
    flags that are not given.

    Args:
        arguments: the words after the verb.
        program: name of the command in help.
        beside: additional dataclasses with flags, by name.

    Raises:
        UserError: a value is not allowed, or the method or the recipe does not exist.
        SystemExit: a flag does not exist (2), or help is requested (0).
    """
    beside = beside or {}
    plugins.add_and_trust(peek_all(arguments, "--plugin", ()))
    recipe = next(iter(peek_all(arguments, "--recipe", ())), "")
    base = recipes.load(recipe, "", "") if recipe else Pretraining("", "")
    method = next(iter(peek_all(arguments, "--method", ())), base.method)
    kinds = methods.parse(method).config_types()
    hints = typing.get_type_hints(Pretraining, include_extras=True)
    usual = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "parts"}
    fields: list[Any] = [(name, hints[name]) for name in ("data", "run")]
    own = [(name, hints[name], value) for name, value in usual.items() if name not in ("data", "run")]
    own += [(name, kind, base.parts.get(name, kind())) for name, kind in kinds.items()]
    fields += own if recipe else [_marked(*field) for field in own]
    fields += [(name, Annotated[kind, tyro.conf.OmitArgPrefixes], kind()) for name, kind in beside.items()]
    flags = dataclasses.make_dataclass("Flags", [*fields, ("recipe", str, "")], frozen=True)
    flags.__doc__ = f"{(Pretraining.__doc__ or '').rstrip()}\n        recipe: {_RECIPE}\n    "
    first_line = (Pretraining.__doc__ or "").partition("\n")[0]
    given = read(flags, program, arguments, description=first_line)
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name != "recipe"}
    extra = {name: values.pop(name) for name in beside}
    typed = {word.partition("=")[0][2:].replace("_", "-") for word in arguments if word.startswith("--")}
    explicit = values if recipe else _explicit(values, typed, "")
    return Parsed(explicit, defaults.validated_config(explicit), extra)


def read(kind: Any, program: str, words: Sequence[str], **options: Any) -> Any:
    """Return what the words after a verb give for a dataclass or a function, as `tyro.cli`.

    Raises:
        UserError: there are more words than a verb or a flag takes.
        SystemExit: a flag does not exist (2), or help is requested (0).
    """
    made, rest = tyro.cli(kind, prog=program, args=list(words), return_unknown_args=True, **options)
    if any(word.startswith("-") for word in rest):
        tyro.cli(kind, prog=program, args=list(words), **options)  # tyro names the unknown flag and exits
    if rest:
        first = list(words).index(rest[0])
        flag = next((word for word in reversed(words[:first]) if word.startswith("-")), "")
        flag = flag.partition("=")[0]
        few = ", ".join(map(repr, rest[:3])) + (f", ... ({len(rest):,} words)" if len(rest) > 3 else "")
        if flag.removeprefix("--") in ONE_SOURCE:
            raise UserError(f"{flag} takes one source, and behind it stands also {few}. {SEVERAL}")
        if program.endswith(" ingest"):
            raise UserError(
                f"`{program}` takes one SOURCE and one DEST, and behind them stands {few}. {SEVERAL}"
            )
        raise UserError(f"`{program}` does not take {few}. `{program} --help` says what it takes.")
    return made


def _marked(name: str, hint: Any, value: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """Return a field of flags whose help names the defaults that `raysl.config.defaults` chooses."""
    if f"{prefix}{name}" in defaults.CHOSEN:
        return name, Annotated[hint, _CHOSEN], value
    if not any(chosen.startswith(f"{name}.") for chosen in defaults.CHOSEN):
        return name, hint, value
    members = [(member, kind, getattr(value, member)) for member, kind in hints_of(type(value)).items()]
    inner = [_marked(*member, f"{name}.") for member in members]
    names = {"__module__": hint.__module__, "__doc__": hint.__doc__}
    kind = dataclasses.make_dataclass(hint.__name__, inner, bases=(hint,), namespace=names, frozen=True)
    return name, kind, kind(**{field: default for field, _, default in inner})


def _explicit(values: Mapping[str, Any], typed: Collection[str], prefix: str) -> dict[str, Any]:
    """Return the values of typed flags; nested dataclasses become mappings."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            if chosen := _explicit(inner, typed, f"{flag}."):
                found[name] = chosen
        elif flag in typed or (
            isinstance(value, bool) and f"{prefix}no-{flag.removeprefix(prefix)}" in typed
        ):
            found[name] = value
    return found


def peek_all(arguments: Sequence[str], flag: str, default: Sequence[str]) -> list[str]:
    """Return the distinct values of a flag before parsing, because they decide which other flags there are."""
    words = [w for one in arguments for w in (one.split("=", 1) if one.startswith(f"{flag}=") else [one])]
    if flag not in words:
        return list(default)
    # If a flag is given twice, the last one counts.
    after = words[len(words) - words[::-1].index(flag) :]
    return list(dict.fromkeys(itertools.takewhile(lambda value: not value.startswith("-"), after)))
