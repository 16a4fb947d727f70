"""What callers may give to the functions of `raysl.api`, and the forms that the library takes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from raysl import console
from raysl.config import Pretraining, from_dict
from raysl.errors import UserError

if TYPE_CHECKING:
    from raysl.dataset import DataSet
    from raysl.run import Run

    PathLike = str | os.PathLike[str]
    Data = PathLike | DataSet
    AnyRun = PathLike | Run

T = TypeVar("T")


def dataset(data: Data) -> DataSet:
    """Open a data set. A source that is not one yet is ingested into the cache first, for which Ray starts.

    Raises:
        UserError: nothing lies there, or it is not a source of images.
    """
    from raysl.dataset import DataSet

    if isinstance(data, DataSet):
        return data
    place = uri(data)
    if DataSet.is_one(place):
        return DataSet.open(place)
    from raysl.ingestion.sources import Place, open_source

    opened = open_source(Place.parse(place))
    start_ray()
    from raysl.ingestion import resolve

    return resolve(opened)


def run_config(
    data: Data | None,
    run: PathLike | None,
    config: Pretraining | Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> Pretraining:
    """Return the configuration of a run from an object or a mapping, in which `fields` replace values.

    Names that are not fields of `Pretraining` are parts of its method, as in `pirl={"temperature": 0.1}`.
    """
    if isinstance(config, Mapping):
        fields = {**config, **fields}
        config = None
    known = {field.name for field in dataclasses.fields(Pretraining)}
    values = {**given(data=data, run=run), **{name: value for name, value in fields.items() if name in known}}
    parts = {name: value for name, value in fields.items() if name not in known}
    if parts:
        same_method = config is not None and values.get("method", config.method) == config.method
        before = config.parts if config is not None and same_method else {}
        values["parts"] = {**before, **values.get("parts", {}), **parts}
    return configure(Pretraining, config, values)


def configure(kind: type[T], config: Any, fields: Mapping[str, Any]) -> T:
    """Return a configuration from an object or a mapping, in which `fields` replace values.

    Raises:
        UserError: `config` is of another kind, a field does not exist or lacks a value, or a value is not allowed.
    """
    if isinstance(config, Mapping):
        config, fields = None, {**config, **fields}
    if config is not None and not isinstance(config, kind):
        raise UserError(
            f"The configuration is of type {type(config).__name__}; it must be a {kind.__name__} or a mapping of its "
            "fields."
        )
    if config is None:
        return from_dict(kind, fields, "")  # type: ignore[no-any-return]
    if not fields:
        return config
    whole = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name, value in fields.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(whole.get(name)):
            value = {**dataclasses.asdict(whole[name]), **value}
        whole[name] = value
    return from_dict(kind, whole, "")  # type: ignore[no-any-return]


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None; paths, data sets and runs as text."""
    there = {name: value for name, value in values.items() if value is not None}
    return {name: value if isinstance(value, int | Sequence) else uri(value) for name, value in there.items()}


def uri(place: Any) -> str:
    """Return the place of a path, a data set, a run or a table of features."""
    if isinstance(place, str | os.PathLike):
        return os.fspath(place)
    folder = getattr(place, "folder", None)
    if folder is None:
        raise UserError(
            f"A value of type {type(place).__name__} is given where a path, a data set or a run is expected."
        )
    return str(folder)


def start_ray() -> None:
    """Start or join Ray, and say so, unless that has been done."""
    from raysl import ray_cluster

    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        with console.working("Starting Ray ..."):
            ray_cluster.start()
