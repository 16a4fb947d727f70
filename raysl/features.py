"""Frozen features of a data set: computed once by actors that hold the encoder, kept in parts, resumable.

    features.json                              written last: whose features these are
    pooled-0000000000-0000004096.npy           float32 (images, dim), for a range of indices

An image is seen as the evaluation sees it: no augmentation, the centre of the image, batch normalisation in
evaluation mode. Only ranges of indices travel through Ray; images are read where they are encoded, and features are
written where they are made.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from raysl import train, trunk
from raysl.checkpoint import Checkpoint
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream import decode

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Encode = Callable[[Tensor], Mapping[str, Tensor]]

DONE = "features.json"
_PART_IMAGES = 4096
_PART_BYTES = 32 << 20
_BATCH = 128
_ATTEMPTS = 3
_PIXELS_SIZE = 32


@dataclass(frozen=True)
class FeatureProtocol:
    """How an image becomes features.

    Args:
        image_size: side in pixels of the evaluation view; see `raysl.stream.decode.centre`.
        layers: names of what is taken out of the encoder. "pooled" is the output of the trunk.
        version: raised when the same settings come to mean something else.
    """

    image_size: int = 32
    layers: tuple[str, ...] = ("pooled",)
    version: int = 1


class Encoder(Protocol):
    """Turns images into features. Small and picklable: weights are loaded where they are used.

    Attributes:
        name: what it is called in tables.
        layers: what it can give.
    """

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    def identity(self) -> dict[str, Any]:
        """A JSON value; encoders with equal identities give equal features."""
        ...

    def load(self, device: torch.device) -> Encode:
        """The function from uint8 images (b, 3, s, s) on the device to float features (b, d) by layer."""
        ...


@dataclass(frozen=True)
class Trained:
    """The trunk of a run as it is in one of its checkpoints."""

    run: Run
    checkpoint: Checkpoint
    name: str = "trained"
    layers: tuple[str, ...] = ("pooled",)

    def identity(self) -> dict[str, Any]:
        """Step and checksum of the weights."""
        return {
            "encoder": self.name,
            "trunk": asdict(self.run.config().trunk),
            "step": self.checkpoint.step,
            "crc32": self.checkpoint.crc32(),
        }

    def load(self, device: torch.device) -> Encode:
        """Raises UserError when the checkpoint is damaged."""
        body = trunk.build(self.run.config().trunk)
        state = self.checkpoint.state()["network"]
        body.load_state_dict(
            {n.removeprefix("trunk."): v for n, v in state.items() if n.startswith("trunk.")}
        )
        return _frozen(body, device)


@dataclass(frozen=True)
class Untrained:
    """The trunk of a run before its first step: what the architecture gives without any learning."""

    run: Run
    name: str = "random"
    layers: tuple[str, ...] = ("pooled",)

    def identity(self) -> dict[str, Any]:
        """Trunk and seed, from which the weights follow."""
        config = self.run.config()
        return {"encoder": self.name, "trunk": asdict(config.trunk), "seed": config.seed}

    def load(self, device: torch.device) -> Encode:
        """Builds exactly the network that training started from."""
        data = self.run.passport()["data"]
        network = train.Network(self.run.config(), data["num_images"], data["num_classes"])
        return _frozen(network.trunk, device)


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, in -0.5 .. 0.5; views above 32 pixels are shrunk to 32, which gives 3,072 features."""

    name: str = "pixels"
    layers: tuple[str, ...] = ("pooled",)

    def identity(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {"encoder": self.name}

    def load(self, device: torch.device) -> Encode:
        """The function; it needs no weights."""
        return _pixels


def _pixels(images_bchw: Tensor) -> dict[str, Tensor]:
    if images_bchw.shape[2] > _PIXELS_SIZE:
        size = (_PIXELS_SIZE, _PIXELS_SIZE)
        images_bchw = interpolate(images_bchw.float(), size, mode="bilinear", antialias=True)
    return {"pooled": images_bchw.flatten(1).float() / 255 - 0.5}


def _frozen(body: trunk.Trunk, device: torch.device) -> Encode:
    # eval() and not only no gradients: batch statistics would make features depend on their batch-mates.
    body = body.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda images_bchw: {"pooled": body(images_bchw.contiguous(memory_format=torch.channels_last))}


@dataclass(frozen=True)
class FeatureTable:
    """The features of every image of a data set, lying in parts in a folder. Holds none of them itself.

    Args:
        folder: where the parts are.
        parts: first index and index after the last, of each part, in order.
        layers: their names.
    """

    folder: Folder
    parts: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]

    def load(self, layer: str = "pooled") -> Floats:
        """float32 (n, dim): the features of a layer in index order, in memory.

        Raises:
            UserError: there is no such layer, or a part is damaged.
        """
        if layer not in self.layers:
            raise unknown("layer", layer, self.layers)
        features_nd: Floats | None = None
        for part in self.parts:
            name = _file(layer, part)
            try:
                with self.folder.open(name) as stream:
                    values = np.load(stream, allow_pickle=False)
                if features_nd is None:
                    features_nd = np.empty((self.parts[-1][1], values.shape[1]), np.float32)
                features_nd[part[0] : part[1]] = values
            except (OSError, ValueError, EOFError) as error:
                raise UserError(
                    f"The features {name!r} in {str(self.folder)!r} are damaged: {error}. Delete that folder; they are "
                    "then computed again."
                ) from error
        assert features_nd is not None
        return features_nd


def labels(dataset: DataSet) -> Integers:
    """int64 (n,): the label of every image. Raises UserError when the data set has none."""
    if not dataset.has_labels:
        raise UserError(
            f"The data set at {str(dataset.folder)!r} has no labels, and a probe is scored by them. Give a data set "
            "whose source names classes, such as one folder per class."
        )
    column = dataset.read(np.arange(dataset.num_images, dtype=np.int64), ("label",)).column("label")
    return column.to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def extract(source: Encoder, dataset: DataSet, protocol: FeatureProtocol, cache: Folder) -> FeatureTable:
    """The features of every image. Parts that are there from an earlier call are not computed again. Ray must run.

    Args:
        source: the encoder.
        dataset: the images; labels are not looked at.
        protocol: size of the view, and layers.
        cache: features are put into a folder inside, whose name follows from the encoder, the images and the protocol.

    Raises:
        UserError: a layer does not exist, the data set has no images or is damaged, a checkpoint is damaged, or the
            cache cannot be written.
    """
    for layer in protocol.layers:
        if layer not in source.layers:
            raise unknown(f"layer of the {source.name} encoder", layer, source.layers)
    if dataset.num_images == 0:
        raise UserError(
            f"The data set at {str(dataset.folder)!r} has no images. Ingest a source that has some."
        )
    facts = {
        "encoder": source.identity(),
        "fingerprint": dataset.manifest.fingerprint,
        "protocol": asdict(protocol),
        "code": _code(),
    }
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = cache / f"{source.name}-{key}"
    parts = _parts(dataset)
    if not folder.exists(DONE):
        _complete(_Extract(source, dataset, protocol, folder), parts)
        folder.write_json(DONE, {**facts, "parts": parts})
    return FeatureTable(folder, tuple(parts), protocol.layers)


def _code() -> str:
    """A hash of what features depend on besides their protocol: the code that makes them, and torch."""
    source = "".join(inspect.getsource(module) for module in (decode, trunk, train))
    return hashlib.blake2b(f"{torch.__version__}\n{source}".encode(), digest_size=8).hexdigest()


def _file(layer: str, part: Sequence[int]) -> str:
    return f"{layer}-{part[0]:010d}-{part[1]:010d}.npy"


def _parts(dataset: DataSet) -> list[tuple[int, int]]:
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


def _complete(work: _Extract, parts: Sequence[tuple[int, int]]) -> None:
    """Computes the parts that are not there, and again those that an actor or a node took with it when it died."""
    for attempt in range(_ATTEMPTS):
        there = set(work.folder.list())
        missing = [p for p in parts if any(_file(name, p) not in there for name in work.protocol.layers)]
        if not missing:
            return
        try:
            _compute(work, missing)
            return
        except UserError:
            raise
        except Exception:
            if attempt == _ATTEMPTS - 1:
                raise


def _compute(work: _Extract, parts: Sequence[tuple[int, int]]) -> None:
    """Runs a pool of actors over the parts."""
    import ray.data

    size, resources = pool(ray.cluster_resources())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # From items and not from a range: no read tasks, which would wait for CPUs that the actors hold.
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    done = items.map_batches(
        _Actor,
        fn_constructor_args=(work,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(size, len(parts))),
        # Ray would restart an actor from arguments that may be gone, and says so on every start. `_complete` retries.
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
class _Extract:
    """What an actor is given."""

    source: Encoder
    dataset: DataSet
    protocol: FeatureProtocol
    folder: Folder


@dataclass
class _Actor:
    """Holds the encoder and turns ranges of indices into files of features."""

    work: _Extract
    device: torch.device = field(default_factory=lambda: _device())

    @cached_property
    def encode(self) -> Encode:
        # Not in the constructor, where Ray would start the actor again instead of handing on the error.
        return self.work.source.load(self.device)

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        # Decoding is the slow part beside an accelerator; without one there is an actor for every CPU.
        count = 1 if self.device.type == "cpu" else max(1, (os.cpu_count() or 1) // torch.cuda.device_count())
        return ThreadPoolExecutor(count)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        error = ""
        for first, end in batch["part"].tolist():
            try:
                self.write((first, end))
            except UserError as mendable:
                error = str(mendable)
        # As a value: Ray Data would leave the actors of a pipeline that failed alive, and with them their CPUs.
        return {"error": np.array([error], dtype=object)}

    def write(self, part: tuple[int, int]) -> None:
        """Computes one part and writes its files."""
        table = self.work.dataset.read(np.arange(*part, dtype=np.int64), ("image",))
        images = table.column("image").to_pylist()
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        made: dict[str, list[Floats]] = {layer: [] for layer in self.work.protocol.layers}
        for pixels_bchw in self.threads.map(self.view, batches):
            with torch.inference_mode():
                features = self.encode(pixels_bchw.to(self.device))
            for layer, values in made.items():
                values.append(features[layer].float().cpu().numpy())
        for layer, values in made.items():
            with self.work.folder.writing(_file(layer, part)) as stream:
                np.save(stream, np.concatenate(values), allow_pickle=False)

    def view(self, images: list[bytes]) -> Tensor:
        """The evaluation view of encoded images."""
        try:
            return decode.centre(images, self.work.protocol.image_size)
        except decode.DecodeError as error:
            raise UserError(
                f"An image of the data set at {str(self.work.dataset.folder)!r} that could be decoded when it was "
                f"ingested no longer can: {error}. A shard is damaged; ingest the source again."
            ) from error


def _device() -> torch.device:
    """The GPU that Ray has assigned, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
