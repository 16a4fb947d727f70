"""Recognize weights that raysl or timm exported, by what is stated beside them or in them."""

from __future__ import annotations

import json
import re
from typing import Any

from raysl import plugins
from raysl.backbone import external_weights
from raysl.backbone.network import TIMM, BackboneConfig, names
from raysl.errors import UserError, explained
from raysl.storage import Folder
from raysl.storage.records import verified

# Weights files of an export, and the settings that raysl writes beside them.
EXPORTED = ("model.safetensors", "model.pth", "pytorch_model.bin")
SETTINGS = "raysl.json"
_WEB = ("http://", "https://")


def weights_in(name: str) -> str:
    """Return the weights file of an exported folder; the name itself where it is none. The web has no folders."""
    if name.startswith(_WEB):
        return name
    inside = set(Folder(name).list())
    if found := next((file for file in EXPORTED if file in inside), ""):
        return f"{name}/{found}"
    if "model.onnx" in inside or name.endswith(".onnx"):
        raise UserError(
            f"{name!r} is an ONNX model. Run it with onnxruntime, or export the run as safetensors."
        )
    return name


def find(name: str, of_timm: bool = True) -> tuple[str, BackboneConfig | None, int]:
    """Return the weights file of a folder or file, and the backbone and image size that are stated with it.

    A `config.json` of timm counts only if `of_timm`, what raysl wrote always.
    """
    name = weights_in(name)
    if name.startswith(_WEB):
        return name, None, 0
    place, _, _ = str(Folder(name)).rpartition("/")
    return name, *(_beside(Folder(place or "/"), of_timm) or _from_safetensors(name) or (None, 0))


def _beside(folder: Folder, of_timm: bool) -> tuple[BackboneConfig, int] | None:
    """Return what raysl or timm wrote beside the weights."""
    what = f"The settings beside the weights in {str(folder)!r} cannot be read"
    with explained(what, "Give the backbone.", ValueError, KeyError, TypeError, AttributeError):
        if folder.exists(SETTINGS):
            stated = verified(folder.read_json(SETTINGS))
            backbone = dict(stated["backbone"])
            if module := str(backbone["name"]).rpartition(":")[0]:  # code, which only the user may name
                places = plugins.check_trusted([module], str(folder))
                backbone["name"] = plugins.with_current_path(backbone["name"], places)
            return BackboneConfig(**backbone), int(stated["image_size"])
        if of_timm and folder.exists("config.json"):
            stated = json.loads(folder.read("config.json"))
            if "architecture" not in stated:  # of another library
                return None
            cfg = stated.get("pretrained_cfg", {})
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            size = int(cfg.get("input_size", (0,))[-1])
            name = f"{stated['architecture']}{tag}"
            if not re.fullmatch(r"[\w.]+", name):  # With "/" and ":" it would name code.
                raise ValueError(f"{name!r} is no network of timm")
            return BackboneConfig(f"{TIMM}{name}"), size
    return None


def _from_safetensors(name: str) -> tuple[BackboneConfig, int] | None:
    if not name.lower().endswith(".safetensors"):
        return None
    stated = external_weights.safetensors_metadata(external_weights.read_file(name))
    if stated.get("backbone") not in names():
        return None
    parts: dict[str, Any] = {key: stated[key] for key in ("stem", "norm") if key in stated}
    return BackboneConfig(stated["backbone"], **parts), int(stated.get("image_size", 0))
