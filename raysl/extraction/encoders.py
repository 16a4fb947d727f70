"""Encoders: what turns images into features. Runs, weights of torchvision and timm, untrained networks, pixels.

A layer is named by its stage, `conv1` and `res2` to `res5` as in VISSL, by its place inside the network, or `pooled`
for the output of the backbone. Maps are averaged over their places; a name with a number after it, `res3:9216`, keeps as
many places as give at most so many numbers: the map is averaged into a square grid of cells. At 9,216 the grids of a
ResNet-50 at 224 pixels are those of Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation
learning": 12, 6, 4, 3 and 2 cells a side from conv1 to res5. (Theirs slide a window; ours are adaptive, as MMSelfSup's
for other sizes of image.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from raysl import checkpoint, rng
from raysl.backbone import external_weights, norm
from raysl.backbone import network as networks
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError, unknown
from raysl.run import METADATA, Run
from raysl.storage import Folder, StorageError

Encode = Callable[[Tensor], Mapping[str, Tensor]]

POOLED = "pooled"
_STAGES = ("conv1", "res2", "res3", "res4", "res5")
_PIXELS_SIZE = 32
_PUBLISHED_SHAPE = (3, 224, 224)


class Encoder(Protocol):
    """Turns images into features. Small and picklable: weights are loaded where they are used.

    Attributes:
        name: what it is called in tables.
        layers: what it can give. Each may be asked for as a grid, such as "res3:9216".
    """

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    def identity(self) -> dict[str, Any]:
        """A JSON value; encoders with equal identities give equal features."""
        ...

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """The function from uint8 images (b, 3, s, s) on the device to float features (b, d) by layer.

        Args:
            by_batch: whether BatchNorm takes the statistics of the images that it is shown at once, as in training,
                and not those that it has kept. Features then depend on their batch-mates.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """An encoder that is a network, which can be trained further."""

    def network(self) -> networks.Backbone:
        """A new network with its weights, on the CPU."""
        ...


@dataclass(frozen=True)
class Trained:
    """The backbone of a run as it is in one of its checkpoints."""

    run: Run
    checkpoint: Checkpoint
    name: str = "trained"

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(_places(_skeleton(self.run.config().backbone)))

    def identity(self) -> dict[str, Any]:
        """Step and checksum of the weights."""
        return {
            "encoder": self.name,
            "backbone": asdict(self.run.config().backbone),
            "step": self.checkpoint.step,
            "crc32": self.checkpoint.crc32(),
        }

    def network(self) -> networks.Backbone:
        """Raises UserError when the checkpoint is damaged."""
        body = networks.build(self.run.config().backbone)
        body.load_state_dict(self.checkpoint.backbone_state())
        return body

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """Raises UserError when the checkpoint is damaged."""
        return _frozen(self.network(), device, layers, by_batch)


@dataclass(frozen=True)
class RandomBackbone:
    """A backbone, also one of timm as in `Weights`, with the weights that a run with this seed begins with."""

    config: BackboneConfig
    seed: int
    name: str = "random"

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(_places(_skeleton(self.config)))

    def identity(self) -> dict[str, Any]:
        """Backbone and seed."""
        return {"encoder": self.name, "backbone": asdict(self.config), "seed": self.seed}

    def network(self) -> networks.Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(self.seed, "weights") >> 1)  # as raysl.model.Model begins
            return _build(self.config)

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        return _frozen(self.network(), device, layers, by_batch)


def untrained(run: Run) -> RandomBackbone:
    """Exactly the backbone that training started from: what the architecture gives without any learning."""
    config = run.config()
    return RandomBackbone(config.backbone, config.seed)


@dataclass(frozen=True)
class Weights:
    """A backbone with the weights in a file, under the names of torchvision or timm. A classifier in it is left out.

    Args:
        file: a state dict by `torch.save`, or a dict that holds one, or safetensors. A path (made absolute, since Ray
            workers have another working directory) or a URI.
        config: the backbone; "timm/NAME" or "timm/NAME.TAG" for one of timm, whose images are normalised as timm does
            for it.
    """

    file: str
    config: BackboneConfig
    name: str = "weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", str(Folder(self.file)))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(_places(_skeleton(self.config)))

    def identity(self) -> dict[str, Any]:
        """Backbone and a hash of the file. Raises UserError when it cannot be read."""
        digest = external_weights.digest(external_weights.read_file(self.file))
        return {"encoder": self.name, "backbone": asdict(self.config), "weights": digest}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """Raises UserError when the file cannot be read, holds no weights, or those of another network."""
        return _frozen(self.network(), device, layers, by_batch)

    def network(self) -> networks.Backbone:
        """Raises UserError when the file cannot be read, holds no weights, or those of another network."""
        body = _build(self.config)
        external_weights.load_weights_into(body, self.file, self.config.name)
        return body


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, in -0.5 .. 0.5; views above 32 pixels are shrunk to 32, which gives 3,072 features."""

    name: str = "pixels"
    layers: tuple[str, ...] = (POOLED,)

    def identity(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {"encoder": self.name}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """The function; it needs no weights."""
        return _pixels


def named(name: str, config: BackboneConfig, seed: int = 0) -> Encoder:
    """The encoder that a user names.

    Args:
        name: folder of a run, for its newest checkpoint; `RUN/checkpoints/step-NNN` for another; a file of weights;
            "random" for an untrained backbone; "pixels".
        config: the backbone of a file of weights, or of "random".
        seed: of "random".

    Raises:
        UserError: nothing of these lies there, or the run has no complete checkpoint.
    """
    if name == "random":
        return RandomBackbone(config, seed)
    if name == "pixels":
        return Pixels()
    name = name.rstrip("/")
    if Folder(name).exists(METADATA):
        run = Run.open(name)
        return Trained(run, run.newest())
    inside = re.fullmatch(r"(.+)/checkpoints/step-(\d+)", name)
    if inside:
        run = Run.open(inside[1])
        there = {found.step: found for found in checkpoint.complete(run.checkpoints)}
        if int(inside[2]) not in there:
            raise unknown(
                f"checkpoint of the run {inside[1]!r}", f"step-{inside[2]}", (f"step-{s:09d}" for s in there)
            )
        return Trained(run, there[int(inside[2])])
    weights = Weights(name, config)
    place, _, file = weights.file.rpartition("/")
    try:
        Folder(place or "/").open(file).close()
    except (OSError, StorageError) as error:
        raise UserError(
            f"There is no checkpoint at {name!r} ({error}). Give the folder of a run, RUN/checkpoints/step-NNN, a file of "
            "weights together with --backbone.name, 'random' or 'pixels'."
        ) from error
    return weights


def _build(config: BackboneConfig) -> networks.Backbone:
    """A new backbone, of timm too. Raises UserError when it does not exist."""
    if config.name.startswith(external_weights.TIMM):
        return external_weights.timm_backbone(config.name.removeprefix(external_weights.TIMM))
    return networks.build(config)


def _skeleton(config: BackboneConfig) -> networks.Backbone:
    """The backbone, without weights where that can be."""
    try:
        with torch.device("meta"):
            return _build(config)
    except RuntimeError:  # some compute widths or rates by tensors, which must hold numbers, as RegNets do
        with torch.random.fork_rng(devices=[]):
            return _build(config)


def check_size(encoder: Encoder, image_size: int) -> None:
    """Raises UserError when the backbone of an encoder does not take images of this size."""
    if isinstance(encoder, Trained):
        _check_size(encoder.run.config().backbone, image_size)
    elif isinstance(encoder, RandomBackbone | Weights):
        _check_size(encoder.config, image_size)


@lru_cache
def _check_size(config: BackboneConfig, image_size: int) -> None:
    body = _skeleton(config).eval()
    own_size = getattr(body.body, "pretrained_cfg", {}).get("input_size", _PUBLISHED_SHAPE)[-1]
    refusal = _refusal(body, image_size)
    # What fails at its own size too may need its weights, and is left to them.
    if refusal and not _refusal(body, own_size):
        raise UserError(
            f"The backbone {config.name!r} takes no images of {image_size} pixels ({refusal}). It takes those of "
            f"{own_size} pixels: give --image-size {own_size}, or another backbone."
        )


def _refusal(body: networks.Backbone, image_size: int) -> str:
    """What a network says against images of a size; "" where it takes them."""
    images_bchw = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=body.mean.device)
    try:
        with torch.inference_mode():
            body(images_bchw)
    except (AssertionError, RuntimeError) as error:
        # The first are of transformers, which take one size; the second of windows, and of too many pools.
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ""


def stages(encoder: Encoder) -> tuple[str, ...]:
    """The layers that stand for the depths of an encoder, from the first on: those of conv1, res2 to res5 that it has,
    and "pooled"."""
    return (*(stage for stage in _STAGES if stage in encoder.layers), POOLED)


def tap(layer: str, dims: int) -> str:
    """The name of a layer as a grid of at most `dims` numbers; 0 for the mean over places. "pooled" has no places."""
    return f"{layer}:{dims}" if dims and layer != POOLED else layer


def layer_of(tap: str) -> str:
    """The name of the layer in the name of a grid."""
    return tap.partition(":")[0]


def _places(body: networks.Backbone) -> dict[str, str]:
    """Names of layers and of their modules. "pooled" is the output of the backbone; res2 and on are the stages of residual
    networks and conv1 their first convolution with its normalisation and ReLU, as in VISSL; what else lies directly
    inside the network has the name that it has there."""
    inside = [name for name, _ in body.body.named_children()]
    stages = {f"res{int(name[5:]) + 1}": f"body.{name}" for name in inside if re.fullmatch(r"layer\d", name)}
    # timm calls the ReLU of its ResNets act1.
    activation = next((name for name in ("relu", "act1") if name in inside), None)
    if stages and activation:
        stages["conv1"] = f"body.{activation}"
    elif stages:
        # The bare convolution under this name is another layer than that of other networks.
        inside = [name for name in inside if name != "conv1"]
    return {POOLED: "", **{name: f"body.{name}" for name in inside}, **stages}


def _frozen(body: networks.Backbone, device: torch.device, layers: Sequence[str], by_batch: bool) -> Encode:
    if by_batch:
        norm.by_batch(body)
    # eval() and not only no gradients: batch statistics would make features depend on their batch-mates.
    body = body.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    made: dict[str, Tensor] = {}
    places = _places(body)
    for layer in set(layers) - {POOLED}:
        body.get_submodule(places[layer_of(layer)]).register_forward_hook(_keep(made, layer))

    def encode(images_bchw: Tensor) -> dict[str, Tensor]:
        pooled = body(images_bchw.contiguous(memory_format=torch.channels_last))
        return {**made, POOLED: pooled}

    return encode


def _keep(made: dict[str, Tensor], layer: str) -> Callable[[nn.Module, Any, Any], None]:
    dims = int(layer.partition(":")[2] or 0)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # At once: the next layer may work in place.
        made[layer] = _over_places(output, dims)

    return hook


def _over_places(output: Tensor, dims: int) -> Tensor:
    """(b, d) from (b, c, h, w), from tokens (b, t, d) or from (b, d): the mean over places; a map in a grid of at most
    `dims` numbers, channel by channel, if `dims` is not 0. Maps (b, h, w, c), as those of Swin, are told by their equal
    sides, since views are square; where all three are equal, the map is taken for (b, c, h, w)."""
    if output.ndim == 4 and output.shape[1] == output.shape[2] != output.shape[3]:
        output = output.movedim(3, 1)
    if output.ndim == 4 and dims:
        channels, *sides = output.shape[1:]
        cells = max(1, math.isqrt(dims // channels))
        grid = (min(cells, sides[0]), min(cells, sides[1]))
        return adaptive_avg_pool2d(output, grid).contiguous().flatten(1).clone()
    if output.ndim == 4:
        return output.mean((2, 3))
    return output.mean(1) if output.ndim == 3 else output.flatten(1).clone()


def _pixels(images_bchw: Tensor) -> dict[str, Tensor]:
    if images_bchw.shape[2] > _PIXELS_SIZE:
        size = (_PIXELS_SIZE, _PIXELS_SIZE)
        images_bchw = interpolate(images_bchw.float(), size, mode="bilinear", antialias=True)
    return {POOLED: images_bchw.flatten(1).float() / 255 - 0.5}
