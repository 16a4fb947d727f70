"""The configuration of a run: small frozen dataclasses, each beside the class it configures, in one tree."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raysl import methods, plugins
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig
from raysl.contrastive.bank import BankConfig
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.fields import Range
from raysl.optim import OptimConfig
from raysl.stream.plan import Plan
from raysl.stream.reader import StreamConfig


@dataclass(frozen=True)
class ViewConfig:
    """What the network sees.

    Args:
        image_size: side of an ordinary view in pixels; the sizes of jigsaw patches follow from it.
        min_scale: smallest share of the image's area that an ordinary view shows (PIRL at 224 pixels: 0.08).
        recipe: the photometric augmentation: pirl, pirl+, simclr, mocov2, npid, gray (of jigsaws), plain or none.
    """

    image_size: int = 32
    min_scale: Annotated[float, Range((0.08, 0.2, 0.4, 0.6), log=True)] = 0.2
    recipe: Annotated[str, Range(("pirl", "pirl+", "simclr", "mocov2", "plain"))] = "pirl"

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise UserError(f"view.image_size is {self.image_size}; it must be at least 8 pixels.")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"view.min_scale is {self.min_scale}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class Pretraining:
    """One pretraining run.

    Args:
        data: a data set made by `raysl ingest`, or any source that it takes; that is then ingested to a cache first.
        run: folder of the run, a path or a URI. The same command again continues an unfinished run.
        method: an objective and a pretext transform, such as pirl-jigsaw; `raysl methods` lists them.
        epochs: visits to every image.
        batch_size: images in the global batch, divided over the workers.
        workers: Ray Train workers: a number, or a range such as 1:8, of which as many run as the cluster has room for
            and as divide the batch.
        seed: of everything random.
        precision: of the network's arithmetic; weights and losses stay float32.
        channels_last: memory layout of images and weights.
        compile: run the network through torch.compile.
        log_every: steps between rows of metrics.jsonl.
        parts: the Config of the objective and of every transform, by name, or a JSON value of one; those that are
            not given have their defaults.
        plugin: files or modules from outside of raysl that define objectives or transforms.
    """

    data: str
    run: str
    method: str = "pirl-jigsaw"
    epochs: float = 10
    batch_size: Annotated[int, Range((64, 128, 256, 512), log=True)] = 256
    workers: int | str = 2
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    log_every: int = 10
    view: ViewConfig = field(default_factory=ViewConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    parts: Mapping[str, Any] = field(default_factory=dict)
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "plugin", tuple(plugins.remembered(one) for one in self.plugin))
        for one in self.plugin:
            plugins.load_module(one)
        types_ = methods.parse(self.method).config_types()
        for name in self.parts:
            if name not in types_:
                raise unknown(f"part of the method {self.method!r}", name, types_)
        parts = {name: self.parts.get(name, {}) for name in types_}
        for name, part in parts.items():
            if isinstance(part, Mapping):
                parts[name] = from_dict(types_[name], part, name)
        object.__setattr__(self, "parts", parts)
        _check_choices(self, "")
        for name, part in parts.items():
            _check_choices(part, f"{name}.")
        self.worker_counts()
        if self.log_every < 1:
            raise UserError(f"log_every is {self.log_every}; it must be at least 1.")

    def worker_counts(self) -> tuple[int, ...]:
        """The numbers of workers that the run may have, in order: one, or those of a range that divide the batch.

        Every worker takes an equal part of the same global batch, so the learning rate is the same for all of them.

        Raises:
            UserError: workers is neither a number nor a range, or no number of them can share the batch.
        """
        given = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.workers))
        least, most = (int(given[1]), int(given[2] or given[1])) if given else (0, 0)
        if not 1 <= least <= most:
            raise UserError(
                f"workers is {self.workers!r}; it must be a number of at least 1, such as 2, or a range of them from "
                "the fewest to the most, such as 1:8."
            )
        if self.batch_size < least:
            raise UserError(
                f"batch_size is {self.batch_size}, less than one image for each of {least} workers. Use a larger batch "
                "or fewer workers."
            )
        counts = tuple(w for w in range(least, min(most, self.batch_size) + 1) if self.batch_size % w == 0)
        if not counts:
            those = f"{least} workers cannot" if least == most else f"no {least} to {most} workers can"
            raise UserError(
                f"batch_size is {self.batch_size}, which {those} share equally. Use a multiple of {least}."
            )
        return counts

    def plan(self, dataset: DataSet) -> Plan:
        """Return the order of the images of the run. Raises UserError when the batch is larger than the data set."""
        return Plan.of(dataset, self.batch_size, self.seed, self.epochs)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal configuration."""
        value: dict[str, Any] = dataclasses.asdict(self)
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Pretraining:
        """The configuration of a metadata.

        Raises:
            UserError: a key is unknown or missing, or a value is not allowed.
        """
        return typing.cast(Pretraining, from_dict(Pretraining, value, ""))


# What may differ when a run goes on: where it runs and how it is kept, and not what it computes.
FREE = ("run", "data", "workers", "stream", "save", "compile", "channels_last", "log_every", "plugin")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the fields in which two JSON configurations differ."""
    names: list[str] = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b and not (
            isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and list(a) == list(b)
        ):
            names.append(f"{prefix}{key}")
    return names


def from_dict(kind: type[Any], value: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a JSON value; dataclasses inside it too.

    Raises:
        UserError: a key is not a field (answers with the nearest one), a field without a default is missing, or a
            value is of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    arguments: dict[str, Any] = {}
    for key, item in value.items():
        if key not in known:
            raise unknown("configuration key", f"{prefix}.{key}".lstrip("."), known)
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(item, Mapping):
            item = from_dict(typing.cast(type, hint), item, f"{prefix}.{key}".lstrip("."))
        elif isinstance(item, list) and _is_tuple(hint):
            item = tuple(item)
        arguments[key] = item
    for f in dataclasses.fields(kind):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in arguments:
            raise UserError(
                f"The configuration lacks {f'{prefix}.{f.name}'.lstrip('.')!r}, which has no default."
            )
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(
            f"The configuration {prefix or 'of the run'!r} holds a value of the wrong kind: {error}. `raysl pretrain "
            "--help` says what each may be."
        ) from error


def _is_tuple(hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_tuple(part) for part in typing.get_args(hint))
    return typing.get_origin(hint) is tuple


def _check_choices(config: Any, prefix: str) -> None:
    """Raises UserError for a value that is not among those of its Literal, here or in a dataclass inside."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise unknown(f"{prefix}{name}", str(value), map(str, typing.get_args(hint)))
