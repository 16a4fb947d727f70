"""A frozen network as a function from images to features, in this process and without Ray."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from raysl.backbone import external_weights
from raysl.backbone.network import TIMM, BackboneConfig, names
from raysl.config import from_dict
from raysl.errors import UserError, explained, unknown
from raysl.extraction import encoders
from raysl.extraction import layers as layer_names
from raysl.extraction.encoders import Encoder, Trained, view_size
from raysl.extraction.layers import POOLED, Encode
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.storage.records import verified
from raysl.stream import decode

_BATCH = 128
# Weights files of an export, and the settings that raysl writes beside them.
_EXPORTED = ("model.safetensors", "model.pth", "pytorch_model.bin")
SETTINGS = "raysl.json"
# Modes of Pillow that PNG does not hold: those that TIFF holds, and what others become.
_TIFF_MODES = ("CMYK", "F", "I", "I;16L", "LAB", "YCbCr")
_CONVERTED = {"HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}


class FeatureExtractor:
    """Turn images into features. They are prepared exactly as the probes do: short side resized, centre crop, uint8.

    BatchNorm keeps the statistics of training, in the place of which probes take those of their train images.

    Attributes:
        name: origin of the network.
        layers: names of its layers. `layer="res3:9216"` asks for a grid of at most 9,216 numbers.
        image_size: side of the view in pixels.
    """

    def __init__(self, encoder: Encoder, name: str, image_size: int, device: str = "") -> None:
        encoders.check_size(encoder, image_size)
        self.name = name
        self.layers = encoder.layers
        self.image_size = image_size
        self._encoder = encoder
        self._device = _device(device)
        self._loaded: dict[str, Encode] = {}

    def __repr__(self) -> str:
        return f"FeatureExtractor({self.name!r}, image_size={self.image_size}, layers={self.layers})"

    @property
    def width(self) -> int:
        """Number of features of an image in the layer "pooled"."""
        return self(np.zeros((self.image_size, self.image_size, 3), np.uint8)).shape[1]

    def __call__(self, images: Any, layer: str = POOLED) -> Tensor:
        """Return the features of one image or many.

        Args:
            images: a PIL image, a path or URI, an open image file or its bytes, a uint8 array (h, w), (h, w, 3) or
                (b, h, w, 3), a uint8 tensor (3, h, w) or (b, 3, h, w), or any iterable of these.
            layer: a layer, or a grid of it.

        Returns:
            float32 (b, d) on the CPU; one row for one image.

        Raises:
            UserError: the layer does not exist, or an image cannot be read.
        """
        encode = self._encode(layer)
        features = []
        for images_bchw in self._views(images):
            with torch.inference_mode():
                features.append(encode(images_bchw.to(self._device))[layer].float().cpu())
        if not features:
            raise UserError("There are no images to compute features of. Give at least one.")
        return torch.cat(features)  # Outside of inference mode, so that gradients may be computed from it.

    def _encode(self, layer: str) -> Encode:
        if not layer_names.is_spec(layer) or layer_names.layer_of(layer) not in self.layers:
            raise unknown(f"layer of {self.name}", layer, self.layers)
        if layer not in self._loaded:
            self._loaded[layer] = self._encoder.load(self._device, [layer])
        return self._loaded[layer]

    def _views(self, images: Any) -> Iterator[Tensor]:
        """Yield batches of views, uint8 (b, 3, s, s)."""
        batch: list[bytes] = []
        for image in _image_files(images):
            batch.append(image)
            if len(batch) == _BATCH:
                yield self._view(batch)
                batch = []
        if batch:
            yield self._view(batch)

    def _view(self, images: list[bytes]) -> Tensor:
        with explained("An image cannot be decoded", "Remove it.", decode.DecodeError):
            return decode.evaluation_views(images, self.image_size)


def _device(name: str) -> torch.device:
    """Return a device by its name; "" for the first GPU, or the CPU. Raises UserError if it cannot be used."""
    advice = 'Give "cpu", or a device of this machine such as "cuda:0".'
    errors = (RuntimeError, AssertionError, NotImplementedError)  # The second without CUDA.
    with explained(f"The device {name!r} cannot be used", advice, *errors, show=_first_line):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        return device


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def load(
    source: str | os.PathLike[str] | Run,
    backbone: BackboneConfig | Mapping[str, Any] | str | None = None,
    *,
    image_size: int = 0,
    seed: int = 0,
    device: str = "",
) -> FeatureExtractor:
    """Load a frozen network that turns images into features. Ray is not needed.

    Args:
        source: a run (its newest checkpoint) or its folder, RUN/checkpoints/step-NNN, a folder of `raysl export`, a
            weights file, "random" or "pixels".
        backbone: name or configuration of the backbone of a weights file, or of "random", or a mapping of its fields.
            An exported folder, a safetensors file of raysl and a folder of timm state it themselves.
        image_size: side of the view in pixels; 0 for that of the run, 224 for a weights file, else 32.
        seed: of "random".
        device: such as "cuda:1"; "" for the first GPU, or the CPU if there is none.

    Raises:
        UserError: there is no such network or device, or the backbone of a weights file is not known.
    """
    if isinstance(source, Run):
        encoder: Encoder = Trained(source, source.newest())
        return FeatureExtractor(encoder, str(source.folder), image_size or view_size(encoder), device)
    name = os.fspath(source).rstrip("/")
    backbone = {"name": backbone} if isinstance(backbone, str) else backbone
    config = from_dict(BackboneConfig, backbone, "backbone") if isinstance(backbone, Mapping) else backbone
    if (
        name not in ("random", "pixels")
        and not Folder(name).exists(METADATA)
        and "/checkpoints/step-" not in name
    ):
        name, stated, stated_size = _find_settings(name)
        config, image_size = config or stated, image_size or stated_size
        if config is None:
            encoders.encoder_by_name(name, BackboneConfig(), seed)  # It refuses a file that does not exist.
            raise UserError(
                f"The backbone of the weights file {name!r} is not known. Give its name, such as "
                "raysl.load(FILE, 'resnet50') or 'timm/vit_small_patch16_224'."
            )
    encoder = encoders.encoder_by_name(name, config or BackboneConfig(), seed)
    return FeatureExtractor(encoder, name, image_size or view_size(encoder), device)


def _find_settings(name: str) -> tuple[str, BackboneConfig | None, int]:
    """Return the weights file of a folder or file, and the backbone and image size that are stated with it."""
    folder = Folder(name)
    inside = set(folder.list())
    if found := next((file for file in _EXPORTED if file in inside), ""):
        name = f"{name}/{found}"
    elif "model.onnx" in inside or name.endswith(".onnx"):
        raise UserError(
            f"{name!r} is an ONNX model. Run it with onnxruntime, or export the run as safetensors."
        )
    place, _, _ = str(Folder(name)).rpartition("/")
    return name, *(_settings(Folder(place or "/")) or _from_safetensors(name) or (None, 0))


def _settings(folder: Folder) -> tuple[BackboneConfig, int] | None:
    """Return what raysl or timm wrote beside the weights."""
    try:
        if folder.exists(SETTINGS):
            stated = verified(folder.read_json(SETTINGS))
            return BackboneConfig(**stated["backbone"]), int(stated["image_size"])
        if folder.exists("config.json"):
            stated = json.loads(folder.read("config.json"))
            cfg = stated.get("pretrained_cfg", {})
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            size = int(cfg.get("input_size", (0,))[-1])
            return BackboneConfig(f"{TIMM}{stated['architecture']}{tag}"), size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The settings beside the weights in {str(folder)!r} cannot be read ({error}). Give the backbone."
        ) from error
    return None


def _from_safetensors(name: str) -> tuple[BackboneConfig, int] | None:
    """Return what raysl wrote into the metadata of a safetensors file."""
    if not name.lower().endswith(".safetensors"):
        return None
    stated = external_weights.safetensors_metadata(external_weights.read_file(name))
    if stated.get("backbone") not in names():
        return None
    parts: dict[str, Any] = {key: stated[key] for key in ("stem", "norm") if key in stated}
    return BackboneConfig(stated["backbone"], **parts), int(stated.get("image_size", 0))


def _image_files(images: Any) -> Iterator[bytes]:
    """Yield every image as the bytes of an image file. Arrays become PNG, which is lossless."""
    if isinstance(images, bytes):
        yield images
    elif hasattr(images, "read"):
        yield images.read()
    elif isinstance(images, str | os.PathLike):
        place, _, name = str(Folder(os.fspath(images))).rpartition("/")
        with explained(f"The image {os.fspath(images)!r} cannot be read", "Check its path.", OSError):
            yield Folder(place or "/").read(name)
    elif isinstance(images, Image.Image):
        yield _encode_image(ImageOps.exif_transpose(images))
    elif isinstance(images, Tensor):
        images = images.movedim(-3, -1) if images.ndim >= 3 else images
        if images.dtype != torch.uint8:  # NumPy does not have all types of torch.
            raise _no_images(images.dtype, images.shape)
        yield from _array_files(images.cpu().numpy())
    elif isinstance(images, np.ndarray):
        yield from _array_files(images)
    elif isinstance(images, Iterable):
        for image in images:
            yield from _image_files(image)
    else:
        raise UserError(
            f"A value of type {type(images).__name__} is no image. Give a PIL image, a path, a uint8 array (h, w, 3), "
            "or a list of these."
        )


def _array_files(pixels: npt.NDArray[Any]) -> Iterator[bytes]:
    is_image = pixels.ndim == 2 or (pixels.ndim in (3, 4) and pixels.shape[-1] in (1, 3))
    if pixels.dtype != np.uint8 or not is_image or 0 in pixels.shape:
        raise _no_images(pixels.dtype, pixels.shape)
    for pixels_hwc in pixels if pixels.ndim == 4 else [pixels]:
        gray = pixels_hwc.ndim == 3 and pixels_hwc.shape[-1] == 1
        yield _encode_image(Image.fromarray(np.ascontiguousarray(pixels_hwc[..., 0] if gray else pixels_hwc)))


def _no_images(dtype: object, shape: Sequence[int]) -> UserError:
    return UserError(
        f"Images are given as {dtype}, of shape {tuple(shape)} with the channels last. Give uint8 in 0 .. 255: an "
        "array (h, w, 3) or (b, h, w, 3), or a tensor (3, h, w) or (b, 3, h, w). Of floats in 0 .. 1, give "
        "(255 * images).round() as uint8."
    )


def _encode_image(image: Image.Image) -> bytes:
    """Return an image as a file of a format that keeps its mode, or else its colors."""
    buffer = io.BytesIO()
    if image.mode == "I;16N":
        image = image.convert("I").convert("I;16")  # Converted at once, values would end at 255.
    elif image.mode in _CONVERTED:
        image = image.convert(_CONVERTED[image.mode])
    if image.mode in _TIFF_MODES:
        image.save(buffer, "TIFF")
    else:
        image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
