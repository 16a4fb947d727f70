"""The names of arguments that the functions of `raysl.api` take beside those in their signatures.

Modules that need torch are imported inside of functions, as in `raysl.api.arguments`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raysl import plugins
from raysl.api.arguments import ONE_SOURCE, configure, named_fields, uri
from raysl.errors import UserError, quoted

if TYPE_CHECKING:
    from raysl.api.arguments import PathLike
    from raysl.config import Pretraining


def title_of(name: str) -> str:
    """Return what reports call weights: the last part of their place, and two more before a folder named by its format.

    The default folder of every export is RUN/export/FORMAT.
    """
    folder = re.search(r"(?:^|/)((?:[^/]+/){1,2}(?:torchvision|timm|safetensors|onnx))/*$", name)
    return folder[1] if folder else name.rstrip("/").rpartition("/")[2]


def check_names(
    function: Callable[..., Any], config: Any, fields: Mapping[str, Any], others: Iterable[str] = ()
) -> None:
    """Raise UserError for a field that is no argument of a function, none of `Pretraining` and no part of its method.

    A `config` or a plugin may bring other parts; then nothing is checked here. The function also takes `others`.
    """
    from raysl.config import Pretraining, methods, unknown_field

    if config is not None or "plugin" in fields:
        return
    method = str(fields.get("method", Pretraining.method))
    takes = [
        one.name for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD
    ]
    known = {"image_size", *takes, *others, *(field.name for field in dataclasses.fields(Pretraining))}
    for name in fields:
        if name not in known and name not in methods.parse(method).config_types():
            raise unknown_field(name, method, known)


def protocols_of(
    probes: Sequence[str], given: Mapping[str, Any], plugin: PathLike | Sequence[PathLike]
) -> dict[str, Any]:
    """Return the configuration of each probe by its name; `given` are such, or mappings of some of their fields.

    Raises UserError if a plugin, a probe or a field does not exist, or a name is that of no probe.
    """
    from raysl import probes as all_probes

    plugins.add_and_trust(plugin)
    if extra := sorted(set(given) - set(probes)):
        raise UserError(f"The argument {extra[0]!r} is neither one of `probe` nor one of {tuple(probes)}.")
    return {name: configure(all_probes.config_type(name), given.get(name), {}) for name in probes}


def sweep_and_run(
    function: Callable[..., Any],
    data: Any,
    base: Pretraining | Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Return the fields of a sweep, and the fields of its runs; a name that both have is one of the sweep.

    The third value is the fields of the runs with those of `base`; None if `base` is a whole configuration.

    Raises UserError if a field is one of neither, `data` is a configuration, or a plugin of the runs cannot be loaded.
    """
    from raysl.config import Pretraining as Whole
    from raysl.tuning.config import SweepConfig

    if isinstance(data, Whole):
        raise UserError(
            "The configuration of the runs is given where `data` is expected. Give it as base=..."
        )
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    of_runs = {name: value for name, value in fields.items() if name not in own}
    given = {**base, **of_runs} if isinstance(base, Mapping) else of_runs
    plugins.add_and_trust(given.get("plugin", ()))  # The configuration of a sweep looks for its probe.
    check_names(function, base if isinstance(base, Whole) else None, given, own)
    of_sweep = {name: value for name, value in fields.items() if name in own}
    own_values = {name: uri(value) if name in ONE_SOURCE else value for name, value in of_sweep.items()}
    return own_values, of_runs, None if isinstance(base, Whole) else named_fields(given)


def varied(vary: str | Sequence[str] | Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return what a sweep varies as texts, as `--vary` takes them: "lam", "lam=0.1,0.9", "lam=0.1..0.9".

    Args:
        vary: texts; or values by the name of a field: a list, one value, an interval as text, or None for the values
            that raysl suggests.

    Raises UserError if a value has a comma, which separates values.
    """
    if isinstance(vary, str):
        return (vary,)
    if not isinstance(vary, Mapping):
        if not isinstance(vary, Iterable | None):
            raise UserError(
                f"vary is {quoted(vary)}; give names of fields, or a mapping of names and values."
            )
        return None if vary is None else tuple(vary)
    return tuple(
        name if values is None else f"{name}={_values(name, values)}" for name, values in vary.items()
    )


def _values(name: str, values: Any) -> str:
    if isinstance(values, str):
        return values
    texts = [str(value) for value in (values if isinstance(values, Iterable) else [values])]
    for text in texts:
        if "," in text:
            raise UserError(f"A sweep cannot vary {name!r} over {text!r}: a value may have no comma.")
    return ",".join(texts)
