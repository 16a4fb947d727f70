"""Compute frozen features of data sets, in this process or with a pool of Ray actors.

Features are kept in parts, so that an interrupted pass goes on.
Images are seen as in the evaluation: no augmentation, the center of the image, batch normalization in evaluation mode.
Only ranges of indices are sent through Ray; actors read the images that they encode, and write their features.
"""

from __future__ import annotations

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
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl import ray_cluster
from raysl.backbone import external_weights, network, norm, small
from raysl.dataset import DataSet
from raysl.errors import UserError, explained
from raysl.extraction import encoders, reestimated
from raysl.extraction import layers as layer_names
from raysl.extraction.encoders import Encoder
from raysl.extraction.layers import Encode
from raysl.ray_cluster import gpus, placement, this_machine
from raysl.storage import Folder
from raysl.storage.feature_files import FINISHED, FeatureForm, Part, part_file, write_part
from raysl.storage.feature_store import FeatureStore
from raysl.storage.records import short_hash, write_record
from raysl.stream import decode, depth, formats, pixels

# Form of averaged layers, and form of grids, which are large.
_MEAN_FORM, _GRID_FORM = _FORMS = (FeatureForm("float32"), FeatureForm("float16"))
# Packages that decode images and compute networks.
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "simplejpeg")
_PART_IMAGES = 4096
_PART_BYTES = 32 << 20
_BATCH = 128
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class FeatureProtocol:
    """How an image becomes features."""

    image_size: int = 32  # side in pixels of the evaluation view; see `raysl.stream.decode.evaluation_views`
    layers: tuple[str, ...] = ("pooled",)  # feature specs; see `raysl.extraction.layers`
    version: int = 2  # increases when the same settings change their meaning


def extract_all(
    wanted: Sequence[tuple[Encoder, DataSet, FeatureProtocol]],
    cache: Folder,
    low_priority: bool = False,
    in_process: bool = False,
) -> list[dict[str, FeatureStore]]:
    """Compute the features of every image by every encoder, in one pass over the images for all layers.

    Layers and parts of an earlier call are not computed again.

    Args:
        wanted: encoders, data sets, and the view and layers of each. Labels are not used.
        cache: folder of the features. Subfolders are named after encoder, images, layer and size. Averages are kept
            as float32, grids as float16 if their numbers fit.
        low_priority: use one actor that reserves no CPU and yields to all other processes. With GPUs, it has one.
        in_process: compute in this process instead of actors of Ray, as on a machine that needs no Ray.

    Returns:
        The features by layer, for each of `wanted`.

    Raises UserError if a layer does not exist, an encoder takes images of another size, a data set is empty or damaged,
    a checkpoint is damaged, or the cache cannot be written.
    """
    extractions, requested = [], []
    records: dict[Folder, dict[str, Any]] = {}
    for source, dataset, protocol in wanted:
        about = describe(source, dataset, protocol)
        outputs, missing = [], []
        for layer in protocol.layers:
            record = {**about, "protocol": {**about["protocol"], "layers": [layer]}}
            key = short_hash(json.dumps(record, sort_keys=True).encode())
            name = re.sub(r"\W", "-", layer)
            output = _Output(
                layer, cache / f"{source.name}-{name}-{key}", _GRID_FORM if ":" in layer else _MEAN_FORM
            )
            outputs.append(output)
            # A data set may be asked for twice, to learn from and to be scored on.
            if output.folder not in records and not output.folder.exists(FINISHED):
                records[output.folder] = {**record, "parts": _parts(dataset), "layers": [layer]}
                missing.append(output)
        requested.append(outputs)
        if missing:
            extractions.append(_Extraction(source, dataset, protocol.image_size, tuple(missing)))
    _compute_missing(extractions, low_priority, in_process)
    for folder, record in records.items():
        write_record(folder, FINISHED, record)
    return [
        {output.layer: FeatureStore.open(str(output.folder)) for output in outputs} for outputs in requested
    ]


def describe(source: Encoder, dataset: DataSet, protocol: FeatureProtocol) -> dict[str, Any]:
    """Return a JSON value of everything that features depend on.

    Raises UserError if a layer does not exist, the encoder takes images of another size, or the data set is empty.
    """
    encoders.check_layers(source, protocol.layers)
    encoders.check_size(source, protocol.image_size)
    if dataset.num_images == 0:
        raise UserError(f"The data set {dataset.name!r} has no images. Ingest a source that has some.")
    return {
        "encoder": source.identity(),
        "fingerprint": dataset.manifest.fingerprint,
        "protocol": asdict(protocol),
        "code": _code_hash(),
    }


def compute(
    source: Encoder, dataset: DataSet, protocol: FeatureProtocol, form: FeatureForm, folder: Folder
) -> list[Part]:
    """Compute the parts of one layer that are missing in a folder, with paths, and return all parts."""
    (layer,) = protocol.layers
    extraction = _Extraction(source, dataset, protocol.image_size, (_Output(layer, folder, form),), True)
    _compute_missing([extraction])
    return extraction.parts


def _code_hash() -> str:
    """Return a hash of the code and the packages that make features, and of their format on disk."""
    reading = (decode, pixels, depth, formats)
    computing = (network, small, norm, external_weights, encoders, reestimated, layer_names)
    source = "".join(inspect.getsource(module) for module in reading + computing)
    packages = [(name, _version(name)) for name in _PACKAGES]
    return short_hash(f"{packages}{_FORMS}{source}".encode())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parts(dataset: DataSet) -> list[Part]:
    """Return ranges of indices made of whole row groups, limited in images and in bytes."""
    bytes_per_image = dataset.manifest.num_bytes / dataset.num_images
    most = max(1, min(_PART_IMAGES, int(_PART_BYTES / bytes_per_image)))
    ends = dataset.row_group_starts[1:].tolist()
    parts, first = [], 0
    for end, after in zip(ends, [*ends[1:], None], strict=True):
        if after is None or after - first > most:
            parts.append((first, end))
            first = end
    return parts


def _compute_missing(
    extractions: Sequence[_Extraction], low_priority: bool = False, in_process: bool = False
) -> None:
    """Compute the missing parts. A pool of actors computes again what was lost with an actor or a node."""
    if in_process or not (low_priority or this_machine.needs_ray()):
        here = _Actor(extractions)
        for number, extraction in enumerate(extractions):
            for part in extraction.missing():
                here.write(number, part)
        return
    for attempt in range(_MAX_ATTEMPTS):
        missing = [
            (number, *part) for number, extraction in enumerate(extractions) for part in extraction.missing()
        ]
        if not missing:
            return
        try:
            _run_pool(extractions, missing, low_priority)
            return
        except UserError:
            raise
        except Exception:
            if attempt == _MAX_ATTEMPTS - 1:
                raise


def _run_pool(
    extractions: Sequence[_Extraction], parts: Sequence[tuple[int, int, int]], low_priority: bool
) -> None:
    """Run a pool of actors over parts, each preceded by the number of its extraction."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    ray_cluster.start()
    size, resources = actor_resources(placement.machines().totals())
    if low_priority:
        size, resources = 1, {**resources, "num_cpus": 0.0}
    # Items need no read tasks, which would wait for CPUs that the actors hold.
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    items.context.enable_progress_bars = False
    items.context.print_on_execution_start = False
    with warnings.catch_warnings():
        # Deprecated by a later version of Ray; its alternatives are deprecated too.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        done = items.map_batches(
            _Actor,
            fn_constructor_args=(extractions, low_priority),
            batch_size=1,  # One part; Ray requires a number where actors use GPUs.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(size, len(parts))),
            # Ray would restart an actor from arguments that may be lost; `_compute_missing` retries instead.
            ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
            **resources,
        )
    errors = [row["error"] for row in done.iter_rows() if row["error"]]
    if errors:
        raise UserError(errors[0])


def actor_resources(resources: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """Return the number of actors on a cluster, {"CPU": n, "GPU": n}, and the resources of each: half of the CPUs."""
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    size = gpus or max(1, int(cpus))
    share = {"num_cpus": int(500 * cpus / size) / 1000}
    return size, {**share, "num_gpus": 1} if gpus else share


@dataclass(frozen=True)
class _Output:
    layer: str
    folder: Folder
    form: FeatureForm


@dataclass(frozen=True)
class _Extraction:
    """An encoder, its images, and the outputs for its features, with or without the paths of the images."""

    source: Encoder
    dataset: DataSet
    image_size: int
    outputs: tuple[_Output, ...]
    with_paths: bool = False

    @cached_property
    def parts(self) -> list[Part]:
        return _parts(self.dataset)

    def missing(self) -> list[Part]:
        """Return the parts that at least one output lacks."""
        there = set.intersection(*(set(output.folder.list()) for output in self.outputs))
        return [part for part in self.parts if part_file(part) not in there]


@dataclass
class _Actor:
    """Hold encoders, and turn ranges of indices into files of features."""

    extractions: Sequence[_Extraction]
    low_priority: bool = False
    loaded: dict[int, Encode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.low_priority:
            os.nice(19)

    @cached_property
    def device(self) -> torch.device:
        return gpus.device()

    def encode(self, number: int) -> Encode:
        """Return the encoder of an extraction; not loaded in the constructor, where Ray would hide an error."""
        if number not in self.loaded:
            extraction = self.extractions[number]
            self.loaded[number] = extraction.source.load(
                self.device, [output.layer for output in extraction.outputs]
            )
        return self.loaded[number]

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        # Decoding is the slow part beside an accelerator; without one, each CPU has an actor, or this process has all.
        return ThreadPoolExecutor(placement.assigned_cpus())

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        error = ""
        for number, first, end in batch["part"].tolist():
            try:
                self.write(number, (first, end))
            except UserError as found:
                error = str(found)
        # Returned as a value: Ray Data keeps the actors of a failed pipeline alive, and with them their CPUs.
        return {"error": np.array([error], dtype=object)}

    def write(self, number: int, part: Part) -> None:
        """Compute one part of an extraction and write its files."""
        extraction, encode = self.extractions[number], self.encode(number)
        columns = ("image", "path") if extraction.with_paths else ("image",)
        table = extraction.dataset.read(np.arange(*part, dtype=np.int64), columns)
        images = table.column("image").to_pylist()
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        made: dict[str, list[NDArray[np.float32]]] = {output.layer: [] for output in extraction.outputs}
        for pixels_bchw in self.threads.map(partial(_evaluation_views, extraction), batches):
            with torch.inference_mode():
                features = encode(pixels_bchw.to(self.device))
            for layer, values in made.items():
                values.append(features[layer].float().cpu().numpy())
        paths = table.column("path") if extraction.with_paths else None
        for output in extraction.outputs:
            rows_nd = np.concatenate(made.pop(output.layer))
            write_part(output.folder, part, output.layer, rows_nd, output.form, paths)


def _evaluation_views(extraction: _Extraction, images: list[bytes]) -> Tensor:
    what = f"An image of the data set at {str(extraction.dataset.folder)!r} was decoded at ingest and is now damaged"
    with explained(what, "Ingest the source again.", decode.DecodeError):
        return decode.evaluation_views(images, extraction.image_size)
