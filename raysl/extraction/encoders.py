"""Encoders turn images into features: runs, weights of torchvision and timm, untrained networks, and raw pixels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from raysl import checkpoint, plugins, rng
from raysl.backbone import external_weights
from raysl.backbone import network as networks
from raysl.backbone.network import Backbone, BackboneConfig
from raysl.checkpoint import Checkpoint
from raysl.config import methods
from raysl.errors import UserError, unknown
from raysl.extraction import exports
from raysl.extraction import layers as layer_names
from raysl.extraction.layers import POOLED, STAGES, Encode
from raysl.run import METADATA, Run
from raysl.storage import Folder, StorageError
from raysl.storage.similar import similar_folder

MAX_IMAGE_SIZE = 4096
_PIXELS_SIZE = 32
_PUBLISHED_SIZE = 224


class Encoder(Protocol):
    """Turn images into features. An encoder is small and picklable: it loads its weights where they are used.

    Attributes:
        name: name in tables.
        layers: layers that it has. `load` also takes each of them as a grid, such as "res3:9216".
    """

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    def identity(self) -> dict[str, Any]:
        """Return a JSON value that identifies the features: encoders with equal values give equal features."""
        ...

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """Return the function from uint8 images (b, 3, s, s) on the device to float features (b, d) by layer or grid.

        If `by_batch`, BatchNorm uses the statistics of each batch, as in training. Features then depend on the other
        images of the batch.
        """
        ...


def _network_identity(config: BackboneConfig) -> dict[str, Any]:
    """Return what identifies a network without its weights: its configuration, and the user's code that builds it."""
    code = [plugins.source_hash(name) for name in config.modules()]
    return {"backbone": asdict(config), **({"code": code} if code else {})}


class NetworkEncoder:
    """An encoder that is a network, which can be trained further."""

    def backbone_config(self) -> BackboneConfig:
        raise NotImplementedError

    def network(self) -> Backbone:
        """Return a new network with its weights, on the CPU."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(layer_names.modules(networks.skeleton(self.backbone_config())))

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """See `Encoder.load`. Raises UserError if the weights cannot be loaded."""
        return layer_names.frozen(self.network(), device, layers, by_batch)


@dataclass(frozen=True)
class Trained(NetworkEncoder):
    """The backbone of a run at one of its checkpoints. Raises UserError if `name` is "momentum" and there is none."""

    run: Run
    checkpoint: Checkpoint
    name: str = "trained"  # or "momentum" for the moving average of the backbone that the objective keeps

    def __post_init__(self) -> None:
        self._prefix()

    def _prefix(self) -> str:
        """Return the prefix of the backbone's names in the state of the network."""
        if self.name == "trained":
            return "backbone."
        method = methods.parse(self.run.config().method)
        copy = getattr(methods.load_objective(method.objective)[1], "moving_backbone", "")
        if not copy:
            raise UserError(
                f"The run {str(self.run.folder)!r} has no moving average of its backbone: its method is "
                f"{self.run.config().method!r}. Leave 'momentum' out of `encoders`, or train byol, moco or dino."
            )
        return f"objective.{copy}."

    def backbone_config(self) -> BackboneConfig:
        return self.run.config().backbone

    def identity(self) -> dict[str, Any]:
        return {
            "encoder": self.name,
            **_network_identity(self.backbone_config()),
            "step": self.checkpoint.step,
            "crc32": self.checkpoint.crc32(),
        }

    def network(self) -> Backbone:
        """See `NetworkEncoder.network`. Raises UserError if the checkpoint is damaged."""
        backbone = networks.build(self.backbone_config())
        self.checkpoint.fill(backbone, self.checkpoint.backbone_state(self._prefix()))
        return backbone


@dataclass(frozen=True)
class RandomBackbone(NetworkEncoder):
    """An untrained backbone, with the weights that a run with this seed starts from."""

    config: BackboneConfig
    seed: int
    name: str = "random"
    weights_hash: str = ""

    def backbone_config(self) -> BackboneConfig:
        return self.config

    def identity(self) -> dict[str, Any]:
        """See `Encoder.identity`. Raises UserError if the weights file cannot be read."""
        value = {"encoder": self.name, **_network_identity(self.config), "seed": self.seed}
        if file := self.config.weights:
            value["weights"] = self.weights_hash or external_weights.digest(external_weights.read_file(file))
        return value

    def lost_weights(self) -> str:
        """Return how the file of the starting weights was lost since the run began; "" if it is still there."""
        place, _, name = self.config.weights.rpartition("/")
        if not name:
            return ""
        if not Folder(place or "/").exists(name):
            return f"There is no file {self.config.weights!r}."
        return self._changed(external_weights.digest(external_weights.read_file(self.config.weights)))

    def _changed(self, found: str) -> str:
        if not self.weights_hash or found == self.weights_hash:
            return ""
        return f"The weights file {self.config.weights!r} has changed since the run started from it."

    def network(self) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(self.seed, "weights") >> 1)  # As in raysl.model.Model.
            backbone = networks.build(self.config)
        if self.config.weights:
            found = external_weights.load_weights_into(backbone, self.config.weights, self.config.name)
            if changed := self._changed(found):
                raise UserError(
                    f"{changed} Put the old file back, or leave 'random' out of the argument `encoders` of raysl.probe."
                )
        return backbone


def untrained(run: Run) -> RandomBackbone:
    """Return exactly the backbone that the training of a run started from."""
    config = run.config()
    started_from = str(run.metadata()["facts"].get("starting_weights", ""))
    return RandomBackbone(config.backbone, config.seed, weights_hash=started_from)


@dataclass(frozen=True)
class Weights(NetworkEncoder):
    """A backbone with the weights in a file; see `raysl.backbone.external_weights`. Its classifier is ignored."""

    file: str  # a path (made absolute, because Ray workers have another working directory) or a URI
    # "timm/NAME" or "timm/NAME.TAG" for a backbone of timm, which also decides how images are normalized.
    config: BackboneConfig
    name: str = "weights"
    image_size: int = 0  # side of the images that the weights were made for, in pixels; 0 if it is not known

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", str(Folder(self.file)))

    def backbone_config(self) -> BackboneConfig:
        return self.config

    def identity(self) -> dict[str, Any]:
        """See `Encoder.identity`. Raises UserError if the file cannot be read."""
        digest = external_weights.digest(external_weights.read_file(self.file))
        return {"encoder": self.name, **_network_identity(self.config), "weights": digest}

    def network(self) -> Backbone:
        """See `NetworkEncoder.network`. Raises UserError if the file does not hold the weights of this backbone."""
        backbone = networks.build(self.config)
        external_weights.load_weights_into(backbone, self.file, self.config.name)
        return backbone


@dataclass(frozen=True)
class Pixels:
    """The raw pixels, scaled to -0.5 .. 0.5. Views above 32 pixels are resized to 32, which gives 3,072 features."""

    name: str = "pixels"
    layers: tuple[str, ...] = (POOLED,)

    def identity(self) -> dict[str, Any]:
        return {"encoder": self.name}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """See `Encoder.load`."""
        return _pixels


def encoder_by_name(name: str, config: BackboneConfig, seed: int = 0) -> Encoder:
    """Return the encoder that a user has named.

    Args:
        name: folder of a run, for its newest checkpoint; `RUN/checkpoints/step-NNN` for another; a weights file or a
            folder of `raysl export`; "random" for an untrained backbone; "pixels".
        config: the backbone of a weights file, or of "random". The default is replaced by what a folder of an export,
            or raysl in or beside a file, states.

    Raises UserError if there is nothing of this kind, or the run has no complete checkpoint.
    """
    if name == "random":
        return RandomBackbone(config, seed)
    if name == "pixels":
        return Pixels()
    if found := find_checkpoint(name):
        return Trained(*found)
    return _weights(name.rstrip("/"), config)


def _weights(name: str, config: BackboneConfig) -> Weights:
    """Return the encoder of a weights file or of a folder of an export. Raises UserError as `encoder_by_name`."""
    file, stated, side = exports.weights_in(name), None, 0
    is_given = config != BackboneConfig()
    # What is stated for a backbone that is given is its image size, which need not be readable.
    with contextlib.suppress(*([UserError] if is_given else [])):
        _, stated, side = exports.find(name, of_timm=is_given or file != name)
    config = config if is_given else stated or config
    fits = stated is not None and replace(stated, weights=config.weights) == config
    return Weights(file, config, image_size=side if fits else 0)


def find_checkpoint(name: str) -> tuple[Run, Checkpoint] | None:
    """Return the run and the checkpoint that a user has named; None for weights, "random" or "pixels". Without torch.

    Raises UserError as `encoder_by_name`.
    """
    if name in ("random", "pixels"):
        return None
    name = name.rstrip("/")
    if Folder(name).exists(METADATA):
        run = Run.open(name)
        return run, run.newest()
    inside = re.fullmatch(r"(.+)/checkpoints/step-(\d+)", name)
    if inside:
        run = Run.open(inside[1])
        steps = {found.step: found for found in checkpoint.complete(run.checkpoints)}
        if int(inside[2]) not in steps:
            raise unknown(
                f"checkpoint of the run {inside[1]!r}", f"step-{inside[2]}", (f"step-{s:09d}" for s in steps)
            )
        return run, steps[int(inside[2])]
    place, _, file = str(Folder(exports.weights_in(name))).rpartition("/")
    try:
        Folder(place or "/").open(file).close()
    except (OSError, StorageError) as error:
        # For a folder, this error would ask for a file.
        why = "" if isinstance(error, FileNotFoundError) or Folder(name).list() else f"{error} "
        if set("*?[") & set(name):
            why = "It is a pattern, and a command takes one run. "
        raise UserError(
            f"There is no checkpoint at {name!r}. {why}{similar_folder(name, METADATA)}Give the folder of a run, "
            "RUN/checkpoints/step-NNN, a folder of `raysl export`, a weights file together with --backbone.name, "
            "'random' or 'pixels'."
        ) from error
    return None


def view_size(source: Encoder) -> int:
    """Return the default side of the evaluation view in pixels: that of a run or export, 224 for weights, else 32."""
    if isinstance(source, Trained):
        return source.run.config().view.image_size
    return (source.image_size or _PUBLISHED_SIZE) if isinstance(source, Weights) else _PIXELS_SIZE


def stages(encoder: Encoder) -> tuple[str, ...]:
    """Return layers of an encoder by depth: its stages or, of a transformer, its blocks, and then "pooled"."""
    found = [stage for stage in STAGES if stage in encoder.layers]
    return (*(found or [layer for layer in encoder.layers if layer.startswith("blocks.")]), POOLED)


def check_size(encoder: Encoder, image_size: int) -> None:
    """Raise UserError if the backbone of an encoder does not take images of this size."""
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"--image-size is {image_size}; it must be between 1 and {MAX_IMAGE_SIZE:,}.")
    encoder = getattr(encoder, "source", encoder)
    if isinstance(encoder, NetworkEncoder):
        networks.check_size(encoder.backbone_config(), image_size)


def check_encoder(encoder: Encoder, layers: Sequence[str]) -> None:
    """Raise UserError if the file of an encoder holds no weights of its backbone, or it lacks a layer."""
    if isinstance(encoder, Weights):
        encoder.network()
    check_layers(encoder, layers)


def check_layers(encoder: Encoder, layers: Sequence[str]) -> None:
    """Raise UserError if an encoder lacks a layer. Each may be a grid, such as "res3:9216"."""
    known = encoder.layers
    for layer in layers:
        if not layer_names.is_spec(layer) or layer_names.layer_of(layer) not in known:
            raise unknown(f"layer of the {encoder.name} encoder", layer, known)


def _pixels(images_bchw: Tensor) -> dict[str, Tensor]:
    if images_bchw.shape[2] > _PIXELS_SIZE:
        size = (_PIXELS_SIZE, _PIXELS_SIZE)
        images_bchw = interpolate(images_bchw.float(), size, mode="bilinear", antialias=True)
    return {POOLED: images_bchw.flatten(1).float() / 255 - 0.5}
