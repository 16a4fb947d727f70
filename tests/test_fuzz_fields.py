"""Thousands of bad values, made from the configuration classes: each is refused in one sentence, none with a traceback.

Names of folders, files and probes are looked up later, where they are used.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

import raysl
from raysl.__main__ import main
from raysl.clustering.options import KMeansConfig
from raysl.errors import UserError
from raysl.extraction.features import FeaturesConfig
from raysl.fields import Bounds, hints

NAN, INF = float("nan"), float("inf")
# Values of fields without a default.
GIVEN = {"k": 10, "vary": ("pirl.temperature",), "data": "shapes:8"}
# Classes of a base alone, and dataclasses of Ray.
LEFT_OUT = ("FinetuningConfig", "_LoopbackConfig")


def configurations() -> list[type[Any]]:
    """Return every class of the library that a user configures something with."""
    found = []
    for module in pkgutil.walk_packages(raysl.__path__, "raysl."):
        if module.name.startswith("raysl.cli") or module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            own = isinstance(kind, type) and kind.__module__ == module.name and dataclasses.is_dataclass(kind)
            if own and (name.endswith("Config") or name == "Pretraining") and name not in LEFT_OUT:
                found.append(kind)
    return found


def required(kind: Any) -> dict[str, Any]:
    missing = dataclasses.MISSING
    fields = [
        field for field in dataclasses.fields(kind) if field.default is field.default_factory is missing
    ]
    return {field.name: GIVEN.get(field.name, "x") for field in fields}


def bad(hint: Any, bounds: Bounds | None = None) -> list[Any]:
    """Return values that a field of this type must refuse."""
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), bounds)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [{repr(value): value for value in bad(part, bounds)} for part in inner]
        return [value for key, value in parts[0].items() if all(key in part for part in parts)]
    if origin is tuple:
        element = [(value,) for value in bad(inner[0], bounds)]
        return ["abc", 3, None, [1], *element]
    kinds: dict[Any, list[Any]] = {
        bool: [1, 0, "yes", None, NAN],
        int: [1.5, "7", True, None, NAN, INF, [], {}, "٣", -(2**70), 2**64, 10**400],
        float: ["0.5", True, None, NAN, INF, -INF, [], 10**400],
        str: [3, None, b"x", 1.5, [], True, "\0", "\ud800", "x" * 100_000],
        Path: [3, NAN, b"x", Path("a\0")],
        types.NoneType: [object(), 3, NAN, INF, "x", [], {}, True, 1.5, 2**64, 10**400],
    }
    if origin is Literal:
        return ["nope", "", 7, None, NAN, "\u202e"]
    if dataclasses.is_dataclass(hint):
        return [3, "x", None, {"a": 1}]
    values = list(kinds.get(hint, []))
    if bounds is not None and hint in (int, float):
        values += [limit for limit in (bounds.above, bounds.below) if limit is not None]
        if bounds.low is not None:
            values.append(int(bounds.low) - 1 if hint is int else math.nextafter(bounds.low, -INF))
        if bounds.high is not None:
            values.append(int(bounds.high) + 1 if hint is int else math.nextafter(bounds.high, INF))
    return values


def cases() -> Iterator[tuple[type[Any], str, Any]]:
    for kind in configurations():
        for name, hint in hints(kind).items():
            for value in bad(hint):
                yield kind, name, value


def test_every_configuration_refuses_bad_values() -> None:
    tried, wrong = 0, []
    for kind, name, value in cases():
        tried += 1
        try:
            kind(**{**required(kind), name: value})
        except UserError as error:
            if "\n\n" in str(error) or not str(error).endswith("."):
                wrong.append((kind, name, repr(value)[:40], "no sentence", str(error)[:200]))
        except Exception as error:
            wrong.append((kind, name, repr(value)[:40], type(error).__name__, str(error)[:200]))
        else:
            wrong.append((kind, name, repr(value)[:40], "accepted", ""))
    assert not wrong, "\n".join(map(str, wrong))
    assert tried >= 2000


def test_help_does_not_break_its_lines_early() -> None:
    """In help, a line that begins with no letter starts a new line."""
    for kind in configurations():
        arguments = (inspect.getdoc(kind) or "").partition("Args:")[2]
        assert not re.findall(r"^ {8}[^A-Za-z ].*", arguments, re.MULTILINE), kind


def words(kind: Any, prefix: str = "") -> Iterator[list[str]]:
    """Yield flags of a class with a bad value each, as a person would type them."""
    for name, hint in hints(kind).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(hint):
            yield from words(hint, f"{flag}.")
            continue
        bounds = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Bounds)), None)
        numeric = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if numeric in (int, float):
            yield [f"--{flag}", "nan"]
            yield [f"--{flag}", "1e999"]
            if bounds is not None and bounds.low is not None:
                yield [f"--{flag}", str(int(bounds.low) - 1)]
        elif get_origin(numeric) is Literal:
            yield [f"--{flag}", "nope"]


VERBS: dict[str, tuple[list[str], Any]] = {
    "cluster": (["features", "--k", "5"], KMeansConfig),
    "features": (["random", "--data", "shapes:8", "--out", "out"], FeaturesConfig),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_refuses_bad_values_by_flag(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start, kind = VERBS[verb]
    tried = 0
    for typed in words(kind):
        with pytest.raises(SystemExit) as caught:
            main([verb, *start, *typed])
        text = capsys.readouterr().err
        assert caught.value.code == 2, typed
        assert typed[0] in text, (typed, text)
        assert "Traceback" not in text
        tried += 1
    assert tried > 10
    assert not list(tmp_path.iterdir())
