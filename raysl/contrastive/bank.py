"""The memory bank: one unit vector per image, replicated on every worker or sharded among them.

It is equal for any number of workers: the initial rows depend on the seed and the index, the updates of a step are
gathered and applied in the order of the global batch, and negatives are sampled from (seed, step) or from (seed,
epoch, index). The bank is not a buffer of the model, because DistributedDataParallel would broadcast it at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl import rng
from raysl.communication import collective
from raysl.errors import UserError
from raysl.fields import Bounds, Checked, Range

# Number of initial rows that one generator draws, so that any worker can fill any block of rows.
_BLOCK = 4096


@dataclass(frozen=True)
class BankConfig(Checked):
    """The memory bank, which stores one embedding for each image.

    Args:
        momentum: weight of the stored embedding when it is updated, 0 to 1 (PIRL and NPID: 0.5); 0 replaces it by the
            new embedding.
        placement: "replicated" keeps all rows on every worker; "sharded" keeps 1/W of the rows on each of W workers and
            exchanges rows at every step. Both give the same results.
        dtype: type of the stored embeddings; scores are always computed in float32.
    """

    momentum: Annotated[float, Bounds(0, 1, hint="PIRL uses 0.5"), Range((0.0, 0.5, 0.9, 0.99))] = 0.5
    placement: Literal["replicated", "sharded"] = "replicated"
    dtype: Literal["float32", "float16"] = "float32"


class MemoryBank:
    """The rows (n, d) of all images, on this worker or sharded over all workers; `seed` gives the initial rows."""

    def __init__(
        self,
        num_images: int,
        dim: int,
        config: BankConfig,
        seed: int,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        self.num_images = num_images
        self.dim = dim
        self.config = config
        self.seed = seed
        # The rows of this worker: the first, and one past the last.
        rank, world = (collective.rank(), collective.world()) if config.placement == "sharded" else (0, 1)
        self.first, self.last = rank * num_images // world, (rank + 1) * num_images // world
        # There is one row more than this worker has (m = n + 1). Updates of the rows of other workers go there, so the
        # host never waits for a GPU to count the rows of this worker.
        self._padded_md = self._initial_rows(device)
        self.rows_nd = self._padded_md[:-1]

    def _initial_rows(self, device: torch.device) -> Tensor:
        """Return this worker's initial rows: uniform in a cube, then scaled to length 1, as in NPID."""
        rows_md = torch.zeros(
            self.last - self.first + 1, self.dim, dtype=getattr(torch, self.config.dtype), device=device
        )
        for first in range(self.first // _BLOCK * _BLOCK, self.last, _BLOCK):
            generator = rng.generator(self.seed, "bank", first // _BLOCK)
            block_nd = torch.from_numpy(generator.random((_BLOCK, self.dim), np.float32) * 2 - 1)
            start, stop = max(self.first, first), min(self.last, first + _BLOCK)
            rows_md[start - self.first : stop - self.first] = F.normalize(
                block_nd[start - first : stop - first], dim=1
            ).to(rows_md)
        return rows_md

    def lookup(self, indices_b: Tensor, shared: bool = False) -> Tensor:
        """Return the rows of images, without gradient.

        Args:
            indices_b: int64 (b,), with the same length on every worker.
            shared: True when every worker gives the same indices.

        Returns:
            float32 (b, d).
        """
        indices_b = indices_b.to(self.rows_nd.device)
        if self.config.placement == "replicated" or collective.world() == 1:
            return self.rows_nd[indices_b].float()
        wanted = indices_b if shared else collective.gather(indices_b)
        is_local, rows_here = self._local_rows(wanted)
        rows = torch.where(is_local[:, None], self._padded_md[rows_here].float(), 0.0)
        # One worker has the row and the others add zeros, so the sum is exact.
        rows = collective.total(rows)
        start = 0 if shared else collective.rank() * len(indices_b)
        return rows[start : start + len(indices_b)]

    def update(self, indices_b: Tensor, embeddings_bd: Tensor) -> None:
        """Update the rows of the global batch: row <- normalize(momentum * row + (1 - momentum) * embedding).

        An index that occurs twice in the global batch, as a batch at the end of an epoch may contain, takes its last
        embedding in the order of the global batch.

        Args:
            indices_b: int64 (b,), this worker's images, with the same length on every worker.
            embeddings_bd: float (b, d), their unit embeddings; their gradient is dropped.
        """
        device = self.rows_nd.device
        indices = collective.gather(indices_b.to(device))
        embeddings = collective.gather(embeddings_bd.detach().float().to(device))
        ordered, order = torch.sort(indices, stable=True)
        last = order[torch.searchsorted(ordered, indices, right=True) - 1]
        _, rows_here = self._local_rows(indices)
        momentum = self.config.momentum
        mixed = momentum * self._padded_md[rows_here].float() + (1 - momentum) * embeddings[last]
        # An index that occurs twice writes the same row twice.
        self._padded_md[rows_here] = F.normalize(mixed, dim=1).to(self.rows_nd.dtype)

    def _local_rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return which images have their rows on this worker, and the number of each row; for others the extra row."""
        is_local = (indices >= self.first) & (indices < self.last)
        return is_local, torch.where(is_local, indices - self.first, self.last - self.first)

    def state(self) -> dict[str, Any]:
        """Return the state to save: this worker's rows (the tensor itself, not a copy) and their range."""
        return {
            "first": self.first,
            "last": self.last,
            "num_images": self.num_images,
            "rows_nd": self.rows_nd,
        }

    def load(self, parts: Iterable[dict[str, Any]]) -> None:
        """Restore this worker's rows from the parts that any number of workers saved. Read the parts one by one.

        Raises:
            UserError: the parts belong to another bank, or rows are missing.
        """
        missing = torch.ones(self.last - self.first, dtype=torch.bool)
        for part in parts:
            rows = part["rows_nd"]
            if part["num_images"] != self.num_images or rows.shape[1] != self.dim:
                raise UserError(
                    f"The saved memory bank has {part['num_images']:,} rows of {rows.shape[1]} numbers and this run "
                    f"needs {self.num_images:,} rows of {self.dim}. Start a new run in another folder (--run)."
                )
            start, stop = max(self.first, part["first"]), min(self.last, part["last"])
            if start < stop:
                piece = rows[start - part["first"] : stop - part["first"]]
                self.rows_nd[start - self.first : stop - self.first] = piece.to(self.rows_nd)
                missing[start - self.first : stop - self.first] = False
        if missing.any():
            raise UserError(
                f"The checkpoint lacks {int(missing.sum()):,} rows of the memory bank. Delete its folder: the run then "
                "resumes from the checkpoint before."
            )
