"""Files of weights that others published are those of the backbone, or are refused."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from raysl.backbone.network import Backbone, BackboneConfig, build
from raysl.errors import UserError
from raysl.extraction import RandomBackbone, Trained, Weights, encoders, external_weights
from raysl.model_export import ExportConfig, export
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run


def shapes_of(name: str) -> dict[str, Tensor]:
    """The weights of a torchvision classifier, all zero and of next to no bytes."""
    with torch.device("meta"):
        network = models.get_model(name)
    return {key: torch.zeros(()).expand(value.shape) for key, value in network.state_dict().items()}


def fill(backbone: str, state: dict[str, Tensor], norm: str = "batch") -> Backbone:
    made = build(BackboneConfig(name=backbone, norm=norm))  # type: ignore[arg-type]
    external_weights.fill(made.body, state, "file.pth", backbone)
    return made


@pytest.mark.parametrize(
    ("backbone", "deeper"),
    [("resnet18", "resnet34"), ("resnet50", "resnet101"), ("convnext_tiny", "convnext_small")],
)
def test_weights_of_a_deeper_network_are_refused(backbone: str, deeper: str) -> None:
    with pytest.raises(UserError, match=rf"'file\.pth' .* weights more than the backbone '{backbone}' has"):
        fill(backbone, shapes_of(deeper))
    fill(backbone, shapes_of(backbone))  # with its classifier


@pytest.mark.parametrize("extra", ["layer5.0.conv1.weight", "layer1.0.gamma", "conv2.weight"])
def test_what_is_left_over_inside_is_refused_whatever_it_is_called(extra: str) -> None:
    with pytest.raises(UserError, match=extra):
        fill("resnet18", {**shapes_of("resnet18"), extra: torch.zeros(1)})


def test_statistics_of_batches_are_not_dropped_for_group_norm() -> None:
    with pytest.raises(UserError, match=r"bn1\.running_mean"):
        fill("resnet18", shapes_of("resnet18"), norm="group")


def test_a_layer_scale_that_the_backbone_does_not_have_is_refused() -> None:
    """Where timm has it there stands a module that does nothing elsewhere, as where a head was."""
    timm = pytest.importorskip("timm")
    body = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    scaled = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, init_values=1.0).state_dict()
    with pytest.raises(UserError, match=r"blocks\.0\.ls1\.gamma"):
        external_weights.fill(body, scaled, "file.pth", "timm/vit")
    external_weights.fill(
        body, {key: value for key, value in scaled.items() if ".ls" not in key}, "file.pth", "timm/vit"
    )


def test_another_shape_is_named_with_both() -> None:
    state = {**shapes_of("resnet18"), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(UserError, match=r"'conv1\.weight', \(64, 3, 3, 3\) in the file and \(64, 3, 7, 7\)"):
        fill("resnet18", state)


def test_what_is_lacking_and_what_is_there_are_named() -> None:
    halves = {"module.encoder_q": shapes_of("resnet18"), "module.encoder_k": shapes_of("resnet18")}
    state = {f"{half}.{key}": value for half, whole in halves.items() for key, value in whole.items()}
    with pytest.raises(UserError) as caught:
        fill("resnet34", state)
    for said in ("'layer1.2.conv1.weight'", "'module.encoder_q', 'module.encoder_k'", "more"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "holder", [(), ("state_dict",), ("teacher",), ("classy_state_dict", "base_model", "model", "backbone")]
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.base_encoder.", "_feature_blocks."])
def test_weights_are_found_in_files_of_other_projects(
    tmp_path: Path, prefix: str, holder: tuple[str, ...]
) -> None:
    wanted = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3)}
    held: object = {
        **{prefix + key: value for key, value in wanted.items()},
        "projector.0.weight": torch.ones(1),
    }
    for key in reversed(holder):
        held = {"epoch": 100, "args": argparse.Namespace(lr=0.03), key: held}
    torch.save(held, tmp_path / "file.pth")
    body = nn.Sequential(nn.Linear(2, 3))
    state = external_weights.weights((tmp_path / "file.pth").read_bytes(), "file.pth")
    external_weights.fill(body, state, "file.pth", "linear")
    assert all(torch.equal(value, wanted[key]) for key, value in body.state_dict().items())


def test_an_exported_run_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    out = export(run, ExportConfig("safetensors"))
    loaded = Weights(str(out / "model.safetensors"), run.config().backbone).network().body.state_dict()
    own = Trained(run, run.newest()).network().body.state_dict()
    assert all(torch.equal(loaded[key], own[key]) for key in own if not key.endswith("_tracked"))


def test_safetensors_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(UserError, match=r"'a\.safetensors' holds no weights"):
        external_weights.weights(b"no weights", "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"'a\.safetensors' .* Install raysl\[export\]"):
        external_weights.weights(b"", "a.safetensors")


def test_a_tag_of_timm_says_how_images_were_normalised() -> None:
    pytest.importorskip("timm")
    dino = external_weights.timm_backbone("vit_small_patch16_224.dino")
    assert (dino.mean.flatten() / 255).tolist() == pytest.approx((0.485, 0.456, 0.406))
    with pytest.raises(UserError, match=r"vit_small_patch16_224\.dina"):
        external_weights.timm_backbone("vit_small_patch16_224.dina")


def test_a_convolution_alone_is_no_stage() -> None:
    body = nn.Sequential()
    for name in ("conv1", "bn1", "layer1"):
        body.add_module(name, nn.Conv2d(3, 3, 1))
    assert "conv1" not in encoders._places(Backbone(body, 3))
    body.add_module("act1", nn.ReLU())
    assert encoders._places(Backbone(body, 3))["conv1"] == "body.act1"


def test_networks_that_compute_their_widths_have_layers_too() -> None:
    assert "trunk_output" in RandomBackbone(BackboneConfig(name="regnet_y_400mf"), seed=0).layers
