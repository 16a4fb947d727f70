"""What the recipes share: a ResNet-50 on the 1,281,167 training images of ImageNet-1k, in crops of 224 pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig


def resnet50(method: str, epochs: int, batch_size: int, view: ViewConfig, **others: Any) -> Pretraining:
    """Return the configuration of a run. By default, each worker takes 32 images of the batch.

    Args:
        others: other fields of `Pretraining`.
    """
    fields = {"workers": batch_size // 32, "backbone": BackboneConfig("resnet50"), **others}
    return Pretraining("", "", method, epochs, batch_size, view=replace(view, image_size=224), **fields)
