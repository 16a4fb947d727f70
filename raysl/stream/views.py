"""A view: a pretext transform with flips and color augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from raysl.augment import Recipe, SourceCrop, color_jitter, hflip
from raysl.own_augmentation import OwnAugmentation
from raysl.pretext import Pretext, Transformed
from raysl.rng import ImageRng


@dataclass(frozen=True)
class View:
    """A function from source crops to the images that the network sees. Picklable and pure.

    Args:
        pretext: the transform.
        recipe: the color augmentation, or one of the user.
    """

    pretext: Pretext
    recipe: Recipe | OwnAugmentation

    @property
    def source(self) -> SourceCrop:
        """Return the crop of the decoded image that the view starts from."""
        return self.pretext.source

    def __call__(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Flip, transform and color a batch of source crops.

        Args:
            images_bchw: uint8 (b, 3, s, s) with s = `source.size`, on any device.
            image_rng: random numbers, named after the view so that two views of an image differ.

        Returns:
            uint8 crops (b, p, 3, h, w) and the target, on the device of the images.
        """
        side = self.source.size
        images_bchw = hflip(images_bchw, image_rng, self.recipe.hflip)
        if self.pretext.colour == "source":
            images_bchw = self._colored(images_bchw, image_rng, side)
        made = self.pretext.transform(images_bchw, image_rng.named("transform"))
        if self.pretext.colour != "crops":
            return made
        crops = made.crops_bpchw
        colored = self._colored(crops.flatten(0, 1), image_rng.repeated(crops.shape[1]), side)
        return replace(made, crops_bpchw=colored.view(crops.shape))

    def _colored(self, images_bchw: Tensor, image_rng: ImageRng, side: int) -> Tensor:
        if isinstance(self.recipe, OwnAugmentation):
            return self.recipe(images_bchw, image_rng)
        return color_jitter(images_bchw, self.recipe, image_rng, side)
