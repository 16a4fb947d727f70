"""Maps of layers: those that the features are means of, and the patch tokens of a transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysl import extraction
from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError
from raysl.extraction import Pixels, RandomBackbone

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def maps(config: BackboneConfig, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return dict(extraction.load_maps(RandomBackbone(config, 0), CPU, layers)(IMAGES))


def test_features_are_the_means_of_the_maps() -> None:
    layers = ("conv1", "res2", "res4", "pooled")
    found = maps(BackboneConfig(), layers)
    with torch.inference_mode():
        features = RandomBackbone(BackboneConfig(), 0).load(CPU, layers)(IMAGES)
    assert {layer: tuple(one.shape[1:]) for layer, one in found.items()} == {
        "conv1": (24, 16, 16),
        "res2": (48, 8, 8),
        "res4": (192, 2, 2),
        "pooled": (192, 2, 2),
    }
    for layer in layers:
        torch.testing.assert_close(found[layer].mean((2, 3)), features[layer])
    assert set(maps(BackboneConfig(), ("res2",))) == {"res2"}


def test_patch_tokens_of_a_transformer_are_a_map_in_the_order_of_the_patches() -> None:
    pytest.importorskip("timm")
    config = BackboneConfig("timm/vit_tiny_patch16_224", patch_size=8)
    found = maps(config, ("pooled", "blocks"))
    assert {one.shape for one in found.values()} == {(2, 192, 4, 4)}
    network = RandomBackbone(config, 0).network().eval()
    with torch.inference_mode():
        body: Any = network.body
        tokens_btd = body.forward_features(network.normalized(IMAGES))
    torch.testing.assert_close(found["pooled"][:, :, 1, 2], tokens_btd[:, 1 + 1 * 4 + 2])


def test_pixels_are_their_own_map_and_statistics_can_be_estimated_again() -> None:
    found = extraction.load_maps(Pixels(), CPU, ("pooled",))(IMAGES)
    torch.testing.assert_close(found["pooled"], IMAGES.float() / 255 - 0.5)
    again = extraction.load_maps(RandomBackbone(BackboneConfig(), 0), CPU, ("conv1",), iter([IMAGES]))
    with torch.inference_mode():
        assert not torch.allclose(again(IMAGES)["conv1"], maps(BackboneConfig(), ("conv1",))["conv1"])


def test_a_layer_without_places_is_refused() -> None:
    with pytest.raises(UserError, match="'fc' has no map"):
        maps(BackboneConfig("resnet18"), ("fc",))
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="'head' has no map"):
        maps(BackboneConfig("timm/vit_tiny_patch16_224", patch_size=8), ("pooled", "head"))
