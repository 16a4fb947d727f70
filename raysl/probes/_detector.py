"""Faster R-CNN over the maps of any convolutional backbone.

Ren et al. 2015, "Faster R-CNN", with the feature pyramid of Lin et al. 2017, as torchvision has it. The maps are found
by passing an empty image: the last one of each size, from a quarter of the image's on, four at most. BatchNorm is
frozen, as in PIRL, its statistics and its weights. Maps of networks that were trained in different ways differ in scale
(He et al. 2020, MoCo, normalise them anew for that reason); here the pyramid has a GroupNorm behind each of its
convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from raysl.backbone.network import Backbone
from raysl.errors import UserError

# Sides of anchors in pixels; the finest map takes the first ones.
ANCHORS = (32, 64, 128, 256, 512)
_EMPTY_SIDE = 256
_COARSEST, _FINEST, _MOST_MAPS = 6, 64, 4
_ROI_CELLS = 7


class PyramidBackbone(nn.Module):
    """The pyramid over the maps of a backbone.

    Args:
        backbone: its weights are trained further.
        width: channels of every level, a multiple of 32.

    Raises:
        UserError: the backbone has no maps, or takes images of one size alone.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.body = backbone.body
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        found = stages(backbone)
        self.names = list(found)
        self.out_channels = width
        self.pyramid = FeaturePyramidNetwork(
            list(found.values()), width, LastLevelMaxPool(), lambda channels: nn.GroupNorm(32, channels)
        )

    def train(self, mode: bool = True) -> Self:
        """As of any module, but that the backbone stays in evaluation mode: its BatchNorm is frozen."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images_bchw: Tensor) -> dict[str, Tensor]:
        """Maps (b, width, h, w) by name, the finest first: "0", "1" and on of the backbone, and "pool"."""
        made = maps(self.body, self.names, images_bchw)
        levels: dict[str, Tensor] = self.pyramid(
            {str(number): made[name] for number, name in enumerate(self.names)}
        )
        return levels


def build(backbone: Backbone, classes: int, sides: tuple[int, ...], width: int) -> FasterRCNN:
    """The detector, with new weights from torch's global generator for all but the backbone.

    Args:
        classes: without the background.
        sides: of images in pixels, the shorter one; drawn in training, the last one for evaluation.
        width: see `PyramidBackbone`; the head of the boxes has four times as many.

    Raises:
        UserError: see `PyramidBackbone`.
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
    """Names of the parts of a backbone's body that make its maps, the finest first, and their channels.

    Raises:
        UserError: there are none.
    """
    body = backbone.body.eval()
    candidates = list(_candidates(body))
    try:
        with torch.no_grad():
            made = maps(body, candidates, torch.zeros(1, 3, _EMPTY_SIDE, _EMPTY_SIDE))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The probe detection passes images of many sizes, and this backbone does not take them: {error}. Probe a "
            "convolutional backbone, such as resnet50."
        ) from error
    # Of those of one size, the last one stays.
    by_side = {made[name].shape[2]: name for name in made if _is_map(made[name])}
    sides = sorted(by_side, reverse=True)[:_MOST_MAPS]
    found = {by_side[side]: made[by_side[side]].shape[1] for side in sides}
    if not found:
        raise UserError(
            "The probe detection needs maps of features, and this backbone makes none. Probe a convolutional backbone, such "
            "as resnet50."
        )
    return found


def maps(body: nn.Module, names: list[str], images_bchw: Tensor) -> dict[str, Tensor]:
    """What parts of a network put out on the way, in the order in which they end.

    Args:
        images_bchw: normalised.
    """
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
    """The parts of a network, and those of its sequences: blocks are not looked into, whose first layers still have
    the size of the stage before."""
    for name, child in body.named_children():
        yield name
        if isinstance(child, nn.Sequential):
            yield from (f"{name}.{inside}" for inside, _ in child.named_children())


def _is_map(output: Tensor) -> bool:
    """Whether an output is a square map with its channels first, of a size between the finest and the coarsest."""
    return (
        output.ndim == 4
        and output.shape[2] == output.shape[3]
        and _COARSEST <= output.shape[2] <= _FINEST
        and output.shape[1] > 1
    )
