"""Pretext transforms: one file each, found by its name. A pretext task is a transform that knows its own label.

A file `pretext/foo_bar.py` describes the transform `foo_bar` with

    @dataclass(frozen=True)
    class Config: ...                    its dials, each with a default and a line of documentation
    class FooBar:                        the transform; see `Pretext`

and gets the command line, the contract tests and `raysl methods` without another edit. The module docstring names
the paper, the idea and the published number to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from raysl.augment import SourceCrop
from raysl.rng import Draws


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
        label_b: int64 (b,), the property of the transform that can be predicted; None when it has none.
    """

    crops_bpchw: Tensor
    label_b: Tensor | None


class Pretext(Protocol):
    """A transform of images. Pure: everything random comes from the draws.

    Attributes:
        source: the crop of the decoded image that the transform starts from.
        num_crops: P, the crops that it yields for an image.
        num_labels: size of the label set; 0 when there is nothing to predict.
        colour: where the photometric augmentation goes: "crops" draws anew for each crop, "source" once for the
            image before it is transformed, "none" nowhere.
    """

    source: SourceCrop
    num_crops: int
    num_labels: int
    colour: Literal["crops", "source", "none"]

    def __init__(self, config: Any, geometry: Geometry) -> None: ...

    def transform(self, images_bchw: Tensor, draws: Draws) -> Transformed:
        """Transforms square uint8 images (b, 3, s, s), on the device they are on."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON facts for the run's passport that the Config alone does not fix, such as a hash of a label set."""
        ...
