"""Near frame: another frame of the clip, near its middle. Frames of one clip are related and others are not.

Time takes the place of augmentation: Mobahi, Collobert and Weston 2009, "Deep learning from temporal coherence in
video"; Wang and Gupta 2015 (arXiv 1505.00687); Sermanet et al. 2018 (time-contrastive networks, arXiv 1704.06888). With
an objective that compares views the other view is the frame in the middle of the clip: "pirl-near_frame" and
"simclr-near_frame" (InfoNCE over frames).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from raysl.dataset.clips import Clips
from raysl.fields import Bounds, Checked, Range
from raysl.pretext import Chosen, OfFrames
from raysl.rng import ImageRng

COMMAND = "raysl pretrain --data clips:2000 --run RUN --method pirl-near_frame"


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the near frame.

    Args:
        within_s: longest time between the frame and the middle of the clip, in seconds.
    """

    within_s: Annotated[float, Bounds(above=0, high=3600), Range((0.25, 0.5, 1.0, 2.0))] = 1.0


class NearFrame(OfFrames):
    """One frame, uniform over those near the middle."""

    example_objective = "pirl"

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Draw a frame from each clip."""
        draws_b = image_rng.uniform_array("frame", 1)[:, 0]
        frames = []
        for row, draw in enumerate(draws_b):
            times_n = clips.times(row)
            near = np.flatnonzero(np.abs(times_n - times_n[len(times_n) // 2]) <= self.config.within_s + 1e-6)
            frames.append(near[int(draw * len(near))])
        return Chosen(np.array(frames, np.int64)[:, None])
