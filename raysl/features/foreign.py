"""Other people's networks: the weights in their files under the names that a trunk knows, and the trunks of timm."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysl.errors import UserError, unknown
from raysl.network.trunk import Trunk

TIMM = "timm/"
# What holds the weights in files of other projects.
_NESTED = ("state_dict", "model", "network", "teacher")


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
            return _safetensors(data)
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


def _safetensors(data: bytes) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("A file of safetensors needs that package. Install raysl[export].") from error
    state: dict[str, Tensor] = safetensors.torch.load(data)
    return state


def fill(body: nn.Module, state: Mapping[str, Tensor], file: str, name: str) -> None:
    """Loads weights into the body of a trunk. What stands before all their names, such as `module.encoder_q.` of MoCo,
    is found by itself, and is the first where there are several. A classifier, and all that lies outside of the
    network, is left out.

    Args:
        body: the network, whose head does nothing.
        state: the weights.
        file: where they are from.
        name: of the trunk.

    Raises:
        UserError: some are missing, are too many, or have another shape.
    """
    wanted = [key for key in body.state_dict() if not key.endswith("num_batches_tracked")]
    before = dict.fromkeys(
        key.removesuffix(wanted[0]) for key in state if f".{key}".endswith(f".{wanted[0]}")
    )
    lacking = {prefix: [key for key in wanted if prefix + key not in state] for prefix in before} or {
        "": wanted
    }
    prefix = min(lacking, key=lambda one: len(lacking[one]))
    mend = "Give the trunk that it was made for with --trunk.name and --trunk.stem."
    if missing := lacking[prefix]:
        seen = ", ".join(repr(key) for key in list(state)[:3])
        raise UserError(
            f"The file {file!r} lacks {len(missing)} weights of the trunk {name!r}, the first being {missing[0]!r}. "
            f"What it has begins with {seen}. {mend}"
        )
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if left := _left_over(body, own):
        raise UserError(
            f"The file {file!r} holds {len(left)} weights more than the trunk {name!r} has, the first being "
            f"{left[0]!r}: it was made for another network. {mend}"
        )
    try:
        body.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise UserError(f"The weights in {file!r} do not fit the trunk {name!r}: {error}. {mend}") from error


def _left_over(body: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Weights and biases inside of parts that the network has, and of which it has no such; but for its head."""
    there = set(body.state_dict())
    parts = {key.partition(".")[0] for key in there}
    heads = tuple(f"{key}." for key, module in body.named_modules() if isinstance(module, nn.Identity))
    return [
        key
        for key in state
        if key not in there
        and key.partition(".")[0] in parts
        and key.endswith((".weight", ".bias"))
        and not key.startswith(heads)
    ]


def timm_trunk(name: str) -> Trunk:
    """A trunk of timm, which sees images normalised as its own weights were learned.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"The trunk {TIMM + name!r} is one of the package timm, which is not installed: install timm."
        ) from error
    if name not in timm.list_models():
        raise unknown("trunk of timm", name, timm.list_models())
    body: Any = timm.create_model(name, pretrained=False, num_classes=0)
    # Of those whose head begins with layers of its own, `num_features` is what comes into these.
    made = Trunk(body, int(getattr(body, "head_hidden_size", body.num_features)))
    for buffer, constants in ((made.mean, "mean"), (made.std, "std")):
        buffer.copy_(torch.tensor(body.pretrained_cfg[constants]).view(1, 3, 1, 1) * 255)
    return made
