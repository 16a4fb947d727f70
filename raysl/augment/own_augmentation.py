"""An augmentation of the user: a function or a torchvision transform in the place of a color recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysl import plugins
from raysl.errors import UserError
from raysl.rng import ImageRng
from raysl.storage.records import short_hash


@dataclass(frozen=True)
class OwnAugmentation:
    """A callable from one uint8 image (3, h, w) to one of the same shape, such as a transform of torchvision v2.

    It draws from torch's global generator, which is seeded for every image, so that views do not depend on the number
    of workers. Flips are its own affair.

    Args:
        name: "MODULE:NAME" or "FILE.py:NAME" of the callable.
    """

    name: str
    hflip: float = 0.0

    def __call__(self, images_bchw: Tensor, image_rng: ImageRng) -> Tensor:
        """Return the augmented images, uint8 of the same shape. Raises UserError when the callable returns others."""
        function = _callable(self.name)
        seeds_b = image_rng.integers("own augmentation", 1 << 53)[:, 0].tolist()
        made = []
        with torch.random.fork_rng(devices=[]):
            for image_chw, seed in zip(images_bchw, seeds_b, strict=True):
                torch.manual_seed(seed)
                made.append(self._checked(function(image_chw), image_chw))
        return torch.stack(made) if made else images_bchw

    def _checked(self, made: Any, given_chw: Tensor) -> Tensor:
        if not isinstance(made, Tensor) or made.shape != given_chw.shape or made.dtype != torch.uint8:
            found = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise UserError(
                f"The augmentation {self.name!r} returned {found} for a uint8 image of shape {tuple(given_chw.shape)}. "
                "It must return a uint8 tensor of the same shape."
            )
        return made

    def describe(self) -> dict[str, str]:
        """Return its name and a hash of its source file, for run metadata."""
        file = plugins.import_module(self.name.rpartition(":")[0]).__file__
        data = Path(file).read_bytes() if file else b""
        return {"name": self.name, "source": short_hash(data)}


def name_of(function: Callable[..., Any]) -> str:
    """Return "MODULE:NAME" of a function or class of the user.

    Raises:
        UserError: workers cannot import it: it is an object, or is defined in a script, a notebook or another function.
    """
    if name := plugins.importable_name(function):
        return name
    if not hasattr(function, "__qualname__"):
        raise UserError(
            f"The augmentation is an object of the type {type(function).__name__!r}, which does not know its name. "
            "Give the name of the variable at the top level of a module, as 'MODULE:NAME' or 'FILE.py:NAME'."
        )
    raise UserError(
        f"The augmentation {function.__qualname__!r} cannot be imported by workers. Define it at the top level of a "
        "module, and give 'MODULE:NAME' or 'FILE.py:NAME'."
    )


@lru_cache(maxsize=16)
def _callable(name: str) -> Callable[[Tensor], Any]:
    """Import the callable; of a class, an instance without arguments."""
    return plugins.function(name, "augmentation", instance=True)  # type: ignore[no-any-return]
