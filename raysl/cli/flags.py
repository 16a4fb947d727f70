"""The flags of a run, made from its dataclasses: those of its method's parts depend on the method."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from raysl import methods, plugins, recipes
from raysl.config import Pretraining

_RECIPE = "a published run at full scale, whose values stand for those flags that are not given."


def parse_pretraining(arguments: Sequence[str], program: str) -> Pretraining:
    """Return the configuration that flags describe; see `parse`."""
    return parse(arguments, program, {})[0]


def parse(
    arguments: Sequence[str], program: str, beside: Mapping[str, type[Any]]
) -> tuple[Pretraining, dict[str, Any]]:
    """Return the configuration that flags describe, and dataclasses with flags of their own among those of the run.

    The flags of a method's parts stand under the names of their files, as in `--pirl.temperature 0.1`. `--recipe` gives
    the values of flags that are not there.

    Args:
        arguments: the words after the verb.
        program: what help calls the command.
        beside: the dataclasses, by names for the result.

    Raises:
        UserError: a value is not allowed, or the method or the recipe does not exist.
        SystemExit: a flag does not exist (2), or help was asked for (0).
    """
    for plugin in peek_all(arguments, "--plugin", ()):
        plugins.load_module(plugin)
    recipe = _peek(arguments, "--recipe", "")
    base = recipes.load(recipe, "", "") if recipe else Pretraining("", "")
    kinds = methods.parse(_peek(arguments, "--method", base.method)).config_types()
    hints = typing.get_type_hints(Pretraining, include_extras=True)
    defaults = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "parts"}
    fields: list[Any] = [(name, hints.pop(name)) for name in ("data", "run")]
    fields += [(name, hints[name], value) for name, value in defaults.items() if name in hints]
    fields += [(name, kind, base.parts.get(name, kind())) for name, kind in kinds.items()]
    fields += [(name, Annotated[kind, tyro.conf.OmitArgPrefixes], kind()) for name, kind in beside.items()]
    flags = dataclasses.make_dataclass("Flags", [*fields, ("recipe", str, "")], frozen=True)
    flags.__doc__ = f"{(Pretraining.__doc__ or '').rstrip()}\n        recipe: {_RECIPE}\n    "
    given: Any = tyro.cli(
        flags, prog=program, args=list(arguments), description=_first_line(Pretraining.__doc__)
    )
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name != "recipe"}
    parts = {name: values.pop(name) for name in kinds}
    extra = {name: values.pop(name) for name in beside}
    return Pretraining(**values, parts=parts), extra


def _peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of one flag, before all of them are parsed: the method decides which flags there are."""
    for i, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return default


def peek_all(arguments: Sequence[str], flag: str, default: Sequence[str]) -> list[str]:
    """The values of one flag that takes several, each once."""
    words = [word for argument in arguments for word in _split(argument, flag)]
    if flag not in words:
        return list(default)
    after = words[words.index(flag) + 1 :]
    return list(dict.fromkeys(itertools.takewhile(lambda value: not value.startswith("-"), after)))


def _split(argument: str, flag: str) -> list[str]:
    """FLAG=VALUE as two words; any other word as it is."""
    return [flag, argument.partition("=")[2]] if argument.startswith(flag + "=") else [argument]


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0]
