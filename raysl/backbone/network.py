"""Backbones: networks from uint8 images to features, by name, with torchvision's weights layout inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysl.backbone import norm as norms
from raysl.errors import UserError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneConfig:
    """Which network is trained.

    Args:
        name: "small" (for two CPU cores and small images) or any torchvision classifier by name, such as
            "resnet18", "resnet50", "convnext_tiny" or "vit_b_16"; its last linear layer is taken off.
        stem: "standard" keeps the 7x7 stride-2 convolution and the max-pool; "small" replaces them by one 3x3
            convolution, for images of 64 pixels or less. Only for ResNets.
        norm: "batch" is BatchNorm over each view of one worker's images, as published: patches and images pass one
            after the other, each by statistics of their own. "joint" takes the statistics over all views together,
            "sync" over each view of all workers' images, in the heads too. "group" is GroupNorm, each image alone,
            so that gradients do not depend on how many workers share the batch.
    """

    name: str = "small"
    stem: Literal["standard", "small"] = "standard"
    norm: Literal["batch", "joint", "sync", "group"] = "batch"


class Backbone(nn.Module):
    """uint8 images in, features out. The normalisation constants are part of it and are saved with it.

    `body` holds the network alone, under the names of torchvision, so that its state dict loads there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, width: int, joint: bool = False) -> None:
        super().__init__()
        self.body = body
        self.width = width
        self.graph = norms.traced(body) if joint else None
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images_bchw: uint8, or float in the range 0 to 255.

        Returns:
            float (b, width), pooled over the image.
        """
        features: Tensor = self.body(self._normalised(images_bchw))
        return features.flatten(1)

    def together(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Features of several batches, whose images may differ in size. Where the backbone was built with norm "joint",
        BatchNorm takes its statistics over all of them; otherwise they pass one after the other."""
        if self.graph is None or not self.training:
            return [self(images_bchw) for images_bchw in batches]
        made = norms.together(self.body, self.graph, [self._normalised(images) for images in batches])
        return [features.flatten(1) for features in made]

    def _normalised(self, images_bchw: Tensor) -> Tensor:
        return (images_bchw.to(self.mean.dtype) - self.mean) / self.std


def encode(backbone: nn.Module, views_bpchw: Tensor) -> Tensor:
    """Features of every crop in one pass: folds the crops into the batch and unfolds their features.

    One pass and not P: nine passes over a jigsaw would give each slot batch statistics of its own, a cue to its
    position, and nine updates of the running statistics.

    Returns:
        float (b, p, width).
    """
    b, p = views_bpchw.shape[:2]
    features: Tensor = backbone(views_bpchw.flatten(0, 1))
    return features.view(b, p, -1)


def encode_views(backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Features of every crop of several views, each as `encode`, in their order or together (see `BackboneConfig.norm`).

    Args:
        views: uint8 (b, p, c, h, w) each; p, h and w may differ.

    Returns:
        float (b, p, width) each.
    """
    if not isinstance(backbone, Backbone):
        return [encode(backbone, view_bpchw) for view_bpchw in views]
    made = backbone.together([view_bpchw.flatten(0, 1) for view_bpchw in views])
    return [features.view(*view.shape[:2], -1) for features, view in zip(made, views, strict=True)]


def build(config: BackboneConfig) -> Backbone:
    """A new backbone with weights from torch's global generator.

    Raises:
        UserError: the name, the stem or the norm does not exist.
    """
    norm, joint = _norm(config.norm), config.norm == "joint"
    if config.stem not in ("small", "standard"):
        raise unknown("stem", config.stem, ["small", "standard"])
    if config.name == "small":
        return Backbone(SmallBackbone(norm), SmallBackbone.width, joint)
    if config.name not in names():
        raise unknown("backbone", config.name, names())
    network = _classifier(config, norm)
    width = _take_off_head(network)
    if config.stem == "small":
        conv: Any = network.conv1
        network.conv1 = nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return Backbone(network, width, joint)


def names() -> list[str]:
    """Every backbone there is: "small", and torchvision's classifiers without auxiliary outputs."""
    from torchvision import models

    return [
        "small",
        *(name for name in models.list_models(models) if name not in ("googlenet", "inception_v3")),
    ]


def _classifier(config: BackboneConfig, norm: Callable[[int], nn.Module]) -> nn.Module:
    """A torchvision classifier. Raises UserError when the stem or the norm does not exist in it."""
    from torchvision import models

    options = {"norm_layer": norm} if config.norm == "group" else {}
    try:
        network: nn.Module = models.get_model(config.name, weights=None, **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The backbone {config.name!r} cannot be made with norm {config.norm!r}: {error}. Use --backbone.norm batch."
        ) from error
    if config.stem == "small" and not (hasattr(network, "conv1") and hasattr(network, "maxpool")):
        raise UserError(
            f"The backbone {config.name!r} has no stem that could be replaced; only ResNets have one. Use --backbone.stem "
            "standard."
        )
    return network


def _take_off_head(network: nn.Module) -> int:
    """Replaces the last linear layer, the classifier, by nothing; returns the width of what comes into it."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("This backbone ends in no linear classifier and so has no features of one width.")
    parent, _, child = linear[-1].rpartition(".")
    holder: Any = network.get_submodule(parent)
    head: nn.Linear = network.get_submodule(linear[-1])  # type: ignore[assignment]
    setattr(holder, child, nn.Identity())
    return head.in_features


def _norm(name: str) -> Callable[[int], nn.Module]:
    if name in ("batch", "joint", "sync"):
        return nn.BatchNorm2d
    if name == "group":
        return lambda channels: nn.GroupNorm(channels // 8, channels)
    raise unknown("norm", name, ["batch", "joint", "sync", "group"])


class SmallBackbone(nn.Module):
    """A residual network of 0.7 million weights for images of 16 to 64 pixels on two CPU cores.

    Stages named as in torchvision's ResNets, one basic block each. 6 M multiply-adds at 32 pixels: a step is bound by
    memory, and the first convolution halves the image for that.
    """

    width = 192

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(24)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _Block(24, 48, 2, norm)
        self.layer2 = _Block(48, 96, 2, norm)
        self.layer3 = _Block(96, 192, 2, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images_bchw: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images_bchw)))
        x = self.layer3(self.layer2(self.layer1(x)))
        pooled: Tensor = self.avgpool(x)
        return pooled.flatten(1)


class _Block(nn.Module):
    """A basic residual block that halves the image."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = norm(channels_out)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), norm(channels_out)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))  # type: ignore[no-any-return]
