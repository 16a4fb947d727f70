"""Exported backbones are reloaded, and give the features of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import raysl
from raysl.backbone.external_weights import safetensors_metadata
from raysl.backbone.network import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneConfig, build
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining, ViewConfig
from raysl.errors import UserError
from raysl.evaluation.results import KEY
from raysl.extraction import Trained
from raysl.extraction.heads import trained_model
from raysl.model_export import CARD, ExportConfig, export
from raysl.model_export.formats import _with_sorted_metadata
from raysl.objectives.audio_visual import SoundBackbone
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_clips, make_dataset, write_rows

# A row of a probe of the trained network; a test adds the step.
ROW = {
    **dict.fromkeys(KEY, "x"),
    "train": "t",
    "seed": 0,
    "encoder": "trained",
    "value": 0.4321,
    "primary": True,
}


def made(folder: Path, backbone: BackboneConfig) -> Run:
    """A run with a checkpoint at step 5, whose batch statistics are not those of a new network."""
    dataset = make_dataset(folder / "set", 8)
    config = Pretraining(
        str(dataset.folder),
        str(folder / "run"),
        batch_size=4,
        view=ViewConfig(image_size=32),
        backbone=backbone,
    )
    run = Run.begin(config, dataset, {})
    body = build(backbone)
    with torch.no_grad():
        for value in body.body.state_dict().values():
            value.mul_(1.1) if value.is_floating_point() else value.add_(3)
    saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
    saver.save(5, {"network": {f"backbone.{name}": value for name, value in body.state_dict().items()}}, None)
    saver.wait()
    return run


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("resnet"), BackboneConfig("resnet18"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("small"), BackboneConfig())


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32)).astype(np.float32))


def expected(run: Run) -> Tensor:
    backbone: Backbone = Trained(run, run.newest()).network().eval()
    with torch.inference_mode():
        found: Tensor = backbone(images())
    return found


def normalized() -> Tensor:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images() / 255 - mean) / std


def features(network: nn.Module) -> Any:
    with torch.inference_mode():
        return network.eval()(normalized())


def code(out: Folder, block: int) -> str:
    """A program on the card."""
    return out.read(CARD).decode().split("```python\n")[1 + block].partition("```")[0]


def assert_the_card_gives_the_features_of_the_probes(
    run: Run, form: Any, monkeypatch: pytest.MonkeyPatch, block: int = 0
) -> None:
    """Run the program on the card, in its folder, on a photo that is not square, and on one of the size of the run."""
    out = export(run, ExportConfig(form))
    monkeypatch.chdir(str(out))
    coarse = np.random.default_rng(1).integers(0, 256, (7, 9, 3), np.uint8)
    for size in ((131, 77), (32, 32)):
        Image.fromarray(coarse).resize(size).save("photo.jpg")
        names: dict[str, Any] = {}
        with torch.inference_mode():
            exec(code(out, block), names)
        wanted = raysl.load(run)("photo.jpg")
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            torch.as_tensor(names["features"]) / scale, wanted / scale, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("form", "name", "patch_size"),
    [
        ("torchvision", "resnet18", 0),
        ("torchvision", "convnext_tiny", 0),
        ("timm", "resnet18", 0),
        ("timm", "timm/resnet10t", 0),
        ("auto", "timm/vit_tiny_patch16_224", 0),
        ("auto", "timm/vit_tiny_patch16_224", 8),
        ("auto", "small", 0),
        ("onnx", "small", 0),
    ],
)
def test_the_lines_on_the_card_give_the_features_that_probes_measure(
    form: str, name: str, patch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("timm", "safetensors", *(("onnxscript", "onnxruntime") if form == "onnx" else ())):
        pytest.importorskip(package)
    run = made(tmp_path, BackboneConfig(name, patch_size=patch_size))
    assert_the_card_gives_the_features_of_the_probes(run, form, monkeypatch)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_the_card_of_safetensors_also_loads_without_raysl(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("timm", "safetensors"):
        pytest.importorskip(package)
    run = made(tmp_path, BackboneConfig(name, patch_size=8 if "vit" in name else 0))
    assert_the_card_gives_the_features_of_the_probes(run, "safetensors", monkeypatch, block=1)


@pytest.mark.parametrize("backbone", [BackboneConfig(), BackboneConfig("resnet18", stem="small")])
def test_the_card_of_a_network_of_raysl_names_onnx(backbone: BackboneConfig, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    card = export(made(tmp_path, backbone), ExportConfig()).read(CARD).decode()
    assert "`raysl export RUN --format onnx`" in card
    assert "after 5 of 20 steps of pretraining" in card
    assert card.count("```python") == 1


def test_timm_loads_it_from_the_folder(resnet: Run) -> None:
    timm = pytest.importorskip("timm")
    out = export(resnet, ExportConfig("timm"))
    network = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    torch.testing.assert_close(features(network), expected(resnet), rtol=1e-4, atol=1e-5)
    with_head = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)
    assert features(with_head).shape == (3, 5)
    with_head.reset_classifier(0)
    torch.testing.assert_close(features(with_head), expected(resnet), rtol=1e-4, atol=1e-5)


def test_timm_gets_the_names_of_torchvision(resnet: Run) -> None:
    ours = torch.load(export(resnet, ExportConfig("timm")).open("pytorch_model.bin"), weights_only=True)
    theirs = torch.load(export(resnet, ExportConfig("torchvision")).open("model.pth"), weights_only=True)
    assert list(ours) == list(theirs)


def test_safetensors_hold_any_backbone(small: Run) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    out = export(small, ExportConfig("safetensors"))
    body = build(BackboneConfig()).body
    body.load_state_dict(safetensors.load(out.read("model.safetensors")))
    torch.testing.assert_close(features(body), expected(small), rtol=1e-4, atol=1e-5)


def test_safetensors_keep_names_in_any_alphabet() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    metadata = {"method": "größer", "backbone": "/home/jürgen/netze/网.py:Net"}
    data = _with_sorted_metadata(safetensors.save({"a": torch.arange(6.0)}, metadata))
    assert safetensors.load(data)["a"].tolist() == list(range(6))
    assert safetensors_metadata(data) == metadata


def test_a_folder_with_other_weights_is_refused(small: Run, tmp_path: Path) -> None:
    """raysl.load would take the old weights for those that the new card describes."""
    out = str(tmp_path / "out")
    for _ in range(2):
        export(small, ExportConfig("safetensors", out))
    before = (tmp_path / "out" / CARD).read_bytes()
    (tmp_path / "out" / "sound.pth").touch()
    with pytest.raises(UserError, match=r"holds other weights, 'sound\.pth', .* Give another --out"):
        export(small, ExportConfig("safetensors", out))
    (tmp_path / "out" / "sound.pth").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds other weights, 'pytorch_model\.bin'"):
        export(small, ExportConfig("safetensors", out))
    assert (tmp_path / "out" / CARD).read_bytes() == before


def test_onnx_holds_any_backbone_for_any_number_of_images(small: Run) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    out = export(small, ExportConfig("onnx"))
    session = reference.ReferenceEvaluator(onnx.load_from_string(out.read("model.onnx")))
    (found,) = session.run(None, {"images_bchw": images().numpy()})
    np.testing.assert_allclose(found, expected(small).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_network_of_the_sounds_is_a_file_of_its_own(form: Any, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "set", 8)
    parts = {"audio_visual": {"sound_width": 4, "dim": 8}}
    run = raysl.pretrain(
        clips, str(tmp_path / "run"), method="audio_visual", epochs=1, batch_size=4, local=True, parts=parts
    )
    objective: Any = trained_model(Trained(run, run.newest())).objective
    network, sounds_bchw = objective.sound_backbone.eval(), torch.rand(3, *objective.views["sound"].shape)
    out = export(run, ExportConfig(form))
    if form == "onnx":
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        onnx = pytest.importorskip("onnx")
        session = reference.ReferenceEvaluator(onnx.load_from_string(out.read("sound.onnx")))
        found = torch.from_numpy(session.run(None, {"sounds_bchw": 255 * sounds_bchw.numpy()})[0])
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        other = SoundBackbone(4).eval()
        other.load_state_dict(safetensors.load(out.read("sound.safetensors")))
        found = other(255 * sounds_bchw).detach()
    torch.testing.assert_close(found, network(255 * sounds_bchw).detach(), rtol=1e-4, atol=1e-4)
    assert "SoundBackbone" in out.read(CARD).decode()


def test_the_card_says_what_it_is_and_how_it_was_made(resnet: Run, tmp_path: Path) -> None:
    write_rows(resnet.folder, [{**ROW, "step": 5}, {**ROW, "step": 4, "value": 0.1234}])
    out = export(resnet, ExportConfig(out=str(tmp_path), step=5))
    card = out.read(CARD).decode()
    for part in ("pirl-jigsaw", "resnet18", "test-8-16-0", "0.4321", "raysl pretrain", "License"):
        assert part in card
    assert "0.1234" not in card


@pytest.mark.parametrize(
    ("norm", "num_images", "answer"),
    [
        ("batch", 8, "| BatchNorm | statistics of images of the data set `test-8-16-0` |"),
        ("batch", 1, "| BatchNorm | statistics of pretraining;"),
        ("group", 8, "| BatchNorm | none in this network |"),
    ],
)
def test_the_card_says_which_statistics_there_are(
    norm: Any, num_images: int, answer: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    images = str(make_dataset(tmp_path / "images", num_images).folder)
    run = made(tmp_path, BackboneConfig(norm=norm))
    assert answer in export(run, ExportConfig("safetensors", bn_images=images)).read(CARD).decode()


def test_an_export_that_is_cut_off_leaves_no_card_of_other_weights(
    resnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(resnet, ExportConfig("torchvision", out=str(tmp_path)))
    monkeypatch.setattr("raysl.model_export.write_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(resnet, ExportConfig("torchvision", out=str(tmp_path)))
    assert not out.exists(CARD)


def test_names_from_rows_are_no_markup_on_the_card(resnet: Run, tmp_path: Path) -> None:
    row = {**ROW, "step": 5}
    write_rows(resnet.folder, [{**row, "name": "<b>|\n# owned", "layer": "[a](b)"}])
    card = export(resnet, ExportConfig(out=str(tmp_path), step=5)).read(CARD).decode()
    assert "<b>" not in card
    assert "\n# owned" not in card
    assert "[a](b)" not in card


def test_the_card_shows_what_the_baselines_gave(resnet: Run, tmp_path: Path) -> None:
    row = {**ROW, "step": 5}
    baseline = {**row, "encoder": "random", "step": 0, "value": 0.4567}
    others = ("probe", "layer", "name", "protocol", "train", "test")
    rows = [
        row,
        baseline,
        {**row, "encoder": "pixels", "step": 0, "value": 0.2222},
        {**row, "layer": "res2", "value": 0.5},
        *({**baseline, key: "y", "value": 0.9999} for key in others),
        {**baseline, "name": "z", "primary": False, "value": 0.9999},
        {**row, "step": 4, "value": 0.9999},
    ]
    write_rows(resnet.folder, rows)
    card = export(resnet, ExportConfig(out=str(tmp_path), step=5)).read(CARD).decode()
    assert "| probe | layer | measure | trained | untrained | raw pixels | protocol | train | test |" in card
    assert "| x | x | x | 0.4321 | 0.4567 | 0.2222 | `x` | `t` | `x` |" in card
    assert "| x | res2 | x | 0.5000 |  |  | `x` | `t` | `x` |" in card
    assert "too high" not in card
    assert "0.9999" not in card


def test_the_card_marks_scores_on_the_train_images(resnet: Run, tmp_path: Path) -> None:
    row = {**ROW, "step": 5}
    write_rows(resnet.folder, [row, {**row, "test": "t"}])
    card = export(resnet, ExportConfig(out=str(tmp_path), step=5)).read(CARD).decode()
    assert card.count("| `t` | `x` |") == card.count("| `t` | the same images |") == 1
    assert "so scores of probes with labels are too high." in card


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_a_backbone_without_such_a_layout_is_refused_before_the_weights_are_read(
    small: Run, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trained, "network", lambda self: pytest.fail("the weights are read"))
    with pytest.raises(UserError, match="--format safetensors"):
        export(small, ExportConfig(form))


def test_a_refused_format_names_the_others_that_work(tmp_path: Path) -> None:
    run = made(tmp_path, BackboneConfig("timm/vit_tiny_patch16_224", patch_size=8))
    with pytest.raises(UserError, match="Use --format timm, safetensors or onnx"):
        export(run, ExportConfig("torchvision"))


def test_a_checkpoint_that_is_not_there_is_told(small: Run) -> None:
    with pytest.raises(UserError, match="step-000000005"):
        export(small, ExportConfig(step=7))


def test_a_missing_package_names_the_extra(small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"\.\[export\]"):
        export(small, ExportConfig("safetensors"))
