"""The names of arguments that the functions of `raysl.api` take beside those in their signatures.

Modules that need torch are imported inside of functions, as in `raysl.api.arguments`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raysl import plugins
from raysl.api.arguments import configure
from raysl.errors import UserError, unknown

if TYPE_CHECKING:
    from raysl.api.arguments import PathLike


def check_names(function: Callable[..., Any], config: Any, fields: Mapping[str, Any]) -> None:
    """Raise UserError for a field that is no argument of a function, none of `Pretraining` and no part of its method.

    A `config` or a plugin may bring other parts; then nothing is checked here.
    """
    from raysl.config import Pretraining, methods

    if config is not None or "plugin" in fields:
        return
    method = str(fields.get("method", Pretraining.method))
    own = [
        one.name for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD
    ]
    known = [
        *own,
        "image_size",
        *(field.name for field in dataclasses.fields(Pretraining)),
        *methods.parse(method).config_types(),
    ]
    for name in fields:
        if name not in known:
            raise unknown(f"argument or part of the method {method!r}:", name, set(known))


def protocols_of(
    probes: Sequence[str], given: Mapping[str, Any], plugin: PathLike | Sequence[PathLike]
) -> dict[str, Any]:
    """Return the configuration of each probe by its name.

    Args:
        probes: names of probes.
        given: configurations, or mappings of some of their fields, by the name of a probe.
        plugin: files or modules that define probes, or that the run uses.

    Raises:
        UserError: a plugin, a probe or a field does not exist, or a name is that of no probe.
    """
    from raysl import probes as all_probes

    plugins.use(plugin)
    if extra := sorted(set(given) - set(probes)):
        raise UserError(f"The argument {extra[0]!r} is neither one of `probe` nor one of {tuple(probes)}.")
    return {name: configure(all_probes.config_type(name), given.get(name), {}) for name in probes}
