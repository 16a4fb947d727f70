"""A view: a pretext transform with flips and color augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from raysl.augment import Recipe, SourceCrop, color_jitter, hflip
from raysl.augment.own_augmentation import OwnAugmentation
from raysl.dataset.clips import Clips
from raysl.errors import name_plugin_in_errors
from raysl.pretext import Chosen, OfClips, Pretext, Transformed, check_target, of_clips
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

    @property
    def of_clips(self) -> OfClips | None:
        """Return the transform if it needs clips; None for a view of images."""
        return of_clips(self.pretext)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the data set that the view reads."""
        return ("image",) if self.of_clips is None else self.of_clips.clip_columns

    def __call__(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Flip, transform and color a batch of source crops.

        Args:
            images_bchw: uint8 (b, 3, s, s) with s = `source.size`, on any device; (b, p, 3, s, s) for the chosen frames
                of clips, which are flipped alike and not transformed.
            image_rng: random numbers, named after the view so that two views of an image differ.

        Returns:
            uint8 crops (b, p, 3, h, w) and the target, on the device of the images.

        Raises:
            UserError: a target is no label of the transform, or code of the user fails.
        """
        with name_plugin_in_errors():
            return self._made(images_bchw, image_rng)

    def chosen(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Return what a view of clips shows of each clip. Raises as the view of images."""
        assert self.of_clips is not None
        with name_plugin_in_errors():
            found = self.of_clips.choose(clips, image_rng)
        check_target(self.pretext, found.target)
        return found

    def _made(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        side = self.source.size
        if images_bchw.ndim == 5:
            return Transformed(self._frames(images_bchw, image_rng), None)
        images_bchw = hflip(images_bchw, image_rng, self.recipe.hflip)
        if self.pretext.color == "source":
            images_bchw = self._colored(images_bchw, image_rng, side)
        made = self.pretext.transform(images_bchw, image_rng.named("transform"))
        check_target(self.pretext, made.target)
        if self.pretext.color != "crops":
            return made
        crops = made.crops_bpchw
        colored = self._colored(crops.flatten(0, 1), image_rng.repeated(crops.shape[1]), side)
        return replace(made, crops_bpchw=colored.view(crops.shape))

    def _frames(self, frames_bpchw: Tensor, image_rng: ImageRng) -> Tensor:
        p = frames_bpchw.shape[1]
        frames = hflip(frames_bpchw.flatten(1, 2), image_rng, self.recipe.hflip).view(frames_bpchw.shape)
        if self.pretext.color == "none":
            return frames
        if self.pretext.color == "crops":
            each = image_rng.repeated(p)
        else:  # the same colors for all frames of a clip
            epochs_n, indices_n = (np.repeat(a, p) for a in (image_rng.epochs_b, image_rng.indices_b))
            each = replace(image_rng, epochs_b=epochs_n, indices_b=indices_n)
        return self._colored(frames.flatten(0, 1), each, self.source.size).view(frames.shape)

    def _colored(self, images_bchw: Tensor, image_rng: ImageRng, side: int) -> Tensor:
        if isinstance(self.recipe, OwnAugmentation):
            return self.recipe(images_bchw, image_rng)
        return color_jitter(images_bchw, self.recipe, image_rng, side)
