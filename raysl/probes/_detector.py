"""Faster R-CNN on the feature maps of any convolutional backbone, or on the patch tokens of a vision transformer.

Ren et al. 2015, "Faster R-CNN", with the feature pyramid of Lin et al. 2017, from torchvision. An empty image shows
which modules give maps: the last module of each map size is used, from a quarter of the image size down, four at most.
Forward hooks read the maps, because torchvision's `create_feature_extractor` cannot trace every backbone. BatchNorm is
frozen, statistics and weights, as in PIRL. Networks that were trained in different ways differ in the scale of their
maps (He et al. 2020, MoCo, add normalization for that reason), so each convolution of the pyramid has a GroupNorm.

A vision transformer of timm has one map, that of its last patch tokens. The pyramid takes it at twice, once and half of
its resolution, as Li et al. 2022, "Exploring plain vision transformer backbones for object detection", without the
learned layers that they enlarge it by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from raysl.backbone.network import Backbone
from raysl.errors import UserError, explained

# Sides of anchors in pixels; the finest map has the first ones.
ANCHORS = (32, 64, 128, 256, 512)
_EMPTY_SIDE = 256
_COARSEST, _FINEST, _MOST_MAPS = 6, 64, 4
_ROI_CELLS = 7
# Names of the maps of patch tokens, and their resolution relative to the patches.
_TOKEN_SCALES = {"tokens x 2": 2.0, "tokens": 1.0, "tokens / 2": 0.5}


class PyramidBackbone(nn.Module):
    """A feature pyramid on the maps of a backbone.

    Args:
        backbone: trained further.
        width: channels of every level, a multiple of 32.

    Raises UserError if the backbone has no maps, or takes images of one size only.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.body = backbone.body
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        found = _token_stages(backbone) or stages(backbone)
        self.names = list(found)
        self.out_channels = width
        self.pyramid = FeaturePyramidNetwork(
            list(found.values()), width, LastLevelMaxPool(), lambda channels: nn.GroupNorm(32, channels)
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but the backbone, whose BatchNorm is frozen."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images_bchw: Tensor) -> dict[str, Tensor]:
        """Return maps (b, width, h, w) by name, the finest first: "0", "1" ... of the backbone, and "pool"."""
        tokens = self.names == list(_TOKEN_SCALES)
        made = token_maps(self.body, images_bchw) if tokens else maps(self.body, self.names, images_bchw)
        levels: dict[str, Tensor] = self.pyramid(
            {str(number): made[name] for number, name in enumerate(self.names)}
        )
        return levels


def build(backbone: Backbone, classes: int, sides: tuple[int, ...], width: int) -> FasterRCNN:
    """Return the detector. All weights but those of the backbone are drawn from torch's global generator.

    Args:
        sides: lengths of the shorter side of an image in pixels: random in training, the last one in evaluation.
        width: see `PyramidBackbone`, also for errors; the box head has four times as many channels.
    """
    pyramid = PyramidBackbone(backbone, width)
    levels = len(pyramid.names) + 1
    each = max(1, len(ANCHORS) + 1 - levels)
    anchors = tuple(ANCHORS[level : level + each] for level in range(levels))
    names = [str(number) for number in range(len(pyramid.names))]
    return FasterRCNN(
        pyramid,
        min_size=sides,
        image_mean=(backbone.mean.flatten() / 255).tolist(),
        image_std=(backbone.std.flatten() / 255).tolist(),
        rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * levels),
        box_roi_pool=MultiScaleRoIAlign(names, _ROI_CELLS, 2),
        box_head=TwoMLPHead(width * _ROI_CELLS**2, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, classes + 1),
    )


def stages(backbone: Backbone) -> dict[str, int]:
    """Return the modules that make the maps of a backbone, the finest first, with channels; UserError if none does."""
    body = backbone.body.eval()
    candidates = list(_candidates(body))
    what = "The probe detection needs a backbone that takes images of many sizes, and this one does not"
    remedy = "Probe a convolutional backbone, such as resnet50, or a vision transformer of timm."
    with explained(what, remedy, AssertionError, RuntimeError, ValueError):
        with torch.no_grad():
            made = maps(body, candidates, torch.zeros(1, 3, _EMPTY_SIDE, _EMPTY_SIDE))
    # The last map of each size is used.
    by_side = {made[name].shape[2]: name for name in made if _is_map(made[name])}
    sides = sorted(by_side, reverse=True)[:_MOST_MAPS]
    found = {by_side[side]: made[by_side[side]].shape[1] for side in sides}
    if not found:
        raise UserError(
            "The probe detection needs feature maps, and this backbone makes none. Probe a convolutional backbone, "
            "such as resnet50."
        )
    return found


def _token_stages(backbone: Backbone) -> dict[str, int]:
    """Return the names of the maps of a vision transformer that takes images of any size; none for other backbones."""
    body: Any = backbone.body
    if not (hasattr(body, "forward_intermediates") and getattr(body, "dynamic_img_size", False)):
        return {}
    return dict.fromkeys(_TOKEN_SCALES, backbone.width)


def token_maps(body: Any, images_bchw: Tensor) -> dict[str, Tensor]:
    """Return the map of the last patch tokens at each resolution, the finest first; the image need not be square."""
    (tokens_bdhw,) = body.forward_intermediates(images_bchw, indices=1, norm=True, intermediates_only=True)
    return {
        name: tokens_bdhw
        if scale == 1
        else interpolate(tokens_bdhw, scale_factor=scale, mode="bilinear", antialias=scale < 1)
        for name, scale in _TOKEN_SCALES.items()
    }


def maps(body: nn.Module, names: list[str], images_bchw: Tensor) -> dict[str, Tensor]:
    """Return the outputs of modules of a network by name, in the order of their computation."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[name] = output

        return hook

    hooks = [body.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        body(images_bchw)
    finally:
        for hook in hooks:
            hook.remove()
    return made


def _candidates(body: nn.Module) -> Iterator[str]:
    """Yield the modules of a network, and those of its sequences. The first layers inside of a block still have the map
    size of the previous stage, so blocks are not searched."""
    for name, child in body.named_children():
        yield name
        if isinstance(child, nn.Sequential):
            yield from (f"{name}.{inside}" for inside, _ in child.named_children())


def _is_map(output: Tensor) -> bool:
    """Return True if an output is a square map, channels first, of a size between the coarsest and the finest."""
    return (
        output.ndim == 4
        and output.shape[2] == output.shape[3]
        and _COARSEST <= output.shape[2] <= _FINEST
        and output.shape[1] > 1
    )
