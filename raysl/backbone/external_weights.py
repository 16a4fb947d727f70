"""Load weights files of other projects into a backbone, and build the backbones of timm.

Only safe readers are used, `torch.load(weights_only=True)` and safetensors: no code of a file ever runs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import pathlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysl.backbone.network import Backbone
from raysl.errors import UserError, counted, package
from raysl.storage import Folder, StorageError
from raysl.storage.causes import web_answer

_log = logging.getLogger("raysl.backbone")

# Classes that checkpoints hold beside their weights. Creating them runs no code of the file.
_SAFE_CLASSES: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
]
# Wrappers of torch.compile, FSDP and activation checkpointing that leave a trace in names.
_WRAPPERS = re.compile(r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
# An average of the weights over training, which is what its authors evaluate.
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)|(?<![A-Z])(EMA|SWA|Ema)(?![A-Z])")
# The momentum copy of a network in MoCo, BYOL, ALBEF and others, which is not what its authors evaluate.
_MOMENTUM = re.compile(r"(^|[._])(momentum|mom|target|key|\w+_k|\w*encoder_m)([._]|$)")
_SECOND_CHOICE = re.compile(r"(^|[._])(student|raw|current_model_state)([._]|$)")
# Names of classifiers, which a backbone does not have.
_HEADS = {"classifier", "fc", "head", "heads", "head_dist", "last_linear"}
# Absent from some files, and unused in evaluation.
_COUNTER = "num_batches_tracked"
_MAX_DEPTH = 6
_SHOWN = 4
_WRITE_IT = (
    "Give a state dict that was written by torch.save(model.state_dict(), FILE), or a safetensors file."
)
_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<": "a web page or an XML file, not a download of the weights",
    b"{": "a JSON file",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"PAR1": "a Parquet file",
}


def load_weights_into(backbone: nn.Module, file: str, name: str = "") -> str:
    """Load the weights in a file into a backbone.

    Args:
        backbone: a `Backbone`, or a network without its classifier.
        file: a state dict by `torch.save`, a checkpoint that holds one, or safetensors; a path or a URI.
        name: name of the backbone, for messages.

    Returns:
        A hash of the file's content, for run metadata.

    Raises:
        UserError: the file cannot be read, holds no weights, those of another network, NaN or infinities.
    """
    data = read_file(file)
    body = backbone.body if isinstance(backbone, Backbone) else backbone
    fill(body, parse(data, file), file, name or type(body).__name__)
    return digest(data)


def digest(data: bytes) -> str:
    """Return the hash by which a weights file is known."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def read_file(file: str) -> bytes:
    """Return the content of a weights file. Raises UserError if it cannot be read."""
    place, _, name = str(Folder(file)).rpartition("/")
    try:
        return Folder(place or "/").read(name)
    except (OSError, StorageError) as error:
        why = web_answer(file) if file.startswith(("http://", "https://")) else error
        raise UserError(
            f"The weights file {file!r} cannot be read: {why}. All machines of the cluster must see it: put it "
            "into a folder that they share, or give a URI such as s3://BUCKET/FILE."
        ) from error


def parse(data: bytes, file: str) -> dict[str, Tensor]:
    """Return every tensor of a weights file by its dotted name, such as "state_dict.layer1.0.conv1.weight".

    Args:
        file: name of the file, for messages.

    Raises:
        UserError: the file holds no weights that can be loaded safely, or a package is missing.
    """
    # The content tells the format, because files are renamed: a length, and then JSON.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        held: Any = _safetensors(data, file)
    elif not data:
        raise UserError(f"The weights file {file!r} is empty. {_WRITE_IT}")
    elif file.lower().endswith(".safetensors"):
        raise UserError(
            f"The weights file {file!r} is no safetensors file, or is damaged. Download it again."
        )
    else:
        held = _torch(data, file)
    if not isinstance(held, Mapping):
        raise UserError(
            f"The weights file {file!r} holds a {type(held).__name__} and no state dict. {_WRITE_IT}"
        )
    state = dict(_tensors(held))
    if not state:
        raise UserError(f"The weights file {file!r} holds no weights. {_WRITE_IT}")
    return state


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for any other file."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {str(key): str(value) for key, value in header["__metadata__"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _safetensors(data: bytes, file: str) -> dict[str, Tensor]:
    more = " A file that was written by torch.save does not need it."
    safetensors = package("safetensors.torch", f"The file {file!r}", "export", more)
    try:
        state: dict[str, Tensor] = safetensors.load(data)
    except Exception as error:  # The package has its own exception class for damage.
        raise UserError(
            f"The safetensors file {file!r} is damaged: {_plain(error)}. Download it again."
        ) from error
    return state


def _torch(data: bytes, file: str) -> object:
    if _has_wrong_checksum(data):
        raise UserError(
            f"The weights file {file!r} is damaged: a checksum does not match. Download or copy it again."
        )
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About pickle protocols, which a user cannot change.
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes, with advice to switch its safety off.
        raise UserError(f"The weights file {file!r} {_kind(data, str(error))}") from error


def _has_wrong_checksum(data: bytes) -> bool:
    """Return True for a file of torch of which a part does not match its checksum, which torch does not compare."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, zlib.error):
        return False  # An older format, or damage of which torch says more.


def _kind(data: bytes, error: str) -> str:
    """Return what a file is that torch cannot load safely, and what to do, as the end of a sentence."""
    if found := re.search(
        r"GLOBAL ([\w.]+)|\b([\w.]+) to unpickle|Unsupported (?:class|global) ([\w.]+)", error
    ):
        name = next(part for part in found.groups() if part)
        return (
            f"holds a Python object ({name.rstrip('.')}) beside or in place of plain weights, and loading it could "
            f"run code. Where you trust it, load it and save its weights alone. {_WRITE_IT}"
        )
    if "TorchScript" in error:
        return f"is a TorchScript program. {_WRITE_IT}"
    if data[:2] == b"PK":
        return f"is a damaged or cut download, or a zip archive of something else. Download it again. {_WRITE_IT}"
    start = data[:200].lstrip()
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), "")
    if not kind:
        text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:200])
        kind = "a text file" if text else "no checkpoint of torch, or a damaged one"
    return f"holds no weights: it is {kind}. {_WRITE_IT}"


def _plain(error: Exception) -> str:
    """Return the first line of an error, without escape codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _tensors(held: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts by dotted name, without those of optimizers."""
    for key, value in held.items():
        if not isinstance(key, str) or "optimizer" in key:
            continue
        name = prefix + _WRAPPERS.sub("", key)
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            continue
        elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _tensors(value, f"{name}.", depth + 1)


def fill(body: nn.Module, state: Mapping[str, Tensor], file: str, name: str) -> None:
    """Load weights into a network without its classifier.

    A common prefix of the names, such as `module.encoder_q.`, is found automatically. Of several networks in one
    file, the average over training (EMA) comes first and a momentum copy is never used; the choice is logged.

    Args:
        state: weights by name; see `parse`.
        file, name: the file and the backbone, for messages.

    Raises:
        UserError: weights are missing, left over, not finite, or of another shape.
    """
    expected: dict[str, Tensor] = body.state_dict()
    wanted = [key for key in expected if not key.endswith(_COUNTER)]
    own = _select(body, wanted, state, file)
    advice = "Give the backbone that the file was made for with --backbone.name, --backbone.stem and --backbone.norm."
    if missing := [key for key in wanted if key not in own]:
        if re.search(r"-\d{5}-of-\d{5}\.(safetensors|bin)(\?|$)", file):
            advice = f"It is one of several parts: write all of them into one file. {advice}"
        raise UserError(
            f"The weights file {file!r} lacks {counted(len(missing), 'weight')} of the backbone {name!r}: "
            f"{_some(missing)}. The names in it begin with {_some(_beginnings(state))}. {advice}"
        )
    if extra := _left_over(body, own):
        raise UserError(
            f"The weights file {file!r} has {len(extra)} weights more than the backbone {name!r}: {_some(extra)}. It "
            f"was made for another network. {advice}"
        )
    if wrong := [key for key in wanted if own[key].shape != expected[key].shape]:
        first, count = wrong[0], counted(len(wrong), "weight")
        raise UserError(
            f"The weights in {file!r} do not fit the backbone {name!r}: another shape in {count}, the first being "
            f"{first!r}, {tuple(own[first].shape)} in the file and {tuple(expected[first].shape)} in the backbone. "
            f"{advice}"
        )
    if odd := [key for key in wanted if _is_odd(own[key], expected[key])]:
        raise UserError(
            f"The weights file {file!r} holds {len(odd)} weights that are quantized, whole or complex numbers, sparse "
            f"or without values: {_some(odd)}. Give the weights as dense floats."
        )
    # A double may be finite and too large for a float.
    if bad := [key for key in wanted if not torch.isfinite(own[key].to(expected[key].dtype)).all()]:
        raise UserError(
            f"The weights file {file!r} holds NaN or infinite numbers in {counted(len(bad), 'weight')}: "
            f"{_some(bad)}. The training that wrote it diverged. Give an earlier checkpoint."
        )
    body.load_state_dict({key: own[key] for key in wanted}, strict=False)


def _is_odd(own: Tensor, expected: Tensor) -> bool:
    """Return True for weights that cannot be copied, such as codes of 8 bits, whose scale is stored elsewhere."""
    is_other = expected.is_floating_point() and not (own.is_floating_point() and own.itemsize > 1)
    return own.is_meta or own.layout != torch.strided or own.is_quantized or is_other


def _select(body: nn.Module, wanted: list[str], state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Return the weights of the best network in a file by the names of `body`, complete or not."""
    found = _networks(wanted, state)
    complete = [prefix for prefix, own in found.items() if all(key in own for key in wanted)]
    if not complete:
        # `nn.Sequential(*network.children())`, as in lightly, numbers the children.
        numbered = {prefix: _named(body, own) for prefix, own in _numbered(state).items()}
        complete = [prefix for prefix, own in numbered.items() if all(key in own for key in wanted)]
        found = {**found, **{prefix: numbered[prefix] for prefix in complete}}
    if not complete:
        best = max(found, key=lambda prefix: sum(key in found[prefix] for key in wanted), default="")
        return found.get(best, {})
    usable = [prefix for prefix in complete if not _is_momentum(prefix, state)]
    if not usable:
        raise UserError(
            f"The weights file {file!r} holds the backbone only as a momentum copy ({complete[0].rstrip('.')!r}), "
            "which is not the trained network. Give a file with the network itself."
        )
    chosen = min(usable, key=_preference)
    if len(complete) > 1:
        others = [prefix.rstrip(".") or "(no prefix)" for prefix in complete if prefix != chosen]
        _log.info(
            "%s holds %d networks; using %r, not %s.", file, len(complete), chosen.rstrip("."), _some(others)
        )
    return found[chosen]


def _networks(wanted: list[str], state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights under every prefix at which the first wanted name is found, in the order of the file."""
    first = wanted[0]
    prefixes = dict.fromkeys(key.removesuffix(first) for key in state if f".{key}".endswith(f".{first}"))
    return {prefix: _under(prefix, state) for prefix in prefixes}


def _numbered(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights under every prefix that is followed by a number, in the order of the file."""
    prefixes = dict.fromkeys(found[1] for key in state if (found := re.match(r"((?:.*?\.)??)\d+\.", key)))
    return {prefix: _under(prefix, state) for prefix in prefixes}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _named(body: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under numbers by the names of the children of `body` that have weights, in their order."""
    numbers = sorted({int(key.partition(".")[0]) for key in own if key.partition(".")[0].isdecimal()})
    children = [name for name, child in body.named_children() if child.state_dict()]
    names = {str(number): name for number, name in zip(numbers, children, strict=False)}
    parts = ((key.partition("."), value) for key, value in own.items())
    return {f"{names.get(number, number)}.{rest}": value for (number, _, rest), value in parts}


def _is_momentum(prefix: str, state: Mapping[str, Tensor]) -> bool:
    """Return True for the momentum copy of a network. With a queue of negatives (MoCo), an average is one too."""
    has_queue = any(re.search(r"(^|\.)(queue|contrast)(\.|$)", key) for key in state)
    return bool(_MOMENTUM.search(prefix)) or (has_queue and bool(_AVERAGE.search(prefix)))


def _preference(prefix: str) -> int:
    if _AVERAGE.search(prefix):
        return 0
    return 2 if _SECOND_CHOICE.search(prefix) else 1


def _left_over(body: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """Return unexpected names of weights: they show that the file holds a deeper or wider network of the same family.

    Such a name lies inside a child of `body`, or in a further stage, such as layer5 after layer1 to layer4. Names of
    a classifier are ignored.
    """
    # Older files hold some buffers that are no longer saved.
    known = {*body.state_dict(), *(key for key, _ in body.named_buffers())}
    rows = {_row(key) for key, _ in body.named_children()} - _HEADS
    return [
        key
        for key in own
        if key not in known and not key.endswith(_COUNTER) and "." in key and _row(key) in rows
    ]


def _row(key: str) -> str:
    """Return the first part of a name without its number: "layer" of "layer4.0.conv1.weight"."""
    return re.sub(r"\d+$", "", key.partition(".")[0])


def _beginnings(state: Mapping[str, Tensor]) -> list[str]:
    """Return the first parts of names, as many as it takes to tell some from others."""
    words = [key.split(".") for key in state]
    found: dict[str, None] = {}
    for depth in range(1, _MAX_DEPTH):
        found = dict.fromkeys(".".join(key[:depth]) for key in words)
        if len(found) > 1:
            break
    return list(found)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (", ".join(map(repr, keys[:_SHOWN])) or "nothing") + more
