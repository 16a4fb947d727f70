"""Frozen features of a data set: computed once by actors that hold the encoder, kept in parts, resumable.

An image is seen as the evaluation sees it: no augmentation, the centre of the image, batch normalisation in
evaluation mode. Only ranges of indices travel through Ray; images are read where they are encoded, and features are
written where they are made.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.backbone import external_weights, network
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.extraction import encoders
from raysl.extraction.encoders import Encode, Encoder
from raysl.extraction.table import DONE, FeatureForm, FeatureProtocol, FeatureTable, Floats, Part, file, write
from raysl.ray_cluster import placement
from raysl.storage import Folder
from raysl.stream import decode, depth, formats, pixels

# Of a layer averaged over its places, and of one that keeps some of them.
_FORMS = (FeatureForm("float32"), FeatureForm("float16"))
# Packages that decode images and hold networks.
_MADE_WITH = ("torch", "torchvision", "timm", "pillow", "simplejpeg")
_PART_IMAGES = 4096
_PART_BYTES = 32 << 20
_BATCH = 128
_ATTEMPTS = 3


def extract(
    source: Encoder, dataset: DataSet, protocol: FeatureProtocol, cache: Folder
) -> dict[str, FeatureTable]:
    """The features of every image of one data set; see `extract_all`."""
    return extract_all([(source, dataset, protocol)], cache)[0]


def extract_all(
    wanted: Sequence[tuple[Encoder, DataSet, FeatureProtocol]], cache: Folder, spare: bool = False
) -> list[dict[str, FeatureTable]]:
    """The features of every image by every encoder, by one pool of actors that see each image once for all layers.
    Layers and parts that are there from an earlier call are not computed again. Ray must run.

    Args:
        wanted: encoders, the data sets whose images each of them sees, size of the view and layers; labels are not
            looked at.
        cache: features are put into folders inside, whose names follow from encoder, images, layer and size. Means
            are kept as float32; grids, which are large, as float16 where that holds them.
        spare: by one actor that takes no CPU from others: it works when nothing else wants to. On a cluster with GPUs
            it has one of them.

    Returns:
        A table for each layer, for each of `wanted`.

    Raises:
        UserError: a layer does not exist, an encoder takes images of another size, a data set has no images or is
            damaged, a checkpoint is damaged, or the cache cannot be written.
    """
    works, tables = [], []
    finished: dict[Folder, dict[str, Any]] = {}
    for source, dataset, protocol in wanted:
        about = describe(source, dataset, protocol)
        places, absent = {}, []
        for layer in protocol.layers:
            facts = {**about, "protocol": {**about["protocol"], "layers": [layer]}}
            key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
            name = re.sub(r"\W", "-", layer)
            place = _Place(layer, cache / f"{source.name}-{name}-{key}", _FORMS[":" in layer])
            # A set that is asked for twice, to learn from and to be judged on, is seen once.
            done = finished.get(place.folder) or _done(place.folder)
            if done is None:
                absent.append(place)
                done = finished[place.folder] = {**facts, "parts": _parts(dataset)}
            # Those that were written: images that are the same may lie in other row groups now.
            parts = tuple((first, end) for first, end in done["parts"])
            places[layer] = FeatureTable(place.folder, parts, (layer,))
        tables.append(places)
        if absent:
            works.append(_Extract(source, dataset, protocol.image_size, tuple(absent)))
    _complete(works, spare)
    for folder, facts in finished.items():
        folder.write_json(DONE, facts)
    return tables


def _done(folder: Folder) -> dict[str, Any] | None:
    """What a folder of finished features says about them; None where they are not."""
    return folder.read_json(DONE) if folder.exists(DONE) else None


def describe(source: Encoder, dataset: DataSet, protocol: FeatureProtocol) -> dict[str, Any]:
    """A JSON value of all that features depend on.

    Raises:
        UserError: a layer does not exist, the encoder takes images of another size, or the data set has no images.
    """
    known = source.layers
    for layer in protocol.layers:
        if not re.fullmatch(r"[^:]+(:[1-9]\d*)?", layer) or encoders.layer_of(layer) not in known:
            raise unknown(f"layer of the {source.name} encoder", layer, known)
    encoders.check_size(source, protocol.image_size)
    if dataset.num_images == 0:
        raise UserError(
            f"The data set at {str(dataset.folder)!r} has no images. Ingest a source that has some."
        )
    return {
        "encoder": source.identity(),
        "fingerprint": dataset.manifest.fingerprint,
        "protocol": asdict(protocol),
        "code": _code(),
    }


def compute(
    source: Encoder, dataset: DataSet, protocol: FeatureProtocol, form: FeatureForm, folder: Folder
) -> FeatureTable:
    """Computes the parts of one layer that are not in the folder. Whose features lie there is the caller's business."""
    (layer,) = protocol.layers
    work = _Extract(source, dataset, protocol.image_size, (_Place(layer, folder, form),))
    if not folder.exists(DONE):
        _complete([work])
    return FeatureTable(folder, tuple(work.parts), protocol.layers)


def _code() -> str:
    """A hash of what features depend on besides their protocol: the code that makes them, what it is made with, and
    the form that they are kept in."""
    modules = (decode, pixels, depth, formats, network, encoders, external_weights)
    source = "".join(inspect.getsource(module) for module in modules)
    made_with = [(name, _version(name)) for name in _MADE_WITH]
    return hashlib.blake2b(f"{made_with}{_FORMS}{source}".encode(), digest_size=8).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parts(dataset: DataSet) -> list[Part]:
    """Ranges of indices made of whole row groups, of limited length and number of bytes. Pure."""
    bytes_per_image = dataset.manifest.num_bytes / dataset.num_images
    most = max(1, min(_PART_IMAGES, int(_PART_BYTES / bytes_per_image)))
    ends = dataset.row_group_starts[1:].tolist()
    parts, first = [], 0
    for end, after in zip(ends, [*ends[1:], None], strict=True):
        if after is None or after - first > most:
            parts.append((first, end))
            first = end
    return parts


def _complete(works: Sequence[_Extract], spare: bool = False) -> None:
    """Computes the parts that are not there, and again those that an actor or a node took with it when it died."""
    for attempt in range(_ATTEMPTS):
        missing = [(number, *part) for number, work in enumerate(works) for part in work.missing()]
        if not missing:
            return
        try:
            _compute(works, missing, spare)
            return
        except UserError:
            raise
        except Exception:
            if attempt == _ATTEMPTS - 1:
                raise


def _compute(works: Sequence[_Extract], parts: Sequence[tuple[int, int, int]], spare: bool) -> None:
    """Runs a pool of actors over parts, each with the number of its work in front."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    size, resources = pool(placement.machines().totals())
    if spare:
        size, resources = 1, {**resources, "num_cpus": 0.0}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # From items and not from a range: no read tasks, which would wait for CPUs that the actors hold.
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    with warnings.catch_warnings():
        # Deprecated as from a version of Ray that raysl does not take yet; the other ways to say it are too.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        done = items.map_batches(
            _Actor,
            fn_constructor_args=(works, spare),
            batch_size=1,  # one part; Ray wants a number where actors take GPUs
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(size, len(parts))),
            # Ray would restart an actor from arguments that may be gone, and says so on every start; `_complete`
            # retries.
            ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
            **resources,
        )
    errors = [row["error"] for row in done.iter_rows() if row["error"]]
    if errors:
        raise UserError(errors[0])


def pool(resources: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """How many actors extract, and what each of them takes: half of the CPUs, so that others are never shut out.

    Args:
        resources: {"CPU": n, "GPU": n} of the cluster.
    """
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    size = gpus or max(1, int(cpus))
    share = {"num_cpus": int(500 * cpus / size) / 1000}
    return size, {**share, "num_gpus": 1} if gpus else share


@dataclass(frozen=True)
class _Place:
    """Where and how the features of a layer are kept."""

    layer: str
    folder: Folder
    form: FeatureForm


@dataclass(frozen=True)
class _Extract:
    """An encoder, the images that it sees, and where its features go."""

    source: Encoder
    dataset: DataSet
    image_size: int
    places: tuple[_Place, ...]

    @cached_property
    def parts(self) -> list[Part]:
        return _parts(self.dataset)

    def missing(self) -> list[Part]:
        """The parts that are not in every folder."""
        there = set.intersection(*(set(place.folder.list()) for place in self.places))
        return [part for part in self.parts if file(part) not in there]


@dataclass
class _Actor:
    """Holds encoders and turns ranges of indices into files of features."""

    works: Sequence[_Extract]
    spare: bool = False
    device: torch.device = field(default_factory=lambda: _device())
    loaded: dict[int, Encode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.spare:
            os.nice(19)

    def encode(self, number: int) -> Encode:
        """The encoder of a work. Not loaded in the constructor, where Ray would start the actor again instead of
        handing on the error."""
        if number not in self.loaded:
            work = self.works[number]
            self.loaded[number] = work.source.load(self.device, [place.layer for place in work.places])
        return self.loaded[number]

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        # Decoding is the slow part beside an accelerator; without one there is an actor for every CPU.
        return ThreadPoolExecutor(placement.assigned_cpus())

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        error = ""
        for number, first, end in batch["part"].tolist():
            try:
                self.write(number, (first, end))
            except UserError as mendable:
                error = str(mendable)
        # As a value: Ray Data would leave the actors of a pipeline that failed alive, and with them their CPUs.
        return {"error": np.array([error], dtype=object)}

    def write(self, number: int, part: Part) -> None:
        """Computes one part of a work and writes its file."""
        work, encode = self.works[number], self.encode(number)
        table = work.dataset.read(np.arange(*part, dtype=np.int64), ("image",))
        images = table.column("image").to_pylist()
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        made: dict[str, list[Floats]] = {place.layer: [] for place in work.places}
        for pixels_bchw in self.threads.map(partial(_view, work), batches):
            with torch.inference_mode():
                features = encode(pixels_bchw.to(self.device))
            for layer, values in made.items():
                values.append(features[layer].float().cpu().numpy())
        for place in work.places:
            write(place.folder, part, {place.layer: np.concatenate(made.pop(place.layer))}, place.form)


def _view(work: _Extract, images: list[bytes]) -> Tensor:
    """The evaluation view of encoded images."""
    try:
        return decode.centre(images, work.image_size)
    except decode.DecodeError as error:
        raise UserError(
            f"An image of the data set at {str(work.dataset.folder)!r} that could be decoded when it was ingested no "
            f"longer can: {error}. A shard is damaged; ingest the source again."
        ) from error


def _device() -> torch.device:
    """The GPU that Ray has assigned, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
