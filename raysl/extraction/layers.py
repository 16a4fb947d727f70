"""Names of layers, and the features that a layer gives.

A layer is named by its stage, `conv1` and `res2` to `res5` as in VISSL, by its name inside the network, or `pooled` for
the output of the backbone. Feature maps are averaged over positions. A feature spec `res3:9216` averages the map into
the largest square grid with at most so many numbers instead. At 9,216 the grids of a ResNet-50 at 224 pixels are those
of Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning": 12, 6, 4, 3 and 2 cells
a side from conv1 to res5. (They use a sliding window; these are adaptive, as MMSelfSup's for other image sizes.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from raysl.backbone import norm
from raysl.backbone.network import Backbone, as_map
from raysl.errors import UserError

# From uint8 images (b, 3, s, s) on the device to float features (b, d) by feature spec.
Encode = Callable[[Tensor], Mapping[str, Tensor]]
# From the same images to maps (b, d, h, w) by layer.
EncodeMaps = Callable[[Tensor], Mapping[str, Tensor]]

POOLED = "pooled"
STAGES = ("conv1", "res2", "res3", "res4", "res5")


def feature_spec(layer: str, dims: int) -> str:
    """Return the name of a layer as a grid of at most `dims` numbers; 0 for the mean over positions."""
    return f"{layer}:{dims}" if dims and layer != POOLED else layer


def layer_of(spec: str) -> str:
    """Return the layer of a feature spec."""
    return spec.partition(":")[0]


def is_spec(text: str) -> bool:
    """Return True for a layer, or a layer with a number of dimensions."""
    return re.fullmatch(r"[^:]+(:[1-9]\d*)?", text) is not None


def modules(backbone: Backbone) -> dict[str, str]:
    """Return the module of every layer, by name of the layer.

    "pooled" is the output of the backbone. res2 and on are the stages of residual networks, and conv1 is their first
    convolution with its normalization and ReLU. Other direct children of the network have their own names, and so have
    the blocks of a transformer, as "blocks.6".
    """
    children = [name for name, _ in backbone.body.named_children()]
    blocks = getattr(backbone.body, "blocks", ())
    children += [
        f"blocks.{number}" for number in range(len(blocks) if isinstance(blocks, nn.Sequential) else 0)
    ]
    stages = {
        f"res{int(name[5:]) + 1}": f"body.{name}" for name in children if re.fullmatch(r"layer\d", name)
    }
    # timm calls the ReLU of its ResNets act1.
    activation = next((name for name in ("relu", "act1") if name in children), None)
    if stages and activation:
        stages["conv1"] = f"body.{activation}"
    elif stages:
        # The bare convolution of this name is not the layer that other networks have under it.
        children = [name for name in children if name != "conv1"]
    return {POOLED: "", **{name: f"body.{name}" for name in children}, **stages}


def frozen(backbone: Backbone, device: torch.device, specs: Sequence[str], by_batch: bool) -> Encode:
    """Return the function from images to features of layers and grids by a frozen backbone.

    If `by_batch`, BatchNorm uses the statistics of each batch, as in training, and not the running ones.
    """
    if by_batch:
        norm.use_batch_statistics(backbone)
    # Without eval(), batch statistics would make the features of an image depend on its batch.
    backbone = backbone.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    features: dict[str, Tensor] = {}
    names = modules(backbone)
    for spec in set(specs) - {POOLED}:
        layer, _, dims = spec.partition(":")
        hook = _keep(features, spec, partial(reduce, dims=int(dims or 0)))
        backbone.get_submodule(names[layer]).register_forward_hook(hook)

    def encode(images_bchw: Tensor) -> dict[str, Tensor]:
        pooled = backbone(images_bchw.contiguous(memory_format=torch.channels_last))
        return {**features, POOLED: pooled}

    return encode


def frozen_maps(backbone: Backbone, device: torch.device, layers: Sequence[str]) -> EncodeMaps:
    """Return the function from images to the maps of layers of a frozen backbone.

    The map of "pooled" is the one before pooling. The patch tokens of a transformer are a map of its patches, without
    the class token and registers. The function raises UserError if a layer has no map.
    """
    backbone = backbone.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    made: dict[str, Tensor] = {}
    names = modules(backbone)
    for layer in set(layers) - {POOLED}:
        hook = _keep(made, layer, partial(_copied_map, layer))
        backbone.get_submodule(names[layer]).register_forward_hook(hook)

    def encode(images_bchw: Tensor) -> dict[str, Tensor]:
        images_bchw = images_bchw.contiguous(memory_format=torch.channels_last)
        if POOLED in layers:
            made[POOLED] = backbone.maps(images_bchw)
        else:
            backbone(images_bchw)
        if missing := sorted(set(layers) - made.keys()):
            raise _no_map(missing[0])
        return dict(made)

    return encode


def _no_map(layer: str) -> UserError:
    return UserError(
        f"The layer {layer!r} has no map: its output has no places. Give --layers pooled, or a layer before pooling."
    )


def _keep(
    made: dict[str, Tensor], name: str, change: Callable[[Any], Tensor]
) -> Callable[[nn.Module, Any, Any], None]:
    """Return a hook that keeps the changed output of a layer: a copy, because the next layer may work in place."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        made[name] = change(output)

    return hook


def _copied_map(layer: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        raise _no_map(layer)
    return as_map(output).clone()


def reduce(output: Tensor, dims: int) -> Tensor:
    """Return features (b, d) of the output of a layer.

    Args:
        output: a map (b, c, h, w), a map (b, h, w, c) as in Swin, tokens (b, t, d), or vectors (b, d). Maps with the
            channels last are recognized by their equal sides, because views are square; if all three are equal,
            the map is taken for (b, c, h, w).
        dims: average a map into a grid of at most `dims` numbers, channel by channel; 0 for the mean over positions.
    """
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
