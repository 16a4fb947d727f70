"""A frozen network as a function from images to features, in this process and without Ray."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from raysl.backbone import external_weights
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import STATE
from raysl.config import from_dict
from raysl.dataset import DataSet
from raysl.errors import UserError, explained, path_text, unknown
from raysl.extraction import encoders, exports
from raysl.extraction import layers as layer_names
from raysl.extraction.encoders import Encoder, NetworkEncoder, Trained, view_size
from raysl.extraction.layers import POOLED, Encode
from raysl.extraction.reestimated import Reestimated
from raysl.ingestion import open_or_ingest, pixel_files
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.storage.similar import similar_folder
from raysl.stream import decode

_BATCH = 128
_Named = tuple[str, bytes]  # an image file after its name, which is "" if it has none


class FeatureExtractor:
    """Turn images into features. They are prepared exactly as the probes do: short side resized, center crop, uint8; an
    image of the size of the view stays as it is.

    Unless images are given for them, BatchNorm keeps the statistics of training, in the place of which probes take
    those of their train images.

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

    def module(self) -> nn.Module:
        """Return a new copy of the network, to train it further in a loop of your own.

        Returns:
            A module in training mode, on the device, from RGB images (b, 3, s, s), uint8 or float in 0 .. 255, to float
            features (b, width). It normalizes the images itself.

        Raises:
            UserError: this is "pixels", which is no network.
        """
        encoder = self._encoder
        if isinstance(encoder, NetworkEncoder | Reestimated) and self.name != "pixels":
            return encoder.network().to(self._device).train()
        raise UserError(f"{self.name!r} is no network that can be trained. Load a run, an export or weights.")

    def _encode(self, layer: str) -> Encode:
        if not layer_names.is_spec(layer) or layer_names.layer_of(layer) not in self.layers:
            raise unknown(f"layer of {self.name}", layer, self.layers)
        if layer not in self._loaded:
            self._loaded[layer] = self._encoder.load(self._device, [layer])
        return self._loaded[layer]

    def _views(self, images: Any) -> Iterator[Tensor]:
        batch: list[_Named] = []
        for number, (name, image) in enumerate(_image_files(images)):
            batch.append((name or f"number {number}, counted from 0,", image))
            if len(batch) == _BATCH:
                yield self._view(batch)
                batch = []
        if batch:
            yield self._view(batch)

    def _view(self, images: list[_Named]) -> Tensor:
        try:
            return decode.evaluation_views([image for _, image in images], self.image_size)
        except decode.DecodeError:
            for name, image in images:
                with explained(f"The image {name} cannot be decoded", "Leave it out.", decode.DecodeError):
                    decode.decode(image)
            raise


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
    bn_images: str | os.PathLike[str] | DataSet = "",
) -> FeatureExtractor:
    """Load a frozen network that turns images into features. Ray is not needed.

    Args:
        source: a run (its newest checkpoint) or its folder, RUN/checkpoints/step-NNN, a folder of `raysl export`, a
            weights file, "random" or "pixels".
        backbone: name or configuration of the backbone of a weights file, or of "random", or a mapping of its fields.
            An exported folder, a safetensors file of raysl and a folder of timm state it themselves.
        image_size: side of the view in pixels; 0 for that of a run or export, 224 for other weights, else 32.
        seed: of "random".
        device: such as "cuda:1"; "" for the first GPU, or the CPU if there is none.
        bn_images: images from which BatchNorm takes its statistics, as probes take those of their train images; a data
            set or a source. "" keeps the statistics of pretraining.

    Raises:
        UserError: there is no such network or device, or the backbone of a weights file is not known.
    """
    if isinstance(source, Run):
        encoder: Encoder = Trained(source, source.newest())
        name = str(source.folder)
    else:
        encoder, name, stated_size = _named_encoder(path_text(source).rstrip("/"), backbone, seed)
        image_size = image_size or stated_size
    image_size = image_size or view_size(encoder)
    if bn_images:
        images = bn_images if isinstance(bn_images, DataSet) else open_or_ingest(os.fspath(bn_images))
        encoder = Reestimated(encoder, images, image_size)
    return FeatureExtractor(encoder, name, image_size, device)


def _named_encoder(
    name: str, backbone: BackboneConfig | Mapping[str, Any] | str | None, seed: int
) -> tuple[Encoder, str, int]:
    """Return an encoder, the place of its weights, and the image size that is stated with them, or 0."""
    backbone = {"name": backbone} if isinstance(backbone, str) else backbone
    config = from_dict(BackboneConfig, backbone, "backbone") if isinstance(backbone, Mapping) else backbone
    stated_size = 0
    if (
        name not in ("random", "pixels")
        and not Folder(name).exists(METADATA)
        and "/checkpoints/step-" not in name
    ):
        name, stated, stated_size = exports.find(name)
        config = config or stated
        if config is None:
            # These refuse a file that does not exist, or that holds no weights.
            encoders.find_checkpoint(name)
            external_weights.parse(external_weights.read_file(name), name)
            raise UserError(
                f"The backbone of the weights file {name!r} is not known. Give its name, such as "
                "raysl.load(FILE, 'resnet50') or 'timm/vit_small_patch16_224'."
            )
    return encoders.encoder_by_name(name, config or BackboneConfig(), seed), name, stated_size


def starting_weights(path: str) -> str:
    """Return the file of the weights that a new run starts from.

    Args:
        path: a finished run (its last checkpoint), RUN/checkpoints/step-NNN, a folder of `raysl export`, or a weights
            file.

    Raises:
        UserError: it is none of these, or the run is not finished.
    """
    path = str(Folder(path))  # The whole path, as the run keeps it.
    if Folder(path).exists(METADATA) and not Run.open(path).is_finished():
        # Its newest checkpoint changes as it trains, and older ones are deleted.
        raise UserError(
            f"--backbone.weights is the run {path!r}, which is not finished. Finish it, or run `raysl export "
            f"{shlex.quote(path)}` and give the folder of the export."
        )
    if Folder(path).exists(METADATA) or re.search(r"/checkpoints/step-\d+$", path):
        found = encoders.find_checkpoint(path)
        assert found is not None
        return str(found[1].folder / STATE)
    if not Folder(path).exists():
        if meant := similar_folder(path, METADATA):
            raise UserError(f"--backbone.weights is {path!r}, which does not exist. {meant.strip()}")
        external_weights.read_file(path)  # Raises UserError.
    file = exports.weights_in(path)
    if file == path and "://" not in path and Folder(path).list():
        raise UserError(
            f"--backbone.weights is {path!r}, a folder that holds neither a run nor exported weights "
            f"({', '.join(exports.EXPORTED)}). Give the folder of a run, RUN/checkpoints/step-NNN, a folder of `raysl "
            "export`, or a weights file."
        )
    return file


def stated_backbone(file: str) -> BackboneConfig | None:
    """Return the backbone of a file of weights if a run, an export or the file itself states it."""
    inside = re.fullmatch(rf"(.+)/checkpoints/step-\d+/{re.escape(STATE)}", file)
    if inside:
        return Run.open(inside[1]).config().backbone
    return exports.find(file)[1]


def _image_files(images: Any) -> Iterator[_Named]:
    """Yield every image as the bytes of an image file. Arrays become PNG, which is lossless."""
    if isinstance(images, bytes):
        yield "", images
    elif hasattr(images, "read"):
        yield "", images.read()
    elif isinstance(images, str | os.PathLike):
        yield repr(os.fspath(images)), _read(os.fspath(images))
    elif isinstance(images, Image.Image):
        yield "", pixel_files.encode(images)
    elif pixel_files.is_pixels(images):
        pixels = pixel_files.pixels_of(images)
        for one in pixels if pixels.ndim == 4 else [pixels]:
            yield "", pixel_files.encode(pixel_files.image_of(one))
    elif isinstance(images, Iterable):
        for image in images:
            yield from _image_files(image)
    else:
        raise UserError(
            f"A value of type {type(images).__name__} is no image. Give a PIL image, a path, a uint8 array (h, w, 3), "
            "or a list of these."
        )


def _read(path: str) -> bytes:
    """Return an image file. Raises UserError if there is none."""
    place, _, name = str(Folder(path)).rpartition("/")
    if os.path.isdir(str(Folder(path))):
        raise UserError(
            f"{path!r} is a folder. Give the paths of its images, or run `raysl features`, which writes the features "
            "of all images of a folder."
        )
    with explained(f"The image {path!r} cannot be read", "Check its path.", OSError):
        return Folder(place or "/").read(name)
