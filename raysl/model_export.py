"""Export the backbone of a run for other programs, with a model card (README.md).

torchvision    model.pth, a state dict that loads with strict=True into torchvision's network without its head
timm           pytorch_model.bin and config.json for `timm.create_model("local-dir:FOLDER")`
safetensors    model.safetensors, the same state dict, with method, backbone and step as metadata
onnx           model.onnx, from images of 0 to 255 to features; it includes the normalisation

The network of the sounds, of a run of `audio_visual`, is a second file: sound.onnx, sound.safetensors, or sound.pth.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from raysl import console, extraction
from raysl.backbone.network import TIMM, Backbone, names
from raysl.config import Pretraining
from raysl.config.command import command
from raysl.errors import UserError, package
from raysl.evaluation.results import ENCODERS, KEY, TITLES, check_writable, rows_of
from raysl.extraction.heads import trained_model
from raysl.fields import Bounds, CheckedTop
from raysl.run import Run
from raysl.storage import Folder
from raysl.storage.plain_names import code_block, code_span, markdown
from raysl.storage.records import write_record
from raysl.stream.decode import evaluation_side

CARD = "README.md"
_WEIGHTS = re.compile(r"(model|sound)\.(pth|safetensors|onnx)|pytorch_model\.bin")
_RESNETS = re.compile(r"(wide_)?resne(x)?t\d+(_\w+)?")


@dataclass(frozen=True)
class ExportConfig(CheckedTop):
    """Export the backbone of a run for other programs.

    Args:
        format: format of the weights; "auto" is timm for networks that timm has, and safetensors for others.
        out: folder of the files; default: `export/FORMAT` in the run.
        step: step of the checkpoint to export; None for the newest.
    """

    format: Literal["auto", "torchvision", "timm", "safetensors", "onnx"] = "auto"
    out: str = ""
    step: Annotated[int | None, Bounds(0, 2**63 - 1)] = None


def export(run: Run, config: ExportConfig) -> Folder:
    """Write the weights and the model card, and return their folder.

    Raises:
        UserError: the checkpoint does not exist, the format does not support the backbone, a package is missing, or
            the folder holds other weights.
    """
    where = "" if config.step is None else f"/checkpoints/step-{config.step:09d}"
    pretraining = run.config()
    form = _usual(pretraining) if config.format == "auto" else config.format
    _check(form, pretraining)
    source = extraction.encoder_by_name(f"{run.folder}{where}", pretraining.backbone)
    assert isinstance(source, extraction.Trained)
    out = Folder(config.out) if config.out else run.folder / f"export/{form}"
    check_writable(out, "export")
    with console.working("Writing the weights ..."):
        backbone = source.network().eval()
        files = _FORMATS[form](backbone, pretraining, source.checkpoint.step) | _sound(source, form)
        if others := sorted(name for name in out.list() if _WEIGHTS.fullmatch(name) and name not in files):
            raise UserError(
                f"The folder {str(out)!r} holds other weights, {others[0]!r}, which would be taken for these. Give "
                "another --out, or delete that file."
            )
        for name, data in files.items():
            out.write(name, data)
        settings = {"backbone": asdict(pretraining.backbone), "image_size": pretraining.view.image_size}
        write_record(out, extraction.SETTINGS, settings)  # For raysl.load.
        out.write(CARD, _card(run, backbone, source.checkpoint.step, form).encode())
    return out


def _check(form: str, config: Pretraining) -> None:
    """Raise UserError if a format does not support a backbone or a package is missing, before weights are read."""
    if form == "torchvision" and not _is_torchvision(config.backbone.name):
        raise _no_layout(form, config, "not of torchvision")
    if form == "timm" and not _timm_name(config.backbone.name):
        raise _no_layout(form, config, "neither of timm nor a residual network of torchvision")
    if form in ("torchvision", "timm") and not _is_usual_inside(config):
        why = f"with stem {config.backbone.stem!r}, norm {config.backbone.norm!r}"
        raise _no_layout(form, config, why)
    packages = {"safetensors": ("safetensors.torch",), "onnx": ("onnx", "onnxscript")}
    for module in packages.get(form, ()):
        package(module, "This --format", "export")


def _usual(config: Pretraining) -> str:
    """Return the format for networks that timm has, and safetensors for others."""
    return "timm" if _timm_name(config.backbone.name) and _is_usual_inside(config) else "safetensors"


def _is_usual_inside(config: Pretraining) -> bool:
    """Return True if the backbone has the layers that its name stands for outside of raysl."""
    return config.backbone.stem == "standard" and config.backbone.norm != "group"


def _is_torchvision(name: str) -> bool:
    return name != "small" and name in names()


def _torchvision(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    return {"model.pth": _saved(backbone.body.state_dict())}


def _timm_name(name: str) -> str:
    """Return the name of a backbone in timm, or an empty string. With torchvision it shares residual networks only."""
    return name if _RESNETS.fullmatch(name) else name.removeprefix(TIMM) if name.startswith(TIMM) else ""


def _timm_options(backbone: Backbone, config: Pretraining) -> dict[str, Any]:
    """Return how timm must build the network to take images of the run's size."""
    is_dynamic = getattr(backbone.body, "dynamic_img_size", False)
    options = {"patch_size": config.backbone.patch_size, "dynamic_img_size": is_dynamic}
    return {name: value for name, value in options.items() if value}


def _timm(backbone: Backbone, config: Pretraining, step: int) -> dict[str, bytes]:
    architecture, _, tag = _timm_name(config.backbone.name).partition(".")
    size = config.view.image_size
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
    }
    about: dict[str, Any] = {"architecture": architecture, "num_classes": 0, "num_features": backbone.width}
    about |= {"model_args": _timm_options(backbone, config), "pretrained_cfg": seen}
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


def _sound(source: extraction.Trained, form: str) -> dict[str, bytes]:
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


_FORMATS = {"torchvision": _torchvision, "timm": _timm, "safetensors": _safetensors, "onnx": _onnx}


def _no_layout(form: str, config: Pretraining, why: str) -> UserError:
    return UserError(
        f"--format {form} does not support the backbone of this run: {config.backbone.name!r} is {why}. Use --format "
        "safetensors or onnx."
    )


def _saved(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


_CARD = """# {method}, {backbone}

Weights of the backbone, without a head, after {step} steps of pretraining with raysl.

| | |
|---|---|
| method | {method} |
| backbone | {backbone}, stem {stem}, norm {norm} |
| data | {images:,} images, fingerprint {fingerprint} |
| seed | {seed} |
| images | shorter side resized to {short} pixels (bilinear), then the central {size} x {size} |

## Use

{use}

## Evaluation

{probes}

## Training command

{command}

## Licence

Not chosen. State a licence here before you publish these weights, after checking the terms of the training images.
"""

_BASELINES = (
    "`trained` are these weights, `untrained` is the same backbone before its first step, and `raw pixels` are the\n"
    "images themselves, with the same probe and protocol. For frozen features, probes take BatchNorm's statistics\n"
    "from their train images, unless `--bn-statistics kept` is given; these weights hold those of pretraining."
)
_SAME_IMAGES = (
    "“The same images” were used for train and test: no image is compared with itself, but its near copies are in the\n"
    "set, so scores of probes with labels are too high."
)
_HEARS = (
    "\n\nThe file `sound.*` is the network of the sounds: `raysl.objectives.audio_visual.SoundBackbone`, from the\n"
    "spectrograms (b, 1, bands, windows) of `raysl.pretext._sound.spectrogram` to features."
)
_OPEN = ("from PIL import Image", "", 'image = Image.open("photo.jpg").convert("RGB")')


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _pytorch(imports: Sequence[str], *model: str) -> str:
    return _python(
        *imports,
        *_OPEN,
        *model,
        "crop = [transforms.Resize({short}), transforms.CenterCrop({size}), transforms.ToTensor()]",
        "transform = transforms.Compose([*crop, transforms.Normalize({mean}, {std})])",
        "features = model.eval()(transform(image)[None])",
    )


_TORCHVISION = ("model = models.get_model({name!r})", "model.set_submodule({head!r}, torch.nn.Identity())")
_LOAD_FILE = (
    "from safetensors.torch import load_file",
    'model.load_state_dict(load_file("model.safetensors"))',
)
_USE = {
    "torchvision": _pytorch(
        ("import torch", "from torchvision import models, transforms"),
        *_TORCHVISION,
        'model.load_state_dict(torch.load("model.pth", weights_only=True), strict=True)',
    ),
    "timm": _python(
        "import timm",
        *_OPEN,
        'model = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "features = model(transform(image)[None])",
    ),
    "safetensors": _python(
        "import raysl", "", 'model = raysl.load(".")  # this folder', 'features = model("photo.jpg")'
    ),
    "onnx": _python(
        "import numpy as np",
        "import onnxruntime",
        *_OPEN,
        "wide, tall = (int({short} * side / min(image.size)) for side in image.size)",
        "left, top = round((wide - {size}) / 2), round((tall - {size}) / 2)",
        "image = image.resize((wide, tall), Image.Resampling.BILINEAR)",
        "image = image.crop((left, top, left + {size}, top + {size}))",
        "pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]  # RGB, 0 to 255; any number of images",
        'model = onnxruntime.InferenceSession("model.onnx")',
        'features = model.run(None, {{"images_bchw": pixels}})[0]',
    ),
}


def _without(backbone: Backbone, config: Pretraining) -> str:
    """Return how to use safetensors without raysl, as text to be formatted."""
    about = config.backbone
    if _is_usual_inside(config) and _is_torchvision(about.name):
        imports = ("import torch", _LOAD_FILE[0], "from torchvision import models, transforms")
        return f"Without raysl:\n\n{_pytorch(imports, *_TORCHVISION, _LOAD_FILE[1])}"
    if _is_usual_inside(config) and (name := _timm_name(about.name)):
        options = "".join(f", {key}={value}" for key, value in _timm_options(backbone, config).items())
        imports = ("import timm", _LOAD_FILE[0], "from torchvision import transforms")
        made = f"model = timm.create_model({name!r}, num_classes=0{options})"
        return f"Without raysl:\n\n{_pytorch(imports, made, _LOAD_FILE[1])}"
    return (
        "Neither torchvision nor timm has this network. The format that needs no raysl is ONNX:\n"
        "`raysl export RUN --format onnx`."
    )


def _card(run: Run, backbone: Backbone, step: int, form: str) -> str:
    config, data = run.config(), run.metadata()["data"]
    # The last identity has replaced the head.
    idle = [name for name, module in backbone.body.named_modules() if isinstance(module, nn.Identity)]
    size = config.view.image_size
    mean, std = (
        [round(value / 255, 6) for value in each.flatten().tolist()] for each in (backbone.mean, backbone.std)
    )
    pixels = {"size": size, "short": evaluation_side(size), "mean": mean, "std": std}
    pixels |= {"name": config.backbone.name, "head": "".join(idle[-1:])}
    use = _USE[form] + (f"\n\n{_without(backbone, config)}" if form == "safetensors" else "")
    return _CARD.format(
        method=markdown(config.method),
        backbone=markdown(config.backbone.name),
        stem=config.backbone.stem,
        norm=config.backbone.norm,
        step=step,
        images=data["num_images"],
        fingerprint=code_span(data["fingerprint"]),
        seed=config.seed,
        **{name: pixels[name] for name in ("size", "short")},
        use=use.format(**pixels) + (_HEARS if "audio_visual" in config.parts else ""),
        probes=_probes(run, step),
        command=code_block(command(config)),
    )


def _probes(run: Run, step: int) -> str:
    """Return a table of the primary metrics at a step, with the baselines of the same protocol."""
    rows = [row for row in rows_of(run) if row["primary"]]
    rows = [row for row in rows if row["encoder"] != "trained" or row["step"] == step]
    there = [row for row in rows if row["encoder"] == "trained"]
    if not there:
        return "This checkpoint has no probe results; `raysl probe` adds them."
    values = {_measured(row): row["value"] for row in rows}
    encoders = [TITLES.get(one, one) for one in ENCODERS]
    columns = ("probe", "layer", "measure", *encoders, "protocol", "train", "test")
    lines = [_BASELINES, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in there:
        found = [values.get(_measured({**row, "encoder": encoder})) for encoder in ENCODERS]
        shown = " | ".join("" if value is None else f"{value:.4f}" for value in found)
        test = "the same images" if _has_same_images(row) else code_span(row["test"][:8])
        lines.append(
            f"| {markdown(row['probe'])} | {markdown(row['layer'])} | {markdown(row['name'])} | {shown} | "
            f"{code_span(row['protocol'])} | {code_span(row['train'][:8])} | {test} |"
        )
    if any(map(_has_same_images, there)):
        lines += ["", _SAME_IMAGES]
    return "\n".join(lines)


def _has_same_images(row: Mapping[str, Any]) -> bool:
    return bool(row["train"] and row["train"] == row["test"])


def _measured(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of a row without its step, so that baselines match."""
    return tuple(row[key] for key in KEY if key != "step")
