"""Pretext transforms: one file each, found by its name. A pretext task is a transform that knows its own label.

A file `pretext/foo_bar.py` describes the transform `foo_bar` with

    @dataclass(frozen=True)
    class Config: ...                    its hyperparameters, each with a default and a line of documentation
    class FooBar:                        the transform; see `Pretext`, and `Dense` if its target is no class

and gets the command line, the contract tests and `raysl methods` without another edit. The module docstring names
the paper, the idea and the published number to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from raysl import plugins
from raysl.augment import SourceCrop
from raysl.errors import UserError
from raysl.pretext._grey import grey
from raysl.rng import ImageRng


@dataclass(frozen=True)
class Geometry:
    """What a transform may know of the run.

    Args:
        image_size: side in pixels of an ordinary view; other sizes follow from it by the published ratios.
        min_scale: smallest share of the image's area that an ordinary view may show.
        predicted: whether the label is to be predicted (covariant use) or the transform only compared
            (invariant use). A transform may choose a smaller label set when it is predicted.
        seed: seed of the run.
    """

    image_size: int = 32
    min_scale: float = 0.08
    predicted: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Transformed:
    """What a transform makes of a batch.

    Args:
        crops_bpchw: uint8. P = 1 for a whole image, 9 for a jigsaw, 2 for a pair.
        target: what can be predicted: int64 (b,), the label of the transform; or, for a `Dense` transform, a tensor
            (b, ...) of any dtype that NumPy has, small beside the crops, since it travels with them. None when there
            is nothing to predict. Where `label_per_crop`, int64 (b, p).
    """

    crops_bpchw: Tensor
    target: Tensor | None


class Pretext(Protocol):
    """A transform of images. Pure: everything random comes from the draws.

    Attributes:
        source: the crop of the decoded image that the transform starts from.
        num_crops: P, the crops that it yields for an image.
        num_labels: size of the label set; 0 when there is nothing to predict, or a target that is no label.
        colour: where the photometric augmentation goes: "crops" draws anew for each crop, "source" once for the
            image before it is transformed, "none" nowhere.
    """

    source: SourceCrop
    num_crops: int
    num_labels: int
    colour: Literal["crops", "source", "none"]

    def __init__(self, config: Any, geometry: Geometry) -> None: ...

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Transforms square uint8 images (b, 3, s, s), on the device they are on."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON facts for the run's metadata that the Config alone does not fix, such as a hash of a label set."""
        ...


@runtime_checkable
class LabelPerCrop(Protocol):
    """What a transform has besides `Pretext` when it may yield a label for every crop.

    Attributes:
        label_per_crop: whether it does: the target is int64 (b, p), and each crop is a sample of its own.
    """

    label_per_crop: bool


@runtime_checkable
class InPlace(Protocol):
    """What a transform has besides `Pretext` when its crops lie in their places on a grid, row by row.

    Attributes:
        columns: crops in a row.
    """

    columns: int


@runtime_checkable
class Dense(Protocol):
    """What a transform has besides `Pretext` when its target is no class, such as the colours of a grid of cells."""

    def head(self, width: int) -> nn.Module:
        """A new network from pooled features (b, width) to what `loss` takes."""
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss, a mean over images, of what the head puts out and `Transformed.target`."""
        ...


def dense(transform: Pretext) -> Dense | None:
    """The head and loss of a transform that has its own, be it the last of a composition; None when it has labels."""
    last = _last(transform)
    return last if isinstance(last, Dense) else None


def label_per_crop(transform: Pretext) -> bool:
    """Whether the target is a label for every crop, int64 (b, p), and not one for the image."""
    last = _last(transform)
    return isinstance(last, LabelPerCrop) and last.label_per_crop


def columns(transform: Pretext) -> int:
    """Crops in a row of the grid on which they lie; 0 when they have no places."""
    last = _last(transform)
    return last.columns if isinstance(last, InPlace) else 0


def _last(transform: Pretext) -> Pretext:
    return transform.parts[-1] if isinstance(transform, Composition) else transform


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
    """A transform, or several in a row.

    Args:
        spec: a name, or names joined by "+" and applied from left to right, such as "rotation+jigsaw".
        configs: the Config of a transform by its name; one that is missing has its defaults.
        geometry: the same for all of them.

    Raises:
        UserError: a name does not exist, the geometry does not suit a transform, or one that is not the last
            makes more than one crop or changes the size.
    """
    parts: list[Pretext] = []
    for name in spec.split("+"):
        config_type, transform_type = load(name.strip())
        parts.append(transform_type(configs.get(name.strip(), config_type()), geometry))
    if len(parts) == 1:
        return parts[0]
    return Composition(spec, parts)


class Composition:
    """Transforms applied one after the other: rotate, then cut into a jigsaw (PIRL, appendix A).

    Source crop, crops and colours are those of the last. The label counts all combinations: with labels a, b
    of two transforms it is a * (number of b) + b; a transform without labels does not count. When the last is
    `Dense`, its target is the only one: "rotation+colorization" colours turned images. The target of a dense
    transform that is not the last is dropped: "colorization+jigsaw" is a jigsaw in grey.
    """

    def __init__(self, spec: str, parts: Sequence[Pretext]) -> None:
        self.parts = tuple(parts)
        last = self.parts[-1]
        self.source = last.source
        self.num_crops = last.num_crops
        self.colour: Literal["crops", "source", "none"] = last.colour
        counts = [part.num_labels for part in self.parts if part.num_labels]
        labelled = counts and not isinstance(last, Dense)
        self.num_labels = int(np.prod(counts, dtype=np.int64)) if labelled else 0
        nothing = ImageRng(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
        for part in self.parts[:-1]:
            side = part.source.size
            image_bchw = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            shape = tuple(part.transform(image_bchw, nothing).crops_bpchw.shape[1:])
            if shape != (1, 3, side, side):
                raise UserError(
                    f"The pretext {spec!r} cannot be composed: {type(part).__name__} turns an image of 3 x {side} x "
                    f"{side} into {' x '.join(map(str, shape))}, and only the last transform may cut or resize. Put "
                    "it last."
                )

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Applies the transforms from left to right, each with draws of its own."""
        target: Tensor | None = None
        made = Transformed(images_bchw[:, None], None)
        for i, part in enumerate(self.parts):
            made = part.transform(made.crops_bpchw[:, 0], image_rng.named(str(i)))
            if made.target is not None and part.num_labels:
                before = 0 if target is None else target.view(-1, *[1] * (made.target.ndim - 1))
                target = before * part.num_labels + made.target
        return Transformed(made.crops_bpchw, made.target if isinstance(self.parts[-1], Dense) else target)

    def describe(self) -> dict[str, Any]:
        """The facts of every part, in order."""
        return {"parts": [part.describe() for part in self.parts]}


class Grey:
    """A transform whose crops are shown without colour; its target is still that of the colours."""

    def __init__(self, transform: Pretext) -> None:
        self.of = transform
        self.source = transform.source
        self.num_crops = transform.num_crops
        self.num_labels = transform.num_labels
        self.colour: Literal["crops", "source", "none"] = transform.colour

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """The same crops in grey, the same target."""
        made = self.of.transform(images_bchw, image_rng)
        return replace(made, crops_bpchw=grey(made.crops_bpchw))

    def describe(self) -> dict[str, Any]:
        """The facts of the transform."""
        return self.of.describe()
