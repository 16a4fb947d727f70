"""Tracking: two patches along the track of a moving object; they show the same thing at two times.

Wang and Gupta 2015, "Unsupervised learning of visual representations using videos" (arXiv 1505.00687): patches that a
tracker connects are alike, patches of other videos are not. "triplet-tracking" is their ranking loss. The tracks are a
column of the data set: exact for `clips:N`, and for videos those of the tracker of `raysl ingest`. VOC 2012 detection
with an AlexNet from 100,000 videos: 52.0 % (ensemble), against 54.4 % from ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from raysl.dataset.clips import Clips
from raysl.fields import Bounds, Checked, Range
from raysl.pretext import Chosen, OfFrames
from raysl.rng import ImageRng

COMMAND = (
    "raysl pretrain --data clips:1000 --run RUN --method triplet-tracking --epochs 10 --batch-size 64 "
    "--view.image-size 32 --view.recipe mocov2 --backbone.norm group --optim.name adamw --optim.lr 0.008 "
    "--optim.warmup 0.05"
)


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the tracking.

    Args:
        apart_s: shortest time between the two patches, in seconds (paper: 30 frames, about 1 s). The ends of a shorter
            track are taken.
        context: side of a patch, as a multiple of the longer side of the tracked box.
    """

    apart_s: Annotated[float, Bounds(0, 3600), Range((0.25, 0.5, 1.0, 2.0))] = 1.0
    context: Annotated[float, Bounds(0.5, 4)] = 1.25


class Tracking(OfFrames):
    """Two square patches of one clip, each colored by itself."""

    clip_columns = ("frames", "times", "tracks")
    num_crops = 2
    example_objective = "triplet"

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Draw an object and two times from each clip. Without a track, take the whole of two frames."""
        draws_b4 = image_rng.uniform_array("track", 4)
        found = [self._patches(clips, row, draws_b4[row]) for row in range(len(clips))]
        return Chosen(
            np.array([frames for frames, _ in found], np.int64).reshape(-1, 2),
            np.array([boxes for _, boxes in found], np.float64).reshape(-1, 2, 4),
        )

    def _patches(
        self, clips: Clips, row: int, draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        times_n, tracks_kn4 = clips.times(row), clips.tracks(row).astype(np.float64)
        seen_kn = ~np.isnan(tracks_kn4[..., 0])
        usable = np.flatnonzero(seen_kn.sum(axis=1) >= 2)
        if len(usable):
            track = int(usable[int(draws[0] * len(usable))])
            numbers = np.flatnonzero(seen_kn[track])
        else:
            numbers = np.arange(len(times_n))
        pairs = np.argwhere(times_n[numbers][None] - times_n[numbers][:, None] >= self.config.apart_s - 1e-6)
        pairs = pairs if len(pairs) else np.array([[0, len(numbers) - 1]])
        pair = pairs[int(draws[1] * len(pairs))]
        frames = numbers[pair[::-1] if draws[2] < 0.5 else pair]
        if not len(usable):
            # A box is shrunk into its frame.
            return frames, np.tile([0.0, 0.0, 1e6, 1e6], (2, 1))
        boxes_24 = tracks_kn4[track, frames]
        side_2 = self.config.context * boxes_24[:, 2:].max(axis=1)
        center_22 = boxes_24[:, :2] + boxes_24[:, 2:] / 2
        return frames, np.column_stack([center_22 - side_2[:, None] / 2, side_2, side_2])
