"""The configuration of a run: a tree of small frozen dataclasses, each beside the class that it configures."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raysl import plugins, pretext
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig
from raysl.config import methods
from raysl.contrastive.bank import BankConfig
from raysl.dataset import DataSet
from raysl.errors import UserError, explained, quoted, unknown
from raysl.fields import Bounds, Checked, Range, Seed, check, described
from raysl.optim import OptimConfig
from raysl.stream.plan import Plan
from raysl.stream.reader import StreamConfig


@dataclass(frozen=True)
class ViewConfig(Checked):
    """The views: the augmented versions of an image that the network trains on.

    Args:
        image_size: side of a training image in pixels; the sizes of jigsaw patches follow from it.
        min_scale: smallest share of the image's area that a random crop shows, above 0 and at most 1 (PIRL at 224
            pixels: 0.08). Some pretext transforms have a `min_scale` of their own.
        recipe: color augmentation: pirl, pirl+, simclr, mocov2, npid, byol_a, byol_b, gray (for jigsaws), plain, none;
            a name followed by the steps to leave out, such as simclr-gray-blur for simclr without gray and without
            blur; or MODULE:NAME or FILE.py:NAME of a function or a torchvision v2 transform that takes and returns a
            uint8 tensor (3, h, w).
    """

    image_size: Annotated[int, Bounds(8, 2048)] = 32
    min_scale: Annotated[float, Bounds(above=0, high=1), Range((0.08, 0.2, 0.4, 0.6), log=True)] = 0.2
    recipe: Annotated[str, Range(("pirl", "pirl+", "simclr", "mocov2", "plain"))] = "pirl"

    def __post_init__(self) -> None:
        super().__post_init__()
        module, colon, name = self.recipe.rpartition(":")
        if colon:  # Workers have another working directory.
            object.__setattr__(self, "recipe", f"{plugins.remembered(module)}:{name}")

    def modules(self) -> list[str]:
        """Return the module or file of an augmentation of the user, if there is one."""
        return [self.recipe.rpartition(":")[0]] if ":" in self.recipe else []


@dataclass(frozen=True)
class Pretraining(Checked):
    """Pretrain a backbone on images without labels, or resume an unfinished run.

    Args:
        data: a data set made by `raysl ingest`, or any source that it reads, which is first ingested
            into ~/.cache/raysl or $RAYSL_CACHE.
        run: folder of the run, a path or a URI. The same command again continues an unfinished run.
        method: an objective and a pretext transform, such as pirl-jigsaw; `raysl methods` lists them. Help lists the
            flags of one method: `raysl pretrain --method simclr --help`.
        epochs: number of passes over the data set; it may be fractional.
        batch_size: images in the global batch, divided over the workers.
        workers: number of training workers. 0 lets raysl choose the number for the machine (for the scripts in
            experiments/, 0 means without Ray). A range such as 1:8 lets the number change during the run: as many
            workers as fit on the cluster and divide the batch evenly.
        seed: random seed of the run.
        precision: precision of the network's arithmetic; weights and losses stay float32.
        channels_last: store images and weights in memory with the channels last (NHWC), which most devices compute
            faster.
        compile: run the network through torch.compile.
        deterministic: on a GPU use only algorithms whose results repeat bit for bit; they are slower.
        log_every: steps between rows of metrics.jsonl.
        parts: the Config of the objective and of every transform, by name, or a JSON value of one; a part that is not
            given has the values of its class.
        plugin: your own files or modules that define objectives, transforms or probes.
    """

    data: str
    run: str
    method: str = "pirl-jigsaw"
    epochs: Annotated[float, Bounds(above=0, high=1e9)] = 10
    batch_size: Annotated[int, Bounds(1, 1_048_576), Range((64, 128, 256, 512), log=True)] = 256
    workers: int | str = 2
    seed: Seed = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    log_every: Annotated[int, Bounds(low=1)] = 10
    view: ViewConfig = field(default_factory=ViewConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    parts: Mapping[str, Any] = field(default_factory=dict)
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "plugin", plugins.add_and_trust(self.plugin))
        for module in (*self.backbone.modules(), *self.view.modules()):
            plugins.trust(module)
        config_types = methods.parse(self.method).config_types()
        for name in self.parts:
            if name not in config_types:
                if name in (field.name for field in dataclasses.fields(self)):
                    raise UserError(
                        f"`parts` has an entry {name!r}, which is an argument of its own: {name}=..."
                    )
                raise unknown_field(name, self.method)
        parts = {name: self.parts.get(name, {}) for name in config_types}
        for name, part in parts.items():
            if isinstance(part, Mapping):
                parts[name] = from_dict(config_types[name], part, name)
            elif not isinstance(part, config_types[name]):
                raise UserError(f"{name!r} is {quoted(part)}; it must be {described(config_types[name])}.")
            check(parts[name], f"{name}.")
        object.__setattr__(self, "parts", parts)
        self.worker_counts()

    def worker_counts(self) -> tuple[int, ...]:
        """Return the numbers of workers that the run may have, ascending: of a range, those that divide the batch.

        Every worker takes an equal part of the same global batch, so the learning rate is the same for all numbers.

        Raises:
            UserError: workers is neither a number nor a range, or no number of them can share the batch.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.workers))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise UserError(
                f"--workers is {quoted(self.workers)}; it must be a number of at least 1, such as 2, or a range from "
                "the fewest to the most, such as 1:8."
            )
        if self.batch_size < least:
            raise UserError(
                f"--batch-size is {self.batch_size}, less than one image for each of {least} workers. Use a larger "
                "batch or fewer workers."
            )
        counts = tuple(w for w in range(least, min(most, self.batch_size) + 1) if self.batch_size % w == 0)
        if not counts:
            workers = f"{least} workers cannot" if least == most else f"no {least} to {most} workers can"
            raise UserError(
                f"--batch-size is {self.batch_size}, which {workers} share equally. Use a multiple of {least}."
            )
        return counts

    def without_starting_weights(self) -> Pretraining:
        """Return the configuration for a model whose weights will be replaced, such as by those of a checkpoint."""
        return dataclasses.replace(self, backbone=dataclasses.replace(self.backbone, weights=""))

    def plan(self, dataset: DataSet) -> Plan:
        """Return the order of the images of the run. Raises UserError when the batch is larger than the data set."""
        return Plan.of(dataset, self.batch_size, self.seed, self.epochs)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `from_json` makes an equal configuration."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Pretraining:
        """Return the configuration in a run's metadata.

        Raises:
            UserError: a key is unknown or missing, or a value is not allowed.
        """
        return typing.cast(Pretraining, from_dict(Pretraining, value, ""))

    def sources(self) -> dict[str, str]:
        """Return hashes of the user's files and modules that the run uses. Raises UserError if one is missing."""
        names = (*self.plugin, *self.backbone.modules(), *self.view.modules())
        return {name: plugins.source_hash(name) for name in names}

    @staticmethod
    def stored(
        value: Mapping[str, Any], folder: str, sources: Mapping[str, str] | None = None
    ) -> Pretraining:
        """Return the configuration that `folder`, of a run or a sweep, holds.

        Args:
            sources: `Pretraining.sources` of the run, if it holds them.

        Raises:
            UserError: as `from_json`; or it needs a plugin that is gone or not trusted.
        """
        value = _with_new_names(value)
        backbone, view = dict(value.get("backbone", {})), dict(value.get("view", {}))
        names = [str(backbone.get("name", "")), str(view.get("recipe", ""))]
        plugin, own = value.get("plugin", ()), [name.rpartition(":")[0] for name in names if ":" in name]
        places = plugins.check_trusted([*plugin, *own], folder, sources or {})
        if places:
            parts = {"backbone": (backbone, "name"), "view": (view, "recipe")}
            now = {
                part: {**old, key: plugins.with_current_path(old[key], places)}
                for part, (old, key) in parts.items()
                if key in old
            }
            value = {**value, **now, "plugin": [places[name] for name in plugin]}
        return Pretraining.from_json(value)


def _with_new_names(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with American spelling, which fields have since December 2026."""
    parts = {name: dict(part) for name, part in value.get("parts", {}).items()}
    for name, old, new in (
        ("colorization", "neighbours", "neighbors"),
        ("mae", "standardise", "standardize"),
    ):
        if old in parts.get(name, {}):
            parts[name][new] = parts[name].pop(old)
    if parts.get("inpainting", {}).get("mode") == "centre":
        parts["inpainting"]["mode"] = "center"
    return {**value, "parts": parts}


def unknown_field(name: str, method: str, others: Iterable[str] = ()) -> UserError:
    """Return the error for an argument that is no field of `Pretraining` and no part of a method.

    Args:
        others: further names that may be given.
    """
    parts = methods.parse(method).config_types()
    known = typing.get_type_hints(Pretraining) | parts
    nested = [
        f'{group}={{"{name}": ...}}'
        for group, kind in known.items()
        if dataclasses.is_dataclass(kind) and name in (field.name for field in dataclasses.fields(kind))
    ]
    if nested:
        return UserError(f"{name!r} is no argument of its own. Give {' or '.join(nested)}.")
    if name in (*methods.objective_names(), *pretext.names()):
        return UserError(
            f"The method {method!r} has no part {name!r}; it has {' and '.join(map(repr, parts))}. Leave {name!r} "
            "out, or give another method."
        )
    return unknown(f"argument or part of the method {method!r}:", name, {*known, *others})


# Fields that may change when a run resumes: they decide where it runs and how it is kept, not what it computes.
MAY_CHANGE = ("run", "data", "workers", "stream", "save", "compile", "channels_last", "log_every", "plugin")
# Fields inside of these that change the pixels.
_FIXED_INSIDE = ("stream.decode",)


def may_change(name: str) -> bool:
    """Return True if the field of this dotted name may change when a run resumes."""
    return name.partition(".")[0] in MAY_CHANGE and name not in _FIXED_INSIDE


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two JSON configurations differ."""
    names: list[str] = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name in a JSON configuration; None if it has none."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def format_value(value: Any) -> str:
    """Return a value of a configuration as a flag takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(format_value, value)) or "empty"
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value)) if whole else str(value) or "empty"


def from_dict(kind: type[Any], value: Mapping[str, Any], prefix: str) -> Any:
    """Make a dataclass from a JSON value, and the dataclasses inside it.

    Raises:
        UserError: a key is not a field, a field without a default is missing, or a value is not allowed.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    arguments: dict[str, Any] = {}
    dotted = f"{prefix}." if prefix else ""
    for key, item in value.items():
        if key not in known:
            merged = (f.name for part in getattr(kind, "MERGED", ()) for f in dataclasses.fields(hints[part]))
            raise unknown("configuration key", f"{dotted}{key}", [*known, *merged])
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(item, Mapping):
            item = from_dict(typing.cast(type, hint), item, f"{dotted}{key}")
        elif isinstance(item, list) and _is_tuple(hint):
            item = tuple(item)
        arguments[key] = item
    for f in dataclasses.fields(kind):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in arguments:
            raise UserError(f"The configuration lacks {f'{dotted}{f.name}'!r}, which has no default.")
    what = f"The configuration {prefix or 'of the run'!r} holds a value of the wrong kind"
    with explained(what, "`raysl pretrain --help` says what each may be.", TypeError):
        return kind(**arguments)


def _is_tuple(hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_tuple(part) for part in typing.get_args(hint))
    return typing.get_origin(hint) is tuple
