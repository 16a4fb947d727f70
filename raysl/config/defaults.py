"""Choose what a user leaves open: image size, backbone, batch, learning rate and more, from the images and the machine.

Small images get the recipe behind the numbers in results/ (raysl.experiment.comparison). Photos get a ResNet, as large
as the machine allows. The configuration with all choices made is what a run stores in its metadata.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raysl.backbone.network import TIMM
from raysl.config import Pretraining, differences, format_value, from_dict, methods, run_folder, value_of
from raysl.dataset import DataSet

_log = logging.getLogger("raysl.config.defaults")

# Images with a shorter side up to this many pixels are small.
SMALL_SIDE = 64
_SAMPLE = 64
# Every field that `choose_defaults` may choose. A command that is to repeat a run has to name these.
CHOSEN = frozenset(
    "backbone.name backbone.norm bank.momentum view.image_size workers batch_size precision optim.name optim.lr "
    "optim.warmup optim.weight_decay pirl.head pirl.temperature pirl.num_negatives npid.head npid.temperature "
    "npid.num_negatives simclr.norm simclr.temperature jigsaw.grid".split()
)
# A step is worth its overhead with this many images; an epoch should have a few steps.
_STEPS_PER_EPOCH = 4
_MANY = 1 << 31
# Learning rates for convolutional networks; results/recipes compares them on small images.
_RATES = {"sgd": 0.12, "adamw": 0.003, "lars": 3.0}
# Beginnings of timm's names of transformers, and of networks that are trained like them.
_TRANSFORMERS = tuple(
    "beit cait coat convit convnext crossvit davit deit eva flexivit focalnet gcvit hiera levit maxvit mvitv2 "
    "naflexvit nest pit pvt samvit swin tiny_vit tnt twins vit volo xcit".split()
)


@dataclass(frozen=True)
class Choice:
    """A value that was chosen for a field."""

    name: str  # dotted name of the field, such as "view.image_size"
    value: Any  # the value
    reason: str = ""  # why, as the end of a sentence; empty when the value needs none

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"  --{self.name.replace('_', '-')} {self.value}{reason}"


class _Images(NamedTuple):
    """The properties of a data set that the choices depend on."""

    num_images: int
    are_photos: bool


def choose_defaults(
    given: Mapping[str, Any],
    dataset: DataSet,
    default_workers: int,
    has_gpus: bool,
    varied: Collection[str] = (),
) -> Pretraining:
    """Return the configuration of a new run: fields that are given, and defaults that suit the images and the machine.

    Args:
        given: fields of `Pretraining` and of the method's parts by their names; nested mappings for nested classes.
        default_workers: number of workers that suits the machine.
        has_gpus: whether the machine or cluster has GPUs.
        varied: dotted names of fields that are chosen too, but not listed, such as those that trials vary.
    """
    wanted, side = _without_auto_workers(given), short_side(dataset)
    images = _Images(dataset.num_images, side > SMALL_SIDE)
    offered = _choices(wanted, images, default_workers, has_gpus, varied)
    choices = [choice for choice in offered if not is_given(wanted, choice.name)]
    listed = [choice for choice in choices if choice.name not in varied]
    if listed:
        _log.info(
            "Chosen for %s with a shorter side of about %d pixels; a flag replaces each:",
            *(dataset.size_text, side),
        )
    for choice in listed:
        _log.info("%s", choice)
    return _completed(wanted, choices)


def choose_for_methods(
    given: Mapping[str, Any],
    dataset: DataSet,
    base: Pretraining,
    names: Iterable[str],
    varied: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return what suits the images for each of several methods alone, by dotted names of fields.

    Args:
        given: as in `choose_defaults`.
        base: the configuration that `choose_defaults` has returned. Other methods take its number of negatives.
        names: names of the methods.
        varied: dotted names of fields that trials vary, which are not chosen.
    """
    images = _Images(dataset.num_images, short_side(dataset) > SMALL_SIDE)
    has_negatives = any(hasattr(part, "num_negatives") for part in base.parts.values())
    found: dict[str, dict[str, Any]] = {}
    equal = "epochs" if "optim.lr" in varied else "learning rate and epochs"
    _log.info("All methods have the same %s; an epoch of some takes longer. Each also has:", equal)
    for name in names:
        found[name] = {
            choice.name: choice.value
            for choice in _of_method_and_images(name, images, given, varied)
            if choice.name not in varied
            and not is_given(given, choice.name)
            and not (has_negatives and choice.name.endswith(".num_negatives"))
        }
        chosen = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in found[name].items())
        _log.info("  %s: %s", name, chosen or "no other choices")
    return found


def possible_configs(given: Mapping[str, Any]) -> list[Pretraining]:
    """Return what `choose_defaults` would choose for many small images, and for photos without and with GPUs."""
    wanted = _without_auto_workers(given)
    cases = ((False, False), (True, False), (True, True))
    return [_completed(wanted, _choices(wanted, _Images(_MANY, photos), 1, gpus)) for photos, gpus in cases]


def _completed(wanted: Mapping[str, Any], choices: Iterable[Choice]) -> Pretraining:
    """Return the configuration of the fields that are wanted, and of choices for the rest."""
    values: dict[str, Any] = {}
    for choice in choices:
        group, _, last = choice.name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[last] = choice.value
    return from_fields(_merged(values, wanted))


def resume(begun: Pretraining, given: Mapping[str, Any], default_workers: int, has_gpus: bool) -> Pretraining:
    """Return the configuration of a run that exists: what it was begun with, and what is given now."""
    wanted = _without_auto_workers(given)
    values = begun.to_json()
    parts = values.pop("parts")
    # Two workers without GPUs fit everywhere, and go on exactly.
    if begun.batch_size % default_workers == 0 and (has_gpus or str(begun.workers) != "2"):
        values["workers"] = default_workers
    if wanted.get("method", begun.method) == begun.method:
        values |= parts
    return from_fields(_merged(values, wanted))


def log_taken(made: Pretraining, given: Mapping[str, Any]) -> None:
    """Log what a resumed run has that is neither given nor the value of the classes. `CHOSEN` comes last."""
    given = _without_auto_workers(given)
    plain = Pretraining(made.data, made.run, made.method, plugin=made.plugin)
    values = made.to_json()
    names = (["method"] if made.method != Pretraining.method else []) + differences(plain.to_json(), values)
    left = {
        name.removeprefix("parts."): format_value(value_of(values, name))
        for name in names
        if name != "workers"
    }
    order = sorted(left, key=lambda name: (name != "method", name in CHOSEN))
    taken = [f"{name.replace('_', '-')} {left[name]}" for name in order if not is_given(given, name)]
    if taken:
        _log.info("Taken from the run: %s.", ", ".join(taken))


def _without_auto_workers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a number of workers that is 0, which stands for the default number."""
    return {name: value for name, value in given.items() if name != "workers" or value not in (0, "0")}


def from_fields(fields: Mapping[str, Any]) -> Pretraining:
    """Return a configuration from fields of `Pretraining` and of parts, such as {"pirl": {"temperature": 0.1}}."""
    known = {field.name for field in dataclasses.fields(Pretraining)}
    own = {name: value for name, value in fields.items() if name in known}
    parts = {name: value for name, value in fields.items() if name not in known}
    if parts:
        own["parts"] = _merged(parts, own.get("parts", {}))
    made: Pretraining = from_dict(Pretraining, own, "")
    return made


def validated_config(given: Mapping[str, Any]) -> Pretraining:
    """Return the configuration with the values of the classes for what is not given, without data or machine.

    Raises:
        UserError: a value that is given is not allowed, or the folder of the run holds something else.
    """
    wanted = _without_auto_workers(given)
    least = str(wanted.get("workers", 1)).partition(":")[0]
    # The batch that will be chosen can be shared by the workers, and their number suits a batch that is given.
    batch = {"batch_size": 256 * int(least)} if least.isdecimal() and int(least) else {}
    made = from_fields({"workers": 1, **batch, **wanted})
    if made.run != "-":  # "-" stands for no run
        run_folder.check_free(made.run)
    return made


def replaced(config: Pretraining, fields: Mapping[str, Any]) -> Pretraining:
    """Return a configuration with other values for some fields; parts of another method get their defaults."""
    if not fields:
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    parts = values.pop("parts")
    if fields.get("method", config.method) == config.method:
        values |= parts
    for name, value in values.items():
        if isinstance(fields.get(name), Mapping):
            values[name] = dataclasses.asdict(value)
    return from_fields(_merged(values, fields))


def short_side(dataset: DataSet) -> int:
    """Return the median of the shorter sides of the first images, in pixels."""
    indices = np.arange(min(_SAMPLE, dataset.num_images), dtype=np.int64)
    files = dataset.read(indices, ("image",)).column("image").to_pylist()
    return int(np.median([min(Image.open(io.BytesIO(file)).size) for file in files]))


def _choices(
    given: Mapping[str, Any],
    images: _Images,
    default_workers: int,
    has_gpus: bool,
    varied: Collection[str] = (),
) -> Iterator[Choice]:
    num_images, photos = images
    method = given.get("method", "pirl-jigsaw")
    yield Choice("method", method)
    if str(_name(given, "backbone")).startswith(TIMM):
        yield Choice("view.image_size", 224, "most networks of timm are made for it")
    elif not photos:
        yield Choice("backbone.name", "small")
        yield Choice("view.image_size", 32)
    elif has_gpus:
        yield Choice("backbone.name", "resnet50")
        yield Choice("view.image_size", 224)
    else:
        yield Choice("backbone.name", "resnet18")
        yield Choice("view.image_size", 96, "without a GPU, 224 pixels take five times as long")
    workers, batch_size = given.get("workers", default_workers), int(given.get("batch_size", 0))
    if "workers" not in given and batch_size % default_workers:
        workers = next(count for count in range(default_workers, 0, -1) if batch_size % count == 0)
        yield Choice("workers", workers, "more cannot share the batch equally")
    else:
        yield Choice("workers", workers)
    if has_gpus:
        yield Choice("precision", "bf16", "there are GPUs")
    yield _batch_size(num_images, workers, most=64 if photos and not has_gpus else 256)
    yield from _of_optimizer(given)
    own = _of_method_and_images(method, images, given, varied)
    # For several methods, `choose_for_methods` chooses the rest.
    yield from (one for one in own if "method" not in varied or one.name.endswith(".num_negatives"))


def _of_optimizer(given: Mapping[str, Any]) -> Iterator[Choice]:
    """Yield the optimizer of a backbone, and a learning rate that suits both.

    Transformers get AdamW, with the rate of DINO (Caron et al. 2021) and the weight decay of MAE (He et al. 2022). A
    learning rate that is given alone is one of SGD.
    """
    name = str(_name(given, "optim"))
    transformers = tuple(f"{TIMM}{start}" for start in _TRANSFORMERS)
    adamw = name == "adamw" or (not name and not is_given(given, "optim.lr"))
    if adamw and str(_name(given, "backbone")).startswith(transformers):
        yield Choice("optim.name", "adamw", "suits transformers and ConvNeXt")
        yield Choice("optim.lr", 0.0005)
        yield Choice("optim.weight_decay", 0.05)
    elif name in ("", *_RATES):
        yield Choice("optim.lr", _RATES[name or "sgd"])
    yield Choice("optim.warmup", 0.05)


def _name(given: Mapping[str, Any], part: str) -> Any:
    """Return the name of a backbone or optimizer, given as a mapping or a configuration; "" if it is not given."""
    value = given.get(part, {})
    return value.get("name", "") if isinstance(value, Mapping) else getattr(value, "name", "")


def _batch_size(num_images: int, workers: int | str, most: int) -> Choice:
    """Return the largest power of two that leaves a few steps in an epoch, times what the workers divide."""
    least = int(str(workers).partition(":")[0])
    size = most
    while size > 2 * least and size > num_images // _STEPS_PER_EPOCH:
        size //= 2
    size = max(least, size - size % least)
    return Choice("batch_size", size, "few images" if size < most else "")


def _of_method_and_images(
    name: str, images: _Images, given: Mapping[str, Any], varied: Collection[str]
) -> Iterator[Choice]:
    yield from _of_method(name, images.num_images)
    if not images.are_photos:
        permutations = "jigsaw.num_permutations"
        yield from _of_short_runs(name, permutations in varied or is_given(given, permutations))


def _of_method(name: str, num_images: int) -> Iterator[Choice]:
    """Yield what the results use for an objective, and negatives that the data set has."""
    objective = methods.parse(name).objective
    if objective in ("pirl", "npid"):
        yield Choice(f"{objective}.head", "bn")
        yield Choice(f"{objective}.temperature", 0.2)
        negatives = min(4096, max(1, num_images - 1))
        yield Choice(f"{objective}.num_negatives", negatives, "few images" if negatives < 4096 else "")
    elif objective == "simclr":
        yield Choice("simclr.norm", "batch")
        yield Choice("simclr.temperature", 0.2)
    elif objective == "cpc":
        yield Choice("backbone.norm", "group")


def _of_short_runs(name: str, has_permutations: bool) -> Iterator[Choice]:
    """Yield what a short run on small images learns more from; see results/recipes.

    Two by two patches have only 24 permutations, which may be fewer than the number that is given.
    """
    method = methods.parse(name)
    if method.objective in ("pirl", "npid"):
        yield Choice("bank.momentum", 0.0, "in short runs, old embeddings are noise")
    if method.objective == "pirl" and "jigsaw" in method.transforms and not has_permutations:
        yield Choice("jigsaw.grid", 2, "small images, so larger patches")


def is_given(given: Mapping[str, Any], name: str) -> bool:
    """Return whether the fields that a user gives hold the field of a dotted name."""
    first, _, rest = name.partition(".")
    if first not in given:
        # Parts may be given as a field of their own.
        return "parts" in given and first != "parts" and is_given(given["parts"], name)
    return not rest or not isinstance(given[first], Mapping) or is_given(given[first], rest)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings, in which the values of `over` win."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
