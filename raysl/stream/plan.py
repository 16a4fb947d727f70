"""Plan the order of the images: a pure function of (seed, data set, batch size).

The stream is one sequence over all epochs: position p belongs to epoch p // N. A batch may contain the end of one epoch
and the start of the next, so nothing is dropped, padded or repeated, and every index occurs exactly once per epoch.

Within an epoch, the row groups are permuted, consecutive groups form windows, and the rows of each window are permuted.
A window is read at once, so reading is sequential and remote storage is read about once per epoch.

A block of `steps_per_block` steps shares `steps_per_block * batch_size` consecutive positions, divided into `LANES`
equal parts, the lanes (fewer if `LANES` does not divide the batch size). The batch of a step takes rows from every
lane, so it mixes distant windows.
Worker r of W takes part r of each batch, which lies in its own lanes, so workers rarely read the same window. Neither
the batch nor its order depends on W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.dataset import DataSet, Rows
from raysl.errors import UserError

LANES = 8
WINDOW_ROWS = 1024
WINDOW_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of the images of a run. Plans are compared by identity, because the list of row groups may be long."""

    # int64 (groups + 1,), see `DataSet.row_group_starts`.
    row_group_starts: NDArray[np.int64] = field(repr=False)
    batch_size: int  # images in the global batch
    seed: int  # seed of the run
    groups_per_window: int  # row groups per window
    steps_per_block: int  # steps that share a block of the order
    num_steps: int  # steps of the run

    @staticmethod
    def of(dataset: DataSet, batch_size: int, seed: int, epochs: float) -> Plan:
        """Return the plan of a run over `dataset`, of at least one image a step and some epochs.

        Raises:
            UserError: the batch is larger than the data set.
        """
        if batch_size > dataset.num_images:
            raise UserError(
                f"--batch-size is {batch_size} and the data set has {dataset.size_text}. The batch "
                "must not be larger: lower --batch-size, or give more images."
            )
        starts = dataset.row_group_starts
        rows_per_group = dataset.num_images / (len(starts) - 1)
        bytes_per_row = max(1.0, dataset.manifest.num_bytes / dataset.num_images)
        window_rows = min(WINDOW_ROWS, WINDOW_BYTES / bytes_per_row)
        groups_per_window = max(1, round(window_rows / rows_per_group))
        steps_per_block = math.ceil(LANES * groups_per_window * rows_per_group / batch_size)
        # A block is at most an epoch; otherwise the lanes of a small data set would lie in different epochs.
        steps_per_block = max(1, min(steps_per_block, dataset.num_images // batch_size))
        steps = num_steps(dataset.num_images, batch_size, epochs)
        return Plan(starts, batch_size, seed, groups_per_window, steps_per_block, steps)

    @property
    def num_images(self) -> int:
        """Number of images in the data set."""
        return int(self.row_group_starts[-1])

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """Return the images of one worker at one step, in order.

        Args:
            step: 0-based step of the run, below `num_steps`.
            rank: the worker.
            world: number of workers; it must divide the batch size.
        """
        return self.locate(self.positions(step, rank, world))

    def positions(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Return positions in the stream, int64 (batch_size / world,). The arguments are those of `rows`."""
        local = self.batch_size // world
        if local * world != self.batch_size:
            raise UserError(
                f"--batch-size is {self.batch_size}; with {world} workers it must be a multiple of {world}, such as "
                f"{max(1, local) * world}."
            )
        first_step = step - step % self.steps_per_block
        # The last block may be shorter, so that the run ends with its last epoch.
        steps = min(self.steps_per_block, self.num_steps - first_step)
        lanes = math.gcd(self.batch_size, LANES)
        rows_per_lane = self.batch_size // lanes
        within_batch = rank * local + np.arange(local, dtype=np.int64)
        lane, row = np.divmod(within_batch, rows_per_lane)
        return first_step * self.batch_size + (lane * steps + step - first_step) * rows_per_lane + row

    def locate(self, positions: NDArray[np.int64]) -> Rows:
        """Return the images at positions of the stream."""
        epochs, offsets = np.divmod(positions, self.num_images)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._locate_in_epoch(int(epoch), offsets[here])
        return Rows(indices, epochs)

    def _locate_in_epoch(self, epoch: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        _, starts = _epoch_order(self, epoch)
        window_starts = starts[:: self.groups_per_window]
        window_of = np.searchsorted(window_starts, offsets, side="right") - 1
        indices = np.empty_like(offsets)
        for window in np.unique(window_of):
            here = window_of == window
            rows = _window_rows(self, epoch, int(window))
            indices[here] = rows[offsets[here] - window_starts[window]]
        return indices


def num_steps(num_images: int, batch_size: int, epochs: float) -> int:
    """Return the number of steps of a run. The last batch takes what it lacks from the next epoch."""
    # Images are rounded first: 1.1 * 1000 is a little more than 1100, and must not cost a step.
    return max(1, math.ceil(round(epochs * num_images) / batch_size))


@lru_cache(maxsize=4)
def _epoch_order(plan: Plan, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row groups in the order of the epoch, and the offset in the epoch where each starts."""
    groups = rng.generator(plan.seed, "row groups", epoch).permutation(len(plan.row_group_starts) - 1)
    sizes = np.diff(plan.row_group_starts)[groups]
    return groups, np.cumsum(sizes) - sizes


@lru_cache(maxsize=64)
def _window_rows(plan: Plan, epoch: int, window: int) -> NDArray[np.int64]:
    """Return the indices of one window in the order of the epoch."""
    groups, _ = _epoch_order(plan, epoch)
    first = window * plan.groups_per_window
    starts = plan.row_group_starts
    mine = groups[first : first + plan.groups_per_window]
    rows = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in mine])
    return rng.generator(plan.seed, "window", epoch, window).permutation(rows)
