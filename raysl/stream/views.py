"""A view: a pretext transform with the colours and the mirror image that go with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from raysl.augment import Recipe, SourceCrop, hflip, photometric
from raysl.pretext import Pretext, Transformed
from raysl.rng import ImageRng


@dataclass(frozen=True)
class View:
    """What the network sees of an image, from the source crop on. Picklable and pure.

    Args:
        pretext: the transform.
        recipe: the photometric augmentation.
    """

    pretext: Pretext
    recipe: Recipe

    @property
    def source(self) -> SourceCrop:
        """The crop of the decoded image that the view starts from."""
        return self.pretext.source

    def __call__(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Mirrors, transforms and colours a batch of source crops.

        Args:
            images_bchw: uint8 (b, 3, s, s), s being `source.size`, on any device.
            draws: named after the view, so that two views of an image draw independently.

        Returns:
            uint8 crops (b, p, 3, h, w) and the target, on the device of the images.
        """
        side = self.source.size
        images_bchw = hflip(images_bchw, image_rng, self.recipe.hflip)
        if self.pretext.colour == "source":
            images_bchw = photometric(images_bchw, self.recipe, image_rng, side)
        made = self.pretext.transform(images_bchw, image_rng.named("transform"))
        if self.pretext.colour != "crops":
            return made
        crops = made.crops_bpchw
        coloured = photometric(crops.flatten(0, 1), self.recipe, image_rng.repeated(crops.shape[1]), side)
        return replace(made, crops_bpchw=coloured.view(crops.shape))
