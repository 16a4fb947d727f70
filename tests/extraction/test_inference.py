"""A loaded model gives the features of the probes for every kind of image, without Ray."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError
from raysl.extraction import (
    FeaturesConfig,
    Pixels,
    Reestimated,
    Trained,
    Weights,
    compute_features,
    encoder_by_name,
    load,
)
from raysl.extraction.exports import SETTINGS
from raysl.extraction.inference import starting_weights, stated_backbone
from raysl.model_export import CARD, ExportConfig, export
from raysl.storage import Folder
from raysl.storage.records import write_record
from raysl.stream.decode import evaluation_views
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import direct, make_run, views

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_run_gives_the_features_of_its_probes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, network = make_run(dataset, tmp_path / "run")
    images = dataset.read(np.arange(40), ("image",)).column("image").to_pylist()
    expected = direct(network, dataset)
    for source in (run, str(run.folder), f"{run.folder}/checkpoints/step-000000005"):
        model = load(source)
        np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-5)
    assert (model.image_size, model.width) == (16, 192)
    assert {"conv1", "res2", "res3", "res4", "pooled"} <= set(model.layers)
    assert model(images[:2], layer="res3").shape == (2, 96)
    assert model(images[:2], layer="res3:768").shape == (2, 96 * 4)
    with pytest.raises(UserError, match="Did you mean 'res3'"):
        model(images[:2], layer="ress3")
    assert views(dataset).shape[2:] == (16, 16)


def test_the_module_of_a_run_can_be_trained(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, network = make_run(dataset, tmp_path / "run")
    model = load(run)
    module = model.module()
    images_bchw = views(dataset)
    with torch.inference_mode():
        np.testing.assert_allclose(module.eval()(images_bchw), direct(network, dataset), rtol=1e-4, atol=1e-5)
    module.train()(images_bchw).sum().backward()
    assert all(weight.grad is not None for weight in module.parameters())
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert next(model.module().parameters()).any()
    with pytest.raises(UserError, match="'pixels' is no network"):
        load("pixels", bn_images=dataset).module()


def test_every_kind_of_image_is_the_same_image(tmp_path: Path) -> None:
    model = load("pixels", image_size=16)
    expected = Pixels().load(torch.device("cpu"), ["pooled"])(evaluation_views([png(PHOTO)], 16))["pooled"]
    (tmp_path / "photo.png").write_bytes(png(PHOTO))
    same: list[Any] = [
        png(PHOTO),
        PHOTO,
        PHOTO[None],
        Image.fromarray(PHOTO),
        Image.fromarray(PHOTO).convert("RGBA"),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
        torch.from_numpy(PHOTO).permute(2, 0, 1)[None],
    ]
    for image in [*same, io.BytesIO(png(PHOTO))]:
        assert torch.equal(model(image), expected)
    many = model([*same, np.stack([PHOTO, PHOTO])])
    assert torch.equal(many, expected.expand(len(same) + 2, -1))
    turned = Image.fromarray(np.rot90(PHOTO))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert torch.equal(model(image), expected)
    gray = model(PHOTO[..., 0])
    assert torch.equal(gray, model(np.repeat(PHOTO[..., :1], 3, axis=2)))


@pytest.mark.parametrize(
    ("mode", "through"),
    [(mode, mode) for mode in ("CMYK", "HSV", "LA", "RGBA", "RGBX", "YCbCr")]
    + [("PA", "LA"), ("La", "LA"), ("RGBa", "RGBA")],
)
def test_an_image_of_every_mode_has_the_colors_that_pillow_gives_it(mode: str, through: str) -> None:
    image = Image.fromarray(PHOTO).convert(through).convert(mode)
    model = load("pixels", image_size=16)
    torch.testing.assert_close(model(image), model(image.convert(through).convert("RGB")), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_an_image_of_16_bits_is_scaled_by_their_range(mode: str) -> None:
    made = load("pixels", image_size=16)(Image.new(mode, (20, 20), 51 * 257))
    torch.testing.assert_close(made, torch.full((1, 768), 51 / 255 - 0.5))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_image_of_numbers_without_a_range_is_refused(mode: str) -> None:
    with pytest.raises(UserError, match="values need a range"):
        load("pixels")(Image.new(mode, (20, 20)))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(UserError, match=rf"The device '{device}' cannot be used: .* Give \"cpu\""):
        load("pixels", device=device)


@pytest.mark.parametrize(
    "image",
    [
        *(np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), 3, b"text", [], "none.png"),
        *(torch.zeros(3, 4, 4, dtype=torch.bfloat16), torch.zeros(3, 4, 4, requires_grad=True)),
    ],
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(UserError):
        load("pixels")(image)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    model = load("pixels")
    (tmp_path / "good.png").write_bytes(png(PHOTO))
    (tmp_path / "bad.png").write_bytes(png(PHOTO)[:200])
    for images, says in (
        (
            [tmp_path / "good.png", tmp_path / "bad.png"],
            r"The image '.*/bad\.png' cannot be decoded: .*Leave it out",
        ),
        ([PHOTO, b"text"], r"The image number 1, counted from 0, cannot be decoded"),
        (str(tmp_path), "is a folder. Give the paths of its images"),
        (tmp_path / "none.png", r"The image '.*none\.png' cannot be read: [^\[]*none\.png does not exist\."),
        (torch.zeros(64, 65, 3, dtype=torch.uint8), r"a tensor of type torch\.uint8 and shape \(64, 65, 3\)"),
    ):
        with pytest.raises(UserError, match=says):
            model(images)


def test_gradients_can_be_computed_from_features() -> None:
    features = load("pixels")(PHOTO)
    head = torch.nn.Linear(features.shape[1], 2)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_features_with_the_statistics_of_images_are_those_of_probes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, _ = make_run(dataset, tmp_path / "run")
    images = dataset.read(np.arange(40), ("image",)).column("image").to_pylist()
    source = Trained(run, run.newest())
    # What probes use.
    encode = Reestimated(source, dataset, 16).load(torch.device("cpu"), ["pooled"])
    expected = encode(evaluation_views(images, 16))["pooled"]
    assert not torch.allclose(load(run)(images), expected, rtol=0.01)
    torch.testing.assert_close(load(run, bn_images=dataset)(images), expected)
    settings = FeaturesConfig(str(dataset.folder), str(tmp_path / "features"), bn_images=str(dataset.folder))
    stored = compute_features(str(run.folder), settings).load()
    np.testing.assert_allclose(stored, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    out = export(run, ExportConfig("safetensors", bn_images=str(dataset.folder)))
    exported = Weights(f"{out}/model.safetensors", run.config().backbone).network().state_dict()
    for name, values in Reestimated(source, dataset, 16).network().state_dict().items():
        assert not name.endswith(("running_mean", "running_var")) or torch.equal(exported[name], values)
    assert f"statistics of images of the data set `{dataset.manifest.fingerprint}`" in out.read(CARD).decode()
    assert torch.equal(load("pixels", bn_images=dataset)(images), load("pixels")(images))


def test_an_exported_run(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    out = export(run, ExportConfig("safetensors"))
    weights = Weights(f"{out}/model.safetensors", run.config().backbone)
    view = evaluation_views([png(PHOTO)], 16)
    expected = weights.load(torch.device("cpu"), ["pooled"])(view)["pooled"]
    for place in (str(out), f"{out}/model.safetensors"):
        model = load(place)
        assert model.image_size == 16
        assert torch.equal(model(PHOTO), expected)


def test_weights_of_torchvision_and_timm(tmp_path: Path) -> None:
    network = models.resnet18()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"Give its name, such as raysl\.load"):
        load(tmp_path / "r18.pth")
    expected = load(tmp_path / "r18.pth", "resnet18")
    assert (expected.image_size, expected.width) == (224, 512)
    pytest.importorskip("timm")
    (tmp_path / "timm").mkdir()
    torch.save(network.state_dict(), tmp_path / "timm" / "pytorch_model.bin")
    settings = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 64, 64], "tag": ""}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(settings))
    model = load(tmp_path / "timm")
    assert model.image_size == 64
    again = load(tmp_path / "r18.pth", BackboneConfig("resnet18"), image_size=64)
    torch.testing.assert_close(model(PHOTO), again(PHOTO), rtol=1e-4, atol=1e-5)


def test_an_untrained_backbone() -> None:
    model = load("random", "resnet18", image_size=32, seed=1)
    assert torch.equal(model(PHOTO), load("random", "resnet18", image_size=32, seed=1)(PHOTO))
    assert not torch.equal(model(PHOTO), load("random", "resnet18", image_size=32)(PHOTO))


def test_a_backbone_is_a_name_or_a_mapping_of_fields() -> None:
    assert load("random", "small").image_size == load("random", {"name": "small"}).image_size
    with pytest.raises(UserError, match=r"backbone\.nam"):
        load("random", {"nam": "small"})


def test_code_that_only_the_settings_of_an_export_name_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    stated = {"backbone": {"name": f"{tmp_path}/net.py:Net"}, "image_size": 32}
    write_record(Folder(str(tmp_path)), SETTINGS, stated)
    torch.save({}, tmp_path / "model.pth")
    for call in (load, lambda place: stated_backbone(starting_weights(place))):
        with pytest.raises(
            UserError, match=r"uses the code in .*net.py', which would be run now. If you trust it"
        ):
            call(str(tmp_path))
    (tmp_path / SETTINGS).unlink()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": f"../{tmp_path}/net.py:Net"}))
    no_network = r"is no network of timm\. Give the backbone"
    with pytest.raises(UserError, match=no_network):
        load(str(tmp_path))
    with pytest.raises(UserError, match=no_network):
        encoder_by_name(str(tmp_path), BackboneConfig())
    assert not (tmp_path / "ran").exists()
