"""Pretext transforms: one file each, found by its name. A pretext transform changes an image and labels the change.

A file `pretext/foo_bar.py` describes the transform `foo_bar` with

    @dataclass(frozen=True)
    class Config(Checked): ...           its hyperparameters, each with a default and a line of documentation
    class FooBar:                        the transform; see `Pretext`, and `Dense` if its target is no class

The command line, the contract tests and `raysl methods` find it without another edit. The module docstring names the
paper, the idea and the published number to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysl import plugins
from raysl.augment import SourceCrop
from raysl.dataset.clips import Clips
from raysl.errors import UserError
from raysl.pretext._colors import grayscale
from raysl.rng import ImageRng

Color = Literal["crops", "source", "none"]


@dataclass(frozen=True)
class Geometry:
    """Facts of the run that a transform may use.

    Args:
        image_size: side of an ordinary view in pixels; other sizes follow from it by the published ratios.
        min_scale: smallest share of the image's area that an ordinary view shows.
        predicted: True when the label is predicted (covariant use), False when views are compared (invariant use). A
            transform may have fewer labels when they are predicted.
        seed: seed of the run.
    """

    image_size: int = 32
    min_scale: float = 0.08
    predicted: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Transformed:
    """The result of a transform for a batch.

    Args:
        crops_bpchw: uint8 crops. P = 1 for a whole image, 9 for a jigsaw, 2 for a pair.
        target: the label of the transform, int64 (b,); int64 (b, p) with `label_per_crop`; for a `Dense` transform a
            tensor (b, ...) of any dtype that NumPy has, much smaller than the crops because it travels with them; None
            when there is nothing to predict.
    """

    crops_bpchw: Tensor
    target: Tensor | None


class Pretext(Protocol):
    """A transform of images. It is a pure function: all random numbers come from `image_rng`.

    Attributes:
        source: the crop of the decoded image that the transform starts from.
        num_crops: P, crops per image.
        num_labels: size of the label set; 0 when there is nothing to predict, or the target is no label.
        color: where the color augmentation is applied: "crops" to each crop by itself, "source" to the image before
            the transform, "none" nowhere.
        label_per_crop: optional: True when the target is int64 (b, p), and each crop is a sample.
        columns: optional: crops in a row, when the crops form a grid, row by row.
    """

    source: SourceCrop
    num_crops: int
    num_labels: int
    color: Color

    def __init__(self, config: Any, geometry: Geometry) -> None: ...

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Transform square uint8 images (b, 3, s, s), on their device."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return JSON facts for the run's metadata that the Config does not contain, such as a hash of a label set."""
        ...


class Plain:
    """Base of a transform with what most have: one crop of an ordinary view, no label, new colors crop by crop."""

    num_crops = 1
    num_labels = 0
    color: Color = "crops"

    def __init__(self, config: Any, geometry: Geometry) -> None:
        self.config = config
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)

    def describe(self) -> dict[str, Any]:
        """Return no facts."""
        return {}


@runtime_checkable
class Dense(Protocol):
    """Optional part of a transform whose target is no class, such as the colors of a grid of cells."""

    def head(self, width: int) -> nn.Module:
        """Build a head from pooled features (b, width) to the output that `loss` takes."""
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss of the head's output and `Transformed.target`, averaged over images."""
        ...


@dataclass(frozen=True)
class Chosen:
    """The parts of clips that a view shows. One of `frames_bp` and `crops_bpchw` is given.

    Args:
        frames_bp: int64 (b, p), numbers of frames in the order in which the network gets them.
        boxes_bp4: float (b, p, 4), the part of each frame: top, left, height and width in pixels. None: one random
            crop for each clip, by `Pretext.source`, the same for all frames.
        crops_bpchw: the finished view, uint8; for a view of the sound.
        target: as `Transformed.target`.
    """

    frames_bp: NDArray[np.int64] | None = None
    boxes_bp4: NDArray[np.float64] | None = None
    crops_bpchw: Tensor | None = None
    target: Tensor | None = None


@runtime_checkable
class OfClips(Protocol):
    """Optional part of a transform of clips. It chooses frames or sound before anything is decoded.

    The stream decodes and cuts the chosen frames; `Pretext.transform` is called only for still images, which are clips
    of one frame.

    Attributes:
        clip_columns: the columns of `raysl.dataset.clips` that are read.
    """

    clip_columns: tuple[str, ...]

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Choose what the view shows of each clip. A pure function."""
        ...


class OfFrames(Plain):
    """Base of a transform that shows whole frames, or parts of them. A still image is a clip of equal frames."""

    clip_columns: tuple[str, ...] = ("frames", "times")

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return the image as every frame."""
        return Transformed(images_bchw[:, None].expand(-1, self.num_crops, -1, -1, -1).contiguous(), None)


def of_clips(transform: Pretext) -> OfClips | None:
    """Return the transform if it needs clips; None for a transform of images."""
    return transform if isinstance(transform, OfClips) else None


def dense(transform: Pretext) -> Dense | None:
    """Return the transform, or the last of a composition, when it is `Dense`; otherwise None."""
    last = _last(transform)
    return last if isinstance(last, Dense) else None


def label_per_crop(transform: Pretext) -> bool:
    """Return whether every crop has a label, int64 (b, p)."""
    return bool(getattr(_last(transform), "label_per_crop", False))


def columns(transform: Pretext) -> int:
    """Return the number of crops in a row of the grid; 0 when the crops form no grid."""
    return int(getattr(_last(transform), "columns", 0))


def _last(transform: Pretext) -> Pretext:
    return transform.parts[-1] if isinstance(transform, Composition) else transform


def check_target(transform: Pretext, target: Tensor | None) -> None:
    """Raise UserError if a label of a transform is none of its `num_labels`. Targets on a GPU are not looked at.

    Args:
        target: as `Transformed.target`.
    """
    transform = transform.of if isinstance(transform, Grayscale) else transform
    if target is None or not transform.num_labels or isinstance(transform, Dense | Composition):
        return
    dims = 2 if label_per_crop(transform) else 1
    if target.dtype != torch.int64 or target.ndim != dims:
        shape = "(b, p)" if dims == 2 else "(b,)"
        raise UserError(
            f"{_title(transform)} gave a target of {target.dtype} and shape {tuple(target.shape)}. Its target must be "
            f"int64 {shape}."
        )
    if target.device.type != "cpu" or not target.numel():
        return
    low, high = (int(value) for value in target.aminmax())
    if low < 0 or high >= transform.num_labels:
        raise UserError(
            f"{_title(transform)} gave the target {low if low < 0 else high}, and num_labels is "
            f"{transform.num_labels}. Its targets must be between 0 and {transform.num_labels - 1}: correct them, or "
            "num_labels."
        )


def _title(transform: Pretext) -> str:
    """Return a transform with its file, also where the class came by pickle and its module is not imported."""
    codes = (getattr(member, "__code__", None) for member in vars(type(transform)).values())
    files = [code.co_filename for code in codes if code is not None and code.co_filename.endswith(".py")]
    if not files:
        return f"The pretext transform {type(transform).__name__!r}"
    return f"The pretext transform {Path(files[0]).stem!r} of {files[0]!r}"


def names() -> list[str]:
    """Return the names of all transforms."""
    return plugins.names(__name__)


def config_type(name: str) -> type[Any]:
    """Return the Config of a transform. Raises UserError when there is none of that name."""
    return plugins.config_type(__name__, name, "pretext transform")


def load(name: str) -> tuple[type[Any], type[Any]]:
    """Return the Config and the class of a transform. Raises UserError when there is none of that name."""
    return plugins.load(__name__, name, "pretext transform")


def build(spec: str, configs: Mapping[str, Any], geometry: Geometry) -> Pretext:
    """Build a transform, or a composition of several.

    Args:
        spec: a name, or names joined by "+" and applied from left to right, such as "rotation+jigsaw".
        configs: the Configs of the transforms by name; a missing one has its defaults.

    Raises:
        UserError: a name does not exist, the geometry does not suit a transform, or a transform before the last makes
            several crops or changes the size.
    """
    parts: list[Pretext] = []
    for name in spec.split("+"):
        config_type, transform_type = load(name.strip())
        parts.append(transform_type(configs.get(name.strip(), config_type()), geometry))
    if len(parts) == 1:
        return parts[0]
    if any(of_clips(part) for part in parts):
        raise UserError(
            f"The transforms {spec!r} cannot be composed: a transform of clips stands alone. Name it without '+'."
        )
    return Composition(spec, parts)


class Composition:
    """Several transforms in a row, such as rotation and then jigsaw (PIRL, appendix A).

    Source crop, crops and colors are those of the last transform. The label counts all combinations: with labels a and
    b of two transforms it is a * (number of b) + b; transforms without labels do not count. When the last transform is
    `Dense`, only its target is kept: "rotation+colorization" colors rotated images. The target of a dense transform
    before the last is dropped: "colorization+jigsaw" is a gray jigsaw.
    """

    def __init__(self, spec: str, parts: Sequence[Pretext]) -> None:
        self.parts = tuple(parts)
        last = self.parts[-1]
        self.source = last.source
        self.num_crops = last.num_crops
        self.color: Color = last.color
        counts = [part.num_labels for part in self.parts if part.num_labels]
        labeled = counts and not isinstance(last, Dense)
        self.num_labels = int(np.prod(counts, dtype=np.int64)) if labeled else 0
        nothing = ImageRng(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
        for part in self.parts[:-1]:
            side = part.source.size
            image_bchw = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            shape = tuple(part.transform(image_bchw, nothing).crops_bpchw.shape[1:])
            if shape != (1, 3, side, side):
                raise UserError(
                    f"The transforms {spec!r} cannot be composed: {type(part).__name__} changes an image of 3 x {side} "
                    f"x {side} to {' x '.join(map(str, shape))}, and only the last transform may cut or resize. Put it "
                    "last."
                )

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Apply the transforms from left to right, each with its own random numbers."""
        target: Tensor | None = None
        made = Transformed(images_bchw[:, None], None)
        for i, part in enumerate(self.parts):
            made = part.transform(made.crops_bpchw[:, 0], image_rng.named(str(i)))
            check_target(part, made.target)
            if made.target is not None and part.num_labels:
                before = 0 if target is None else target.view(-1, *[1] * (made.target.ndim - 1))
                target = before * part.num_labels + made.target
        return Transformed(made.crops_bpchw, made.target if isinstance(self.parts[-1], Dense) else target)

    def describe(self) -> dict[str, Any]:
        """Return the facts of every transform, in order."""
        return {"parts": [part.describe() for part in self.parts]}


class Grayscale:
    """A transform with gray crops. Its target is still computed from the colors."""

    def __init__(self, transform: Pretext) -> None:
        self.of = transform
        self.source = transform.source
        self.num_crops = transform.num_crops
        self.num_labels = transform.num_labels
        self.color: Color = transform.color

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Transform the images and remove the colors of the crops."""
        made = self.of.transform(images_bchw, image_rng)
        return replace(made, crops_bpchw=grayscale(made.crops_bpchw))

    def describe(self) -> dict[str, Any]:
        """Return the facts of the transform."""
        return self.of.describe()
