"""Random numbers as pure functions of (seed, epoch, index, name of the choice).

A counter-based generator has no state, so the numbers of an image do not depend on the worker, the batch, the order of
arrival or an interruption. A number takes three rounds of the SplitMix64 finalizer (Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators"), vectorized over the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raysl.communication.device_copy import to_device

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: int | str) -> int:
    """Return a 64-bit key of the parts and their order, equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator with a key of the parts, for choices of a whole epoch, window or step."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def sample(count: int, most: int, *parts: int | str) -> NDArray[np.int64]:
    """Return at most `most` of the numbers below `count`, sorted, chosen by the generator of the parts."""
    return np.sort(generator(*parts).permutation(count)[:most])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class ImageRng:
    """The random numbers of a batch of images.

    Args:
        seed: seed of the run.
        epochs_b: int64 (b,), the epoch of each visit.
        indices_b: int64 (b,), the index of each image in the data set.
        name: prefix of the names of all choices; see `named`.
        device: device of the tensors that the methods return.
    """

    seed: int
    epochs_b: NDArray[np.int64]
    indices_b: NDArray[np.int64]
    name: str = ""
    device: torch.device = torch.device("cpu")

    def named(self, name: str) -> ImageRng:
        """Return the random numbers of the same images under another name: two views have independent numbers."""
        return replace(self, name=f"{self.name}/{name}")

    def shared(self, name: str) -> ImageRng:
        """Return random numbers that all views of an image share, so that the views can agree on a choice."""
        return replace(self, name=f"/shared/{name}")

    def to(self, device: torch.device) -> ImageRng:
        """Return the same random numbers on another device."""
        return replace(self, device=device)

    def repeated(self, count: int) -> ImageRng:
        """Return independent random numbers for b * count crops, the crops of an image together.

        The numbers of crop c of an image depend on c and not on the rest of the batch.
        """
        slots = np.tile(np.arange(count, dtype=np.int64), len(self.indices_b))
        # 2**40 images and 2**20 crops fit into the 64 bits of the hash.
        return replace(
            self,
            name=f"{self.name}/crop",
            epochs_b=np.repeat(self.epochs_b, count),
            indices_b=np.repeat(self.indices_b, count) + (slots << np.int64(40)),
        )

    def _bits(self, name: str, count: int) -> NDArray[np.uint64]:
        """Return uint64 (b, count), uniform over all 64-bit numbers."""
        base = np.uint64(key(self.seed, f"{self.name}/{name}"))
        with np.errstate(over="ignore"):
            image_b = _mix(
                _mix(base + self.epochs_b.astype(np.uint64) * _GOLDEN) ^ self.indices_b.astype(np.uint64)
            )
            counter_n = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
            return _mix(image_b[:, None] + counter_n[None, :])

    def uniform_array(self, name: str, count: int) -> NDArray[np.float64]:
        """Return float64 (b, count), uniform in [0, 1)."""
        return (self._bits(name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, count: int = 1) -> torch.Tensor:
        """Return float32 (b, count), uniform in [low, high)."""
        values = low + (high - low) * self.uniform_array(name, count)
        return to_device(values.astype(np.float32), self.device)

    def integers(self, name: str, below: int, count: int = 1) -> torch.Tensor:
        """Return int64 (b, count), uniform over 0 .. below - 1. The bias is less than 2**-53 * `below`."""
        values = (self.uniform_array(name, count) * below).astype(np.int64)
        return to_device(values, self.device)

    def chance(self, name: str, probability: float) -> torch.Tensor:
        """Return bool (b,), True with the given probability."""
        return to_device(self.uniform_array(name, 1)[:, 0] < probability, self.device)
