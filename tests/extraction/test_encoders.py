"""Runs, weights files and backbones are encoders, and layers are found by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import models

from raysl.backbone import network
from raysl.backbone.network import Backbone, BackboneConfig
from raysl.errors import UserError
from raysl.extraction import Encoder, RandomBackbone, Trained, Weights, encoder_by_name, layers, stages
from raysl.extraction.encoders import check_encoder, view_size
from raysl.model_export import ExportConfig, export
from raysl.run import Run
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run

CPU = torch.device("cpu")
RESNET = BackboneConfig(name="resnet18")
IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_stages_of_a_residual_network_are_means_over_their_maps() -> None:
    encoder = RandomBackbone(RESNET, seed=3)
    assert {"pooled", "res2", "res3", "res4", "res5", "layer4", "avgpool"} <= set(encoder.layers)
    with torch.inference_mode():
        made = encoder.load(CPU, ("pooled", "res3", "res5", "layer4"))(IMAGES)
    assert (made["res3"].shape, made["res5"].shape) == ((3, 128), (3, 512))
    assert torch.allclose(made["res5"], made["pooled"], atol=1e-5)
    assert torch.equal(made["res5"], made["layer4"])
    assert RandomBackbone(RESNET, seed=4).identity() != encoder.identity()


def test_grids_of_resnet50_have_the_published_sizes() -> None:
    """Goyal et al. 2019: 9,216 9,216 8,192 9,216 and 8,192 numbers at 224 pixels."""
    sides = {"conv1": (64, 112), "res2": (256, 56), "res3": (512, 28), "res4": (1024, 14), "res5": (2048, 7)}
    widths = {}
    for stage, (channels, side) in sides.items():
        widths[stage] = layers.reduce(torch.zeros(1, channels, side, side), 9216).shape[1]
    assert widths == {"conv1": 9216, "res2": 9216, "res3": 8192, "res4": 9216, "res5": 8192}


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4), (5, 1, 1)])
def test_maps_with_their_channels_last_are_those_with_their_channels_first(
    shape: tuple[int, int, int],
) -> None:
    """Swin gives the former."""
    map_bchw = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    last_bhwc = map_bchw.permute(0, 2, 3, 1).contiguous()
    torch.testing.assert_close(layers.reduce(last_bhwc, 0), map_bchw.mean((2, 3)))
    torch.testing.assert_close(layers.reduce(last_bhwc, 12), layers.reduce(map_bchw, 12))


def test_the_blocks_of_a_transformer_are_its_layers() -> None:
    encoder = RandomBackbone(BackboneConfig("timm/vit_tiny_patch16_224", patch_size=32), seed=3)
    assert stages(encoder) == (*(f"blocks.{number}" for number in range(12)), "pooled")
    made = encoder.load(CPU, ("blocks.6", "blocks.11", "blocks"))(IMAGES)
    assert made["blocks.6"].shape == (3, 192)
    torch.testing.assert_close(made["blocks.11"], made["blocks"])


def test_conv1_is_taken_after_its_relu_and_before_the_pool() -> None:
    encoder = RandomBackbone(RESNET, seed=3)
    assert stages(encoder) == ("conv1", "res2", "res3", "res4", "res5", "pooled")
    assert stages(RandomBackbone(BackboneConfig(), seed=0)) == ("conv1", "res2", "res3", "res4", "pooled")
    network: Any = encoder.network().eval()
    with torch.inference_mode():
        made = encoder.load(CPU, ("conv1:1024",))(IMAGES)["conv1:1024"]
        images_bchw = (IMAGES - network.mean) / network.std
        map_bchw = network.body.relu(network.body.bn1(network.body.conv1(images_bchw)))
    expected = torch.nn.functional.avg_pool2d(map_bchw, 8)
    assert torch.allclose(made, expected.flatten(1), atol=1e-5)


def test_tokens_of_a_transformer_are_averaged() -> None:
    encoder = RandomBackbone(BackboneConfig(name="vit_b_16"), seed=0)
    assert "encoder" in encoder.layers


def test_a_file_of_weights_is_what_torchvision_makes_of_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = models.resnet18().eval()
    file = tmp_path / "resnet18.pth"
    wrapped = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 90}, file)
    encoder = encoder_by_name(str(file), RESNET)
    assert isinstance(encoder, Weights)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network.fc = torch.nn.Identity()
    with torch.inference_mode():
        found = encoder.load(CPU, ("pooled",))(IMAGES)["pooled"]
        expected = network((IMAGES / 255 - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    identity = encoder.identity()
    torch.save(models.resnet18().state_dict(), file)
    assert encoder.identity() != identity


def test_a_file_of_weights_is_what_timm_makes_of_it(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    network = timm.create_model("resnet18d", num_classes=7).eval()
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network.reset_classifier(0)
    encoder = encoder_by_name(str(file), BackboneConfig(name="timm/resnet18d"))
    with torch.inference_mode():
        found = encoder.load(CPU, ("pooled",))(IMAGES)["pooled"]
        expected = network((IMAGES / 255 - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="resnet18d"):
        encoder_by_name(str(file), BackboneConfig(name="timm/resnet18dd")).load(CPU, ("pooled",))


def test_a_file_of_weights_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray workers have another working directory."""
    torch.save(models.resnet18().state_dict(), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    encoder = encoder_by_name("weights.pth", RESNET)
    monkeypatch.chdir("/")
    assert isinstance(encoder, Weights)
    encoder.network()
    (tmp_path / "weights.pth").unlink()
    with pytest.raises(UserError, match=r"weights\.pth' cannot be read: .* All machines"):
        encoder.network()
    assert Weights("s3://bucket/weights.pth", RESNET).file == "s3://bucket/weights.pth"


def test_width_of_a_backbone_of_timm() -> None:
    pytest.importorskip("timm")
    mobile = network.timm_backbone("mobilenetv3_small_050").eval()
    with torch.inference_mode():
        assert mobile(IMAGES).shape == (3, mobile.width)


def test_a_convolution_without_activation_is_no_stage() -> None:
    body = torch.nn.Sequential()
    for name in ("conv1", "bn1", "layer1"):
        body.add_module(name, torch.nn.Conv2d(3, 3, 1))
    assert "conv1" not in layers.modules(Backbone(body, 3))
    body.add_module("act1", torch.nn.ReLU())
    assert layers.modules(Backbone(body, 3))["conv1"] == "body.act1"


def test_layers_of_a_network_that_computes_its_widths() -> None:
    assert "trunk_output" in RandomBackbone(BackboneConfig(name="regnet_y_400mf"), seed=0).layers


def test_an_exported_run_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    out = export(run, ExportConfig("safetensors"))
    loaded = Weights(str(out / "model.safetensors"), run.config().backbone).network().body.state_dict()
    own = Trained(run, run.newest()).network().body.state_dict()
    assert all(torch.equal(loaded[key], own[key]) for key in own if not key.endswith("_tracked"))


def test_a_stage_is_the_same_layer_by_the_names_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    file = str(tmp_path / "resnet18.pth")
    torch.save(models.resnet18().state_dict(), file)
    ours, theirs = Weights(file, RESNET), Weights(file, BackboneConfig(name="timm/resnet18"))
    assert stages(ours) == stages(theirs)
    with torch.inference_mode():
        one, other = (encoder.load(CPU, stages(ours))(IMAGES) for encoder in (ours, theirs))
    for stage in stages(ours):
        torch.testing.assert_close(one[stage], other[stage], rtol=1e-4, atol=1e-5)


def test_an_edited_network_of_the_user_is_another_one(tmp_path: Path) -> None:
    file, weights = tmp_path / "net.py", tmp_path / "weights.pth"
    file.write_text("raise RuntimeError('the file was imported')")
    weights.write_bytes(b"weights")
    own = BackboneConfig(f"{file}:Net")
    encoders: list[Encoder] = [RandomBackbone(own, 0), Weights(str(weights), own)]
    before = [encoder.identity() for encoder in encoders]
    assert [encoder.identity() for encoder in encoders] == before
    file.write_text("Net = None")
    assert all(encoder.identity() != known for encoder, known in zip(encoders, before, strict=True))


def test_other_starting_weights_are_another_untrained_network(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"some")
    encoder = RandomBackbone(BackboneConfig(weights=str(file)), 0)
    before = encoder.identity()
    assert encoder.identity() == before
    file.write_bytes(b"others")
    assert encoder.identity() != before
    # A run knows the hash of its file, which may be gone.
    file.unlink()
    assert replace(encoder, weights_hash=before["weights"]).identity() == before


def test_an_untrained_backbone_of_timm() -> None:
    timm = pytest.importorskip("timm")
    encoder = encoder_by_name("random", BackboneConfig(name="timm/resnet18"), seed=3)
    assert isinstance(encoder, RandomBackbone)
    assert stages(encoder) == stages(RandomBackbone(RESNET, seed=3))
    one, other = encoder.network().body.state_dict(), encoder.network().body.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert set(one) == set(timm.create_model("resnet18", num_classes=0).state_dict())
    with pytest.raises(UserError, match="resnet18"):
        _ = encoder_by_name("random", BackboneConfig(name="timm/resnet181")).layers


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(models.resnet18().state_dict(), file)
    with pytest.raises(UserError, match=r"lacks .* weights of the backbone 'resnet34'"):
        encoder_by_name(str(file), BackboneConfig(name="resnet34")).load(CPU, ("pooled",))
    with pytest.raises(UserError, match="do not fit"):
        encoder_by_name(str(file), BackboneConfig(name="resnet18", stem="small")).load(CPU, ("pooled",))
    torch.save(models.resnet34().state_dict(), file)
    with pytest.raises(UserError, match="weights more than the backbone 'resnet18'"):
        encoder_by_name(str(file), RESNET).load(CPU, ("pooled",))
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="no weights"):
        encoder_by_name(str(file), RESNET).load(CPU, ("pooled",))
    with pytest.raises(UserError, match="There is no checkpoint at"):
        encoder_by_name(str(tmp_path / "nothing"), RESNET)
    with pytest.raises(UserError, match="There is no checkpoint at"):
        encoder_by_name(str(tmp_path), RESNET)
    with pytest.raises(UserError, match="It is a pattern, and a command takes one run"):
        encoder_by_name(str(tmp_path / "runs" / "*"), RESNET)


def test_a_folder_of_an_export_states_its_backbone_and_size(tmp_path: Path) -> None:
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    out = export(run, ExportConfig("safetensors"))
    for place in (str(out), f"{out}/model.safetensors"):
        encoder = encoder_by_name(place, BackboneConfig())
        assert isinstance(encoder, Weights)
        assert (encoder.config, view_size(encoder)) == (run.config().backbone, 16)
        check_encoder(encoder, ["res3"])
    assert (
        view_size(encoder_by_name(str(out), RESNET)) == 224
    )  # The size that is stated is of another network.
    with pytest.raises(UserError, match=r"lacks .* weights of the backbone 'resnet18'"):
        check_encoder(encoder_by_name(f"{out}/model.safetensors", RESNET), ["res3"])


def test_a_backbone_that_is_given_and_stated_has_the_stated_size(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file, stated = str(tmp_path / "model.safetensors"), {"backbone": "resnet18", "image_size": "64"}
    safetensors.save_file(models.resnet18().state_dict(), file, stated)
    assert [view_size(encoder_by_name(file, config)) for config in (BackboneConfig(), RESNET)] == [64, 64]
    (tmp_path / "config.json").write_text('{"architecture"')
    assert view_size(encoder_by_name(file, BackboneConfig("resnet34"))) == 224


@pytest.mark.parametrize(
    "beside", ['{"architectures": ["BertModel"]}', '{"architecture": "resnet18"}', "no JSON"]
)
def test_a_config_beside_a_plain_file_does_not_replace_a_backbone(beside: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(beside)
    encoder = encoder_by_name(str(tmp_path / "weights.pth"), BackboneConfig())
    assert isinstance(encoder, Weights)
    assert (encoder.config.name, view_size(encoder)) == ("small", 224)


def test_a_folder_of_timm_states_its_backbone(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 96, 96]}}'
    )
    for name, config in (("", BackboneConfig()), ("pytorch_model.bin", BackboneConfig("timm/resnet18"))):
        encoder = encoder_by_name(str(tmp_path / name), config)
        assert isinstance(encoder, Weights)
        assert (encoder.config.name, view_size(encoder)) == ("timm/resnet18", 96)


def test_a_run_and_each_of_its_checkpoints(tmp_path: Path) -> None:
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    hint = re.escape(f"Did you mean {str(tmp_path / 'run')!r}?")
    for open_it in (lambda name: encoder_by_name(name, RESNET), Run.open):
        with pytest.raises(UserError, match=hint):
            open_it(str(tmp_path / "rum"))
    newest = encoder_by_name(str(run.folder), RESNET)
    assert newest.identity() == encoder_by_name(f"{run.folder}/checkpoints/step-000000005", RESNET).identity()
    assert stages(newest) == ("conv1", "res2", "res3", "res4", "pooled")
    with pytest.raises(UserError, match="step-000000005"):
        encoder_by_name(f"{run.folder}/checkpoints/step-000000006", RESNET)


def test_the_moving_average_of_a_backbone_is_an_encoder(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, model = make_run(
        dataset, tmp_path / "byol", method="byol", parts={"byol": {"hidden": 16, "dim": 16}}
    )
    found = Trained(run, run.newest(), "momentum").network().state_dict()
    wanted = model.objective.target_backbone.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert Trained(run, run.newest(), "momentum").identity() != Trained(run, run.newest()).identity()
    plain, _ = make_run(dataset, tmp_path / "pirl")
    with pytest.raises(UserError, match="has no moving average"):
        Trained(plain, plain.newest(), "momentum")
