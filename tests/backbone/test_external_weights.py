"""Weights files of other projects load exactly, or are refused with a reason."""

from __future__ import annotations

import argparse
import ast
import logging
import pathlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from raysl.backbone import external_weights, network
from raysl.backbone.external_weights import load_weights_into
from raysl.backbone.network import BackboneConfig, build
from raysl.errors import UserError
from raysl.extraction.inference import starting_weights

State = dict[str, Tensor]


class Net(nn.Module):
    """A small network with children named as in a ResNet."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Identity()


WANTED = Net(1).state_dict()
OTHER = Net(2).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def load(folder: Path, held: object, name: str = "file.pth") -> State:
    torch.save(held, folder / name)
    body = Net(0)
    load_weights_into(body, str(folder / name))
    return body.state_dict()


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[key], other[key]) for key in other)


def shapes_of(name: str) -> State:
    """Return the weights of a torchvision classifier, all zero and of almost no bytes."""
    with torch.device("meta"):
        network = models.get_model(name)
    return {key: torch.zeros(()).expand(value.shape) for key, value in network.state_dict().items()}


def fill(backbone: str, state: State, norm: Any = "batch") -> None:
    external_weights.fill(build(BackboneConfig(name=backbone, norm=norm)).body, state, "file.pth", backbone)


@pytest.mark.parametrize(
    ("backbone", "deeper"),
    [("resnet18", "resnet34"), ("resnet50", "resnet101"), ("convnext_tiny", "convnext_small")],
)
def test_a_deeper_network_is_refused(backbone: str, deeper: str) -> None:
    with pytest.raises(UserError, match=rf"'file\.pth' .* weights more than the backbone '{backbone}'"):
        fill(backbone, shapes_of(deeper))
    fill(backbone, shapes_of(backbone))  # With its classifier.


@pytest.mark.parametrize("extra", ["layer5.0.conv1.weight", "layer1.0.gamma", "conv2.weight"])
def test_extra_weights_inside_the_network_are_refused(extra: str) -> None:
    with pytest.raises(UserError, match=extra):
        fill("resnet18", {**shapes_of("resnet18"), extra: torch.zeros(1)})


def test_batch_statistics_are_not_dropped_for_group_norm() -> None:
    with pytest.raises(UserError, match=r"bn1\.running_mean"):
        fill("resnet18", shapes_of("resnet18"), norm="group")


def test_an_extra_layer_scale_is_refused() -> None:
    """Where timm has a layer scale, other networks have an identity, as in the place of a head."""
    timm = pytest.importorskip("timm")
    body = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    scaled = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, init_values=1.0).state_dict()
    with pytest.raises(UserError, match=r"blocks\.0\.ls1\.gamma"):
        external_weights.fill(body, scaled, "file.pth", "timm/vit")
    plain = {key: value for key, value in scaled.items() if ".ls" not in key}
    external_weights.fill(body, plain, "file.pth", "timm/vit")


def test_wrong_shapes_and_missing_weights_are_named() -> None:
    with pytest.raises(UserError, match=r"'conv1\.weight', \(64, 3, 3, 3\) in the file and \(64, 3, 7, 7\)"):
        fill("resnet18", {**shapes_of("resnet18"), "conv1.weight": torch.zeros(64, 3, 3, 3)})
    state: State = {}
    for half in ("module.encoder_q.", "module.encoder_k."):
        state |= under(half, shapes_of("resnet18"))
    with pytest.raises(UserError) as caught:
        fill("resnet34", state)
    for said in ("'layer1.2.conv1.weight'", "'module.encoder_q', 'module.encoder_k'", "more"):
        assert said in str(caught.value)


def test_one_part_of_several_is_named(tmp_path: Path) -> None:
    part = {"conv1.weight": WANTED["conv1.weight"]}
    with pytest.raises(
        UserError, match=r"of several parts: write all of them into one file\. Give the backbone"
    ):
        load(tmp_path, part, "model-00001-of-00002.bin")
    with pytest.raises(UserError, match=r"begin with 'conv1\.weight'\. Give the backbone"):
        load(tmp_path, part, "epoch-10-of-100.pth")


@pytest.mark.parametrize(
    "holder", [(), ("state_dict",), ("teacher",), ("classy_state_dict", "base_model", "model", "trunk")]
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model._orig_mod.", "module.base_encoder.", "_feature_blocks."]
)
def test_layouts_of_other_projects(tmp_path: Path, prefix: str, holder: tuple[str, ...]) -> None:
    held: object = {**under(prefix, WANTED), "projector.0.weight": torch.ones(1)}
    extras = {
        "epoch": 100,
        "args": argparse.Namespace(lr=0.03, out=pathlib.PosixPath("runs")),
        "best": np.float64(0.7),
        "optimizer": {"state": under("", OTHER)},
    }
    for key in reversed(holder):
        held = {**extras, key: held}
    assert same(load(tmp_path, held), WANTED)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        # An average over training comes first: timm, torch-ema, Lightning.
        ("state_dict_ema.", "state_dict."),
        ("model_ema.module.", "model."),
        ("callbacks.EMA.state_dict.", "state_dict."),
        ("state_dict.", "current_model_state."),
        # A momentum copy is never taken: MoCo, MoCo v3, solo-learn, BYOL, lightly, MMSelfSup, SimMIM-like.
        ("module.encoder_q.", "module.encoder_k."),
        ("base_encoder.", "momentum_encoder."),
        ("backbone.", "momentum_backbone."),
        ("online_net.", "target_net."),
        ("backbone.", "backbone_momentum."),
        ("network.backbone.body.", "network.objective.key_backbone.body."),
        ("teacher.backbone.", "student.backbone."),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_networks_is_taken(
    tmp_path: Path, taken: str, left: str, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pair = [under(taken, WANTED), under(left, OTHER)]
    held = {key: value for state in (pair if first else pair[::-1]) for key, value in state.items()}
    with caplog.at_level(logging.INFO, "raysl.backbone"):
        assert same(load(tmp_path, held), WANTED)
    assert f"using '{taken.rstrip('.')}'" in caplog.text


def test_an_average_beside_a_queue_is_a_momentum_copy(tmp_path: Path) -> None:
    held = {"model": WANTED, "model_ema": OTHER, "contrast": {"memory": torch.zeros(2)}}
    assert same(load(tmp_path, held), WANTED)


def test_a_momentum_copy_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only as a momentum copy \('module\.encoder_k'\)"):
        load(tmp_path, under("module.encoder_k.", WANTED))


@pytest.mark.parametrize("skipped", [True, False])
def test_sequential_names_are_translated(tmp_path: Path, skipped: bool) -> None:
    """As in lightly: nn.Sequential(*network.children()), with or without the children that have no weights."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 2 if skipped else 3}
    state = {}
    for key, value in WANTED.items():
        child, _, rest = key.partition(".")
        state[f"backbone.{numbers[child]}.{rest}"] = value
    extra = {"projection_head.layers.0.weight": torch.zeros(4, 4)}
    assert same(load(tmp_path, {"state_dict": {**state, **extra}}), WANTED)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    net = Net()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.find(net.conv1.weight.detach().numpy().tobytes())] ^= 1
    with pytest.raises(UserError, match="a checksum does not match"):
        external_weights.parse(bytes(data), "a.pth")


def quantized(values: Tensor) -> Tensor:
    return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    "convert",
    [
        Tensor.to_sparse,
        quantized,
        Tensor.char,
        lambda values: values.to(torch.float8_e4m3fn),
        lambda values: values + 0j,
        lambda values: values.to("meta"),
    ],
)
def test_weights_that_are_no_dense_floats_are_refused(convert: Any) -> None:
    state = {key: convert(value) if value.dim() > 1 else value for key, value in Net().state_dict().items()}
    with pytest.raises(UserError, match="quantized, whole or complex numbers, sparse or without"):
        external_weights.fill(Net(), state, "a.pth", "net")


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_nan_and_numbers_too_large_for_a_float_are_refused(tmp_path: Path, value: float) -> None:
    bad = {**WANTED, "bn1.weight": torch.full((4,), value, dtype=torch.float64)}
    with pytest.raises(UserError, match=r"NaN or infinite numbers in 1 weight: 'bn1\.weight'"):
        load(tmp_path, bad)


class Hostile:
    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path("owned"),)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"hello", "is a text file"),
        (b"<!doctype html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b'{"a": 1}', "is a JSON file"),
        (b"\x93NUMPY\x01\x00" + bytes(64), "is a NumPy array"),
        (b"PK\x03\x04" + bytes(64), "damaged or cut"),
        (bytes(range(256)) * 8, "no checkpoint of torch"),
        (pickle.dumps(Hostile()), "."),
    ],
)
def test_other_files_are_refused_in_one_sentence(
    tmp_path: Path, content: bytes, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_weights_into(Net(), "file.pth")
    check_message(str(caught.value))
    assert not (tmp_path / "owned").exists()


def test_weights_of_a_server_that_does_not_answer_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "200")  # Nothing may wait for so long: a test ends before.
    with pytest.raises(UserError, match=r"Cannot connect to host 127\.0\.0\.1:9"):
        starting_weights("http://127.0.0.1:9/weights.pth")


@pytest.mark.parametrize("held", [Net(), [1, 2], torch.zeros(3), {"epoch": 3}, {"model": Net()}])
def test_other_objects_are_refused_in_one_sentence(tmp_path: Path, held: object) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, held)
    check_message(str(caught.value))


def check_message(message: str) -> None:
    assert "weights_only" not in message
    assert "\x1b" not in message
    assert "\n" not in message
    assert "Give a state dict" in message


@pytest.mark.parametrize("name", ["model.safetensors", "MODEL.SAFETENSORS", "model.bin"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(WANTED, tmp_path / name, {"backbone": "small"})
    body = Net()
    load_weights_into(body, str(tmp_path / name))
    assert same(body.state_dict(), WANTED)
    data = (tmp_path / name).read_bytes()
    assert external_weights.safetensors_metadata(data) == {"backbone": "small"}
    (tmp_path / name).write_bytes(data[:-8])
    with pytest.raises(UserError, match=f"{name}' is damaged"):
        load_weights_into(body, str(tmp_path / name))


def test_safetensors_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no safetensors file"):
        external_weights.parse(b"no weights", "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"in the extra 'export': .* pip install"):
        external_weights.parse(b"\x02" + bytes(7) + b"{}", "a.safetensors")


def test_only_safe_readers_are_used() -> None:
    """Every torch.load and np.load of the library reads data alone, and these rooms unpickle nothing."""
    library = Path(external_weights.__file__).parents[1]
    for file in library.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            settings = {word.arg: ast.unparse(word.value) for word in call.keywords}
            match ast.unparse(call.func):
                case "torch.load":
                    assert settings.get("weights_only") == "True", f"{file}:{call.lineno}"
                case "np.load":
                    assert settings.get("allow_pickle", "False") == "False", f"{file}:{call.lineno}"
        if file.parent.name in ("backbone", "extraction", "clustering"):
            assert "import pickle" not in file.read_text(), file


def test_a_tag_of_timm_decides_the_normalization() -> None:
    pytest.importorskip("timm")
    dino = network.timm_backbone("vit_small_patch16_224.dino")
    assert (dino.mean.flatten() / 255).tolist() == pytest.approx((0.485, 0.456, 0.406))
    plain = network.timm_backbone("vit_tiny_patch16_224")
    assert plain.mean.flatten().tolist() == plain.std.flatten().tolist() == [127.5] * 3
    with pytest.raises(UserError, match=r"vit_small_patch16_224\.dina"):
        network.timm_backbone("vit_small_patch16_224.dina")
