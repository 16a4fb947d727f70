"""The model card (README.md) of exported weights: what they are, how to load them, and the scores of probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from raysl.backbone import norm
from raysl.backbone.network import Backbone
from raysl.config import Pretraining
from raysl.config.command import command
from raysl.dataset import DataSet
from raysl.errors import counted
from raysl.evaluation.results import ENCODERS, KEY, TITLES, rows_of
from raysl.model_export.formats import is_torchvision, is_usual_inside, timm_name, timm_options
from raysl.run import Run
from raysl.storage.escaping import code_block, code_span, markdown
from raysl.stream.decode import evaluation_side
from raysl.stream.plan import num_steps

_CARD = """# {method}, {backbone}

Weights of the backbone, without a head, after {steps} of pretraining with raysl.

| | |
|---|---|
| method | {method} |
| backbone | {backbone}, stem {stem}, norm {norm} |
| data | {images:,} images, fingerprint {fingerprint} |
| seed | {seed} |
| images | shorter side resized to {short} pixels (bilinear), then the central {size} x {size} |
| images of {size} x {size} | stay as they are |
| unusual images | raysl lays transparent images on white and scales 16 bits to 8, which `convert("RGB")` does not |
| BatchNorm | {statistics} |

## Use

{use}

## Evaluation

{probes}

## Training command

{command}

## License

Not chosen. State a license here before you publish these weights, after checking the terms of the training images.
"""

_BASELINES = (
    "`trained` are these weights, `untrained` is the same backbone before its first step, and `raw pixels` are the\n"
    "images themselves, with the same probe and protocol. For frozen features, probes take BatchNorm's statistics\n"
    "from their train images, unless `--bn-statistics kept` is given."
)
_KEPT = "statistics of pretraining; `raysl export RUN --bn-images IMAGES` takes those of whole images, as probes do"
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
        "crop = [transforms.Resize({short}), transforms.CenterCrop({size})] if image.size != ({size}, {size}) else []",
        "pixels = [transforms.ToTensor(), transforms.Normalize({mean}, {std})]",
        "transform = transforms.Compose([*crop, *pixels])",
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
        "if image.size == ({size}, {size}):  # stays as it is",
        "    transform.transforms = transform.transforms[2:]  # without Resize and CenterCrop",
        "features = model(transform(image)[None])",
    ),
    "safetensors": _python(
        "import raysl", "", 'model = raysl.load(".")  # this folder', 'features = model("photo.jpg")'
    ),
    "onnx": _python(
        "import numpy as np",
        "import onnxruntime",
        *_OPEN,
        "if image.size != ({size}, {size}):",
        "    wide, tall = (int({short} * side / min(image.size)) for side in image.size)",
        "    left, top = round((wide - {size}) / 2), round((tall - {size}) / 2)",
        "    image = image.resize((wide, tall), Image.Resampling.BILINEAR)",
        "    image = image.crop((left, top, left + {size}, top + {size}))",
        "pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]  # RGB, 0 to 255; any number of images",
        'model = onnxruntime.InferenceSession("model.onnx")',
        'features = model.run(None, {{"images_bchw": pixels}})[0]',
    ),
}


def _without(backbone: Backbone, config: Pretraining) -> str:
    """Return how to use safetensors without raysl, as text to be formatted."""
    about = config.backbone
    if is_usual_inside(config) and is_torchvision(about.name):
        imports = ("import torch", _LOAD_FILE[0], "from torchvision import models, transforms")
        return f"Without raysl:\n\n{_pytorch(imports, *_TORCHVISION, _LOAD_FILE[1])}"
    if is_usual_inside(config) and (name := timm_name(about.name)):
        options = "".join(f", {key}={value}" for key, value in timm_options(backbone, config).items())
        imports = ("import timm", _LOAD_FILE[0], "from torchvision import transforms")
        made = f"model = timm.create_model({name!r}, num_classes=0{options})"
        return f"Without raysl:\n\n{_pytorch(imports, made, _LOAD_FILE[1])}"
    return (
        "Neither torchvision nor timm has this network. The format that needs no raysl is ONNX:\n"
        "`raysl export RUN --format onnx`."
    )


def model_card(run: Run, backbone: Backbone, step: int, form: str, bn_images: DataSet | None = None) -> str:
    """Return the card of the weights of a step in a format.

    `bn_images` is the data set that `raysl.extraction.Reestimated` was given; None for the statistics of pretraining.
    """
    config, data = run.config(), run.metadata()["data"]
    # The last identity has replaced the head.
    idle = [name for name, module in backbone.body.named_modules() if isinstance(module, nn.Identity)]
    size = config.view.image_size
    total = num_steps(data["num_images"], config.batch_size, config.epochs)
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
        steps=counted(step, "step") if step >= total else f"{step:,} of {total:,} steps",
        images=data["num_images"],
        fingerprint=code_span(data["fingerprint"]),
        seed=config.seed,
        statistics=_statistics(backbone, bn_images),
        **{name: pixels[name] for name in ("size", "short")},
        use=use.format(**pixels) + (_HEARS if "audio_visual" in config.parts else ""),
        probes=_probes(run, step),
        command=code_block(command(config)),
    )


def _statistics(backbone: Backbone, images: DataSet | None) -> str:
    if not norm.with_statistics(backbone):
        return "none in this network"
    if images is None or images.num_images < 2:
        return _KEPT
    return f"statistics of images of the data set {code_span(images.manifest.fingerprint)}"


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
