"""Backbones: what goes in, what comes out, and whose weights they can exchange."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from raysl import plugins
from raysl.backbone import network as networks
from raysl.backbone.network import BackboneConfig, encode
from raysl.errors import UserError

CONFIGS = [
    BackboneConfig("small"),
    BackboneConfig("small", norm="group"),
    BackboneConfig("resnet18", stem="small"),
    BackboneConfig("resnet18", norm="group"),
]


def images(b: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda c: f"{c.name}-{c.stem}-{c.norm}")
def built(request: pytest.FixtureRequest) -> networks.Backbone:
    return networks.build(request.param)


@pytest.mark.parametrize("side", [9, 32, 64])
def test_features_of_bytes_at_any_size(built: networks.Backbone, side: int) -> None:
    features_bd = built(images(2, side))
    assert features_bd.shape == (2, built.width)
    assert features_bd.dtype == torch.float32
    assert features_bd.isfinite().all()


def test_bytes_and_the_same_numbers_as_floats_give_the_same(built: networks.Backbone) -> None:
    built.eval()
    assert torch.equal(built(images(2, 32)), built(images(2, 32).float()))
    built.train()


def test_imagenet_statistics_are_taken_away_and_saved_with_the_weights() -> None:
    small = networks.build(BackboneConfig())
    small.body = torch.nn.Identity()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
    found = small(images(1, 4)).view(1, 3, 4, 4)
    torch.testing.assert_close(found, (images(1, 4).float() - mean) / std)
    assert {"mean", "std"} <= set(small.state_dict())


def test_group_norm_does_not_see_the_other_images() -> None:
    for config in CONFIGS:
        network = networks.build(config)
        alone = network(images(4, 32)[:2])
        together = network(images(4, 32))[:2]
        assert torch.allclose(alone, together, atol=1e-4) == (config.norm == "group")


def test_encode_keeps_the_crops_of_an_image_together() -> None:
    network = networks.build(BackboneConfig(norm="group"))
    views_bpchw = images(6, 9).view(2, 3, 3, 9, 9)
    features_bpd = encode(network, views_bpchw)
    assert features_bpd.shape == (2, 3, network.width)
    for i in range(2):
        torch.testing.assert_close(features_bpd[i], network(views_bpchw[i]), atol=1e-5, rtol=1e-4)


def test_the_body_has_the_weights_layout_of_torchvision() -> None:
    state = networks.build(BackboneConfig("resnet18")).body.state_dict()
    theirs = models.resnet18(weights=None)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet50", 2048), ("wide_resnet50_2", 2048), ("resnext50_32x4d", 2048)]
)
def test_width_of_the_larger_backbones(name: str, width: int) -> None:
    with torch.device("meta"):
        assert networks.build(BackboneConfig(name)).width == width


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"name": "resnet51"}, r"Unknown backbone 'resnet51'. Did you mean 'resnet5?0?1?1?8?"),
        ({"name": "resnet19"}, "Unknown backbone 'resnet19'. Did you mean 'resnet18'"),
        ({"name": "vgg11", "stem": "small"}, "'vgg11' has no stem"),
        ({"name": "vgg11", "norm": "group"}, "norm 'group'"),
        ({"stem": "smal"}, r"--backbone\.stem is 'smal'; it must be one of standard, small"),
        ({"norm": "layer"}, r"--backbone\.norm is 'layer'; it must be one of batch, joint, sync, group"),
        ({"name": "small", "patch_size": -1}, r"--backbone\.patch-size is -1"),
    ],
)
def test_unknown_names(wrong: dict[str, str], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        networks.build(BackboneConfig(**wrong))  # type: ignore[arg-type]


def test_any_torchvision_classifier_is_a_backbone() -> None:
    network = networks.build(BackboneConfig("mobilenet_v3_small")).eval()
    assert network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, network.width) == (2, 1024)


@pytest.mark.parametrize(
    ("config", "side", "shape"),
    [
        (BackboneConfig("small"), 32, (192, 2, 2)),
        (BackboneConfig("resnet18"), 64, (512, 2, 2)),
        (BackboneConfig("mobilenet_v3_small"), 64, (576, 2, 2)),
        (BackboneConfig("densenet121"), 64, (1024, 2, 2)),
        (BackboneConfig("timm/vit_tiny_patch16_224", patch_size=8), 32, (192, 4, 4)),
    ],
)
def test_maps_before_pooling(config: BackboneConfig, side: int, shape: tuple[int, ...]) -> None:
    network = networks.build(config).eval()
    views_bpchw = images(2, side).view(2, 1, 3, side, side)
    maps_bpdhw = networks.encode_maps(network, views_bpchw)
    assert maps_bpdhw.shape == (2, 1, *shape)
    if config.name in ("small", "resnet18"):
        torch.testing.assert_close(maps_bpdhw.mean((-2, -1)), encode(network, views_bpchw))


def test_a_transformer_of_timm_takes_any_size_that_its_patches_divide() -> None:
    network = networks.build(BackboneConfig("timm/vit_tiny_patch16_224", patch_size=4))
    assert network(images(2, 32)).shape == network(images(2, 16)).shape == (2, 192)
    with pytest.raises(UserError, match=r"--backbone\.patch-size is 4 .*'timm/resnet18' has no patches"):
        networks.build(BackboneConfig("timm/resnet18", patch_size=4))


def test_a_size_that_a_backbone_does_not_take_is_refused() -> None:
    networks.check_size(BackboneConfig("vit_b_16"), 224)
    with pytest.raises(
        UserError, match=r"'vit_b_16' does not take images of 32 pixels .* Give --view\.image-size 224,"
    ):
        networks.check_size(BackboneConfig("vit_b_16"), 32, "--view.image-size")


def flat() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())


def test_a_function_of_the_user_is_a_backbone() -> None:
    config = networks.config_of(flat)
    assert config.name == f"{__name__}:flat"
    network = networks.build(config)
    assert network.width == 12
    assert network(images(2, 16)).shape == (2, 12)
    for other in (flat(), lambda: flat()):
        with pytest.raises(UserError, match="cannot be built again by workers"):
            networks.config_of(other)
    with pytest.raises(UserError, match="has no function 'absent'"):
        networks.build(BackboneConfig(f"{__name__}:absent"))
    with pytest.raises(UserError, match=r"must need no arguments: .* missing 1 required positional argument"):
        networks.build(BackboneConfig("os.path:join"))


def test_a_run_of_a_stranger_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_PLUGINS", "")
    with pytest.raises(UserError, match="--plugin"):
        plugins.check_trusted(["module_of_a_stranger"], "runs/a")
    plugins.trust("module_of_a_stranger")
    plugins.check_trusted(["module_of_a_stranger"], "runs/a")
