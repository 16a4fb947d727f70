"""The files of a backbone in each format that other programs read."""

from __future__ import annotations

import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysl import extraction
from raysl.backbone.network import TIMM, Backbone, names
from raysl.config import Pretraining
from raysl.errors import UserError, package
from raysl.extraction.heads import trained_model
from raysl.stream.decode import evaluation_side

_RESNETS = re.compile(r"(wide_)?resne(x)?t\d+(_\w+)?")


def check(form: str, config: Pretraining) -> None:
    """Raise UserError if a format does not support a backbone or a package is missing, before weights are read."""
    if form == "torchvision" and not is_torchvision(config.backbone.name):
        raise _no_layout(form, config, "not of torchvision")
    if form == "timm" and not timm_name(config.backbone.name):
        raise _no_layout(form, config, "neither of timm nor a residual network of torchvision")
    if form in ("torchvision", "timm") and not is_usual_inside(config):
        why = f"with stem {config.backbone.stem!r}, norm {config.backbone.norm!r}"
        raise _no_layout(form, config, why)
    packages = {"safetensors": ("safetensors.torch",), "onnx": ("onnx", "onnxscript")}
    for module in packages.get(form, ()):
        package(module, "This --format", "export")


def usual(config: Pretraining) -> str:
    """Return the format for networks that timm has, and safetensors for others."""
    return "timm" if timm_name(config.backbone.name) and is_usual_inside(config) else "safetensors"


def is_usual_inside(config: Pretraining) -> bool:
    """Return True if the backbone has the layers that its name stands for outside of raysl."""
    return config.backbone.stem == "standard" and config.backbone.norm != "group"


def is_torchvision(name: str) -> bool:
    return name != "small" and name in names()


def _torchvision(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    return {"model.pth": _saved(backbone.body.state_dict())}


def timm_name(name: str) -> str:
    """Return the name of a backbone in timm, or an empty string. With torchvision it shares residual networks only."""
    return name if _RESNETS.fullmatch(name) else name.removeprefix(TIMM) if name.startswith(TIMM) else ""


def timm_options(backbone: Backbone, config: Pretraining) -> dict[str, Any]:
    """Return how timm must build the network to take images of the run's size."""
    is_dynamic = getattr(backbone.body, "dynamic_img_size", False)
    options = {"patch_size": config.backbone.patch_size, "dynamic_img_size": is_dynamic}
    return {name: value for name, value in options.items() if value}


def _timm(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    architecture, _, tag = timm_name(config.backbone.name).partition(".")
    size = config.view.image_size
    of_timm = getattr(backbone.body, "pretrained_cfg", {})  # residual networks of torchvision have none
    seen = {
        "mean": (backbone.mean.flatten() / 255).tolist(),
        "std": (backbone.std.flatten() / 255).tolist(),
        "input_size": [3, size, size],
        "num_classes": 0,
        "interpolation": "bilinear",
        "crop_mode": "center",
        # timm resizes the shorter side to floor(size / crop_pct).
        "crop_pct": size / (evaluation_side(size) + 0.5),
        "tag": tag,
        # For a new head (`num_classes=10`), timm leaves out the weights of the layer of this name.
        "classifier": of_timm.get("classifier", "fc"),
    }
    about: dict[str, Any] = {"architecture": architecture, "num_classes": 0, "num_features": backbone.width}
    about |= {"model_args": timm_options(backbone, config), "pretrained_cfg": seen}
    about_json = json.dumps(about, indent=1).encode()
    return {"pytorch_model.bin": _saved(backbone.body.state_dict()), "config.json": about_json}


def _safetensors(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    safetensors = package("safetensors.torch", "This --format", "export")
    state = {name: value.contiguous() for name, value in backbone.body.state_dict().items()}
    metadata = {name: str(getattr(config.backbone, name)) for name in ("stem", "norm")}
    metadata |= {"method": config.method, "backbone": config.backbone.name, "format": "pt"}
    metadata |= {"image_size": str(config.view.image_size), "step": str(step)}
    return {"model.safetensors": _with_sorted_metadata(safetensors.save(state, metadata))}


def _with_sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order is random, so that equal runs give equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # So that the numbers begin at a multiple of 8.
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _onnx(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    backbone.graph = None  # Norm "joint" needs it for training only.
    images_bchw = torch.zeros(2, 3, *[config.view.image_size] * 2)
    return {"model.onnx": _onnx_file(backbone, images_bchw, "images_bchw")}


def _onnx_file(network: nn.Module, example: Tensor, name: str) -> bytes:
    # The exporter writes a local file, but the run may be in an object store.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (example,),
            file,
            input_names=[name],
            output_names=["features_bd"],
            dynamic_shapes=({0: torch.export.Dim("b")},),
            external_data=False,
            verbose=False,
        )
        return file.read_bytes()


def sound(source: extraction.Trained, form: str) -> dict[str, bytes]:
    """Return the file of the network of the sounds; nothing for methods without sound."""
    if "audio_visual" not in source.run.config().parts:
        return {}
    objective: Any = trained_model(source).objective
    network: nn.Module = objective.sound_backbone
    if form == "onnx":
        sounds_bchw = torch.zeros(2, *objective.views["sound"].shape)
        return {"sound.onnx": _onnx_file(network, sounds_bchw, "sounds_bchw")}
    state = network.state_dict()
    if form == "safetensors":
        return {"sound.safetensors": package("safetensors.torch", "This --format", "export").save(state)}
    return {"sound.pth": _saved(state)}


FORMATS = {"torchvision": _torchvision, "timm": _timm, "safetensors": _safetensors, "onnx": _onnx}


def _no_layout(form: str, config: Pretraining, why: str) -> UserError:
    others = "timm, safetensors or onnx" if usual(config) == "timm" != form else "safetensors or onnx"
    return UserError(
        f"--format {form} does not support the backbone of this run: {config.backbone.name!r} is {why}. Use --format "
        f"{others}."
    )


def _saved(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
