"""Other people's networks: the weights in their files under the names that a backbone knows, and the backbones of timm."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysl.backbone.network import Backbone
from raysl.errors import UserError, unknown

TIMM = "timm/"
# What holds the weights in files of other projects, the first of them that is there; the last ones are VISSL's.
_NESTED = (
    "state_dict",
    "model",
    "network",
    "teacher",
    "student",
    "classy_state_dict",
    "base_model",
    "backbone",
)
# Where a classifier stands that the backbone does without.
_HEADS = {"classifier", "fc", "head", "heads", "head_dist", "last_linear"}
# Not in every file, and of no use to evaluation.
_COUNT = "num_batches_tracked"
_SHOWN = 4


def weights(data: bytes, file: str) -> dict[str, Tensor]:
    """What a file holds, by name.

    Args:
        data: of the file; a state dict by `torch.save`, or a dict that holds one, or safetensors.
        file: its name, of which the ending tells the two apart.

    Raises:
        UserError: it holds no weights that can be loaded safely, or a package is missing.
    """
    try:
        if file.endswith(".safetensors"):
            return _safetensors(data, file)
        # The checkpoints of DINO and of MAE hold the command line too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        while nested := next((key for key in _NESTED if isinstance(state.get(key), Mapping)), None):
            state = state[nested]
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except UserError:
        raise
    except Exception as error:  # both raise many kinds
        raise UserError(
            f"The file {file!r} holds no weights that torch can load safely: {error}. Give a state dict that was "
            "written by torch.save, or a file of safetensors, whose name ends so."
        ) from error


def _safetensors(data: bytes, file: str) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            f"The file {file!r} needs the package safetensors, which is not installed. Install raysl[export], or give "
            "a file that was written by torch.save."
        ) from error
    state: dict[str, Tensor] = safetensors.torch.load(data)
    return state


def fill(body: nn.Module, state: Mapping[str, Tensor], file: str, name: str) -> None:
    """Loads weights into the body of a backbone. What stands before all their names, such as `module.encoder_q.` of MoCo,
    is found by itself, and is the first where there are several. A classifier, and all that lies outside of the
    network, is left out.

    Args:
        body: the network, whose head does nothing.
        state: the weights.
        file: where they are from.
        name: of the backbone.

    Raises:
        UserError: some are missing, are too many, or have another shape.
    """
    there: dict[str, Tensor] = body.state_dict()
    wanted = [key for key in there if not key.endswith(_COUNT)]
    prefix = _prefix(wanted, state)
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    mend = "Give the backbone that it was made for with --backbone.name, --backbone.stem and --backbone.norm."
    if missing := [key for key in wanted if key not in own]:
        raise UserError(
            f"The file {file!r} lacks {len(missing)} weights of the backbone {name!r}: {_some(missing)}. The names in it "
            f"begin with {_some(_beginnings(state))}. {mend}"
        )
    if left := _left_over(body, own):
        raise UserError(
            f"The file {file!r} holds {len(left)} weights more than the backbone {name!r} has: {_some(left)}. It was made "
            f"for another network. {mend}"
        )
    if wrong := [key for key in wanted if own[key].shape != there[key].shape]:
        first = wrong[0]
        raise UserError(
            f"The weights in {file!r} do not fit the backbone {name!r}: {len(wrong)} have another shape, the first being "
            f"{first!r}, {tuple(own[first].shape)} in the file and {tuple(there[first].shape)} in the backbone. {mend}"
        )
    body.load_state_dict({key: own[key] for key in wanted}, strict=False)


def _prefix(wanted: list[str], state: Mapping[str, Tensor]) -> str:
    """What stands before the names that are wanted, where the most of them are found."""
    first = f".{wanted[0]}"
    before = [key.removesuffix(wanted[0]) for key in state if f".{key}".endswith(first)]
    return max(before, key=lambda prefix: sum(prefix + key in state for key in wanted), default="")


def _left_over(body: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names inside of parts that the network has, or in one part more of a row such as layer1 to layer4, and which it
    has not; but for its head. The file of a deeper network has all names of a shallower one, and these."""
    # Among the buffers are some that are not saved any more and may be in older files.
    there = {*body.state_dict(), *(key for key, _ in body.named_buffers())}
    rows = {_row(key) for key, _ in body.named_children()} - _HEADS
    return [
        key
        for key in state
        if key not in there and not key.endswith(_COUNT) and "." in key and _row(key) in rows
    ]


def _row(key: str) -> str:
    """`layer` of "layer4.0.conv1.weight"."""
    return re.sub(r"\d+$", "", key.partition(".")[0])


def _beginnings(keys: Iterable[str]) -> list[str]:
    """The first word of names, and as many more as it takes to tell some from others."""
    words = [key.split(".") for key in keys]
    for depth in range(1, 4):
        found = dict.fromkeys(".".join(key[:depth]) for key in words)
        if len(found) > 1:
            break
    return list(found)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (", ".join(map(repr, keys[:_SHOWN])) or "nothing") + more


def timm_backbone(name: str) -> Backbone:
    """A backbone of timm, which sees images normalised as its own weights were learned.

    Args:
        name: of the network, or NAME.TAG: the weights with another tag may have been learned from images that were
            normalised otherwise, as those of "vit_small_patch16_224" and "vit_small_patch16_224.dino".

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"The backbone {TIMM + name!r} is one of the package timm, which is not installed: install timm."
        ) from error
    known = timm.list_models(pretrained="." in name)  # with tags, or without
    if name not in known:
        raise unknown("backbone of timm", name, known)
    body: Any = timm.create_model(name, pretrained=False, num_classes=0)
    # Of those whose head begins with layers of its own, `num_features` is what comes into these.
    made = Backbone(body, int(getattr(body, "head_hidden_size", body.num_features)))
    for buffer, constants in ((made.mean, "mean"), (made.std, "std")):
        buffer.copy_(torch.tensor(body.pretrained_cfg[constants]).view(1, 3, 1, 1) * 255)
    return made
