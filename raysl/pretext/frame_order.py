"""Frame order: are three frames of a clip in the order of time, or into which order were n frames shuffled?

"verify" is Shuffle and Learn (Misra, Zitnick and Hebert 2016, arXiv 1603.08561): five frames a < b < c < d < e are
sampled where the motion is large. (b, c, d) is right; (b, a, d) and (b, e, d) are wrong, so only the middle frame
differs. Both directions of time count as right, and a wrong frame that looks like b or d is not taken.
"sort" is order prediction (Lee et al. 2017, arXiv 1708.01246): the label is the permutation of n frames, and a
permutation and its reverse are one class. UCF101 with a CaffeNet from verification: 50.9 %, HMDB51 19.8 % (split 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raysl.augment import SourceCrop
from raysl.dataset.clips import Clips
from raysl.fields import Bounds, Checked, Range
from raysl.pretext import Chosen, Color, Geometry, OfFrames
from raysl.rng import ImageRng

# The order shows in places, which pooled features do not say, and in the comparison of the frames. At 32 pixels, the
# map of the small backbone has 2 x 2 places, which are too few. With the default recipe, the loss stays that of
# guessing. See results/video.
COMMAND = (
    "raysl pretrain --data clips:1000 --run RUN --method predict-frame_order --epochs 30 --batch-size 64 "
    "--view.image-size 64 --view.min-scale 0.8 --view.recipe plain --predict.cells 4 --predict.hidden 512 "
    "--optim.name adamw --optim.lr 0.004 --optim.warmup 0.05"
)


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the frame order.

    Args:
        task: "verify" whether three frames are in order, or "sort" frames by predicting their permutation.
        frames: number of frames to sort; "verify" always takes three.
        longest_s: longest time between the first and the last frame, in seconds (paper: 60 frames, about 2 s).
        outside_s: shortest time between these two and a wrong frame, in seconds (paper: 15 frames, about 0.5 s).
        positives: share of tuples in the right order, in 0..1 (paper: 0.25).
        alike: a wrong frame differs from both ends by at least this many gray levels of 255, averaged over a copy of 16
            x 16 pixels. The frame that differs most is taken when none does.
    """

    task: Literal["verify", "sort"] = "verify"
    frames: Annotated[int, Bounds(3, 5)] = 4
    longest_s: Annotated[float, Bounds(above=0, high=3600), Range((0.5, 1.0, 2.0, 4.0))] = 2.0
    outside_s: Annotated[float, Bounds(0, 3600), Range((0.25, 0.5, 1.0))] = 0.5
    positives: Annotated[float, Bounds(above=0, below=1)] = 0.5
    alike: Annotated[float, Bounds(0, 255)] = 2.0


class FrameOrder(OfFrames):
    """Whole frames of one clip, all cut, flipped and colored alike."""

    clip_columns = ("frames", "times", "thumbnails")
    color: Color = "source"

    def __init__(self, config: Config, geometry: Geometry) -> None:
        self.config = config
        self.source = SourceCrop(geometry.image_size, max(geometry.min_scale, 0.5))
        if config.task == "verify":
            self.num_crops, self.num_labels = 3, 2
            self.orders = np.arange(3)[None]
        else:
            # A permutation and its reverse count as one: take the one that begins with the earlier end.
            found = [order for order in permutations(range(config.frames)) if order[0] < order[-1]]
            self.num_crops, self.num_labels = config.frames, len(found)
            self.orders = np.array(found)

    @property
    def chance(self) -> float:
        """The loss of a guess by the frequencies of the labels."""
        right: float = self.config.positives
        if self.config.task != "verify":
            return math.log(self.num_labels)
        return -right * math.log(right) - (1 - right) * math.log(1 - right)

    def choose(self, clips: Clips, image_rng: ImageRng) -> Chosen:
        """Draw a tuple from each clip. A clip of fewer frames than the tuple repeats frames."""
        draws_bk = image_rng.uniform_array("tuple", 8)
        picked = [self._tuple(clips, row, draws_bk[row]) for row in range(len(clips))]
        frames_bp = np.array([frames for frames, _ in picked], np.int64).reshape(-1, self.num_crops)
        return Chosen(frames_bp, target=torch.tensor([label for _, label in picked], dtype=torch.int64))

    def _tuple(self, clips: Clips, row: int, draws: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
        """Return the numbers of the frames in the order of the view, and the label."""
        times_n, gray_nd = clips.times(row), clips.thumbnails(row).reshape(-1, 256).astype(np.int16)
        verify = self.config.task == "verify"
        first, last = self._window(times_n, gray_nd, draws[0], self.num_crops - 1, verify)
        between = np.arange(first + 1, max(last, first + 2))
        if verify:
            right = draws[1] < self.config.positives
            middle = between if right else self._outside(times_n, gray_nd, first, last)
            frames = np.array([first, middle[int(draws[2] * len(middle))], last])
            label = int(right)
        else:
            label = int(draws[1] * self.num_labels)
            left = list(between)
            drawn = [left.pop(int(draw * len(left))) for draw in draws[3 : 1 + self.num_crops] if left]
            inner = np.resize(np.sort(drawn), self.num_crops - 2)
            frames = np.array([first, *inner, last])[self.orders[label]]
        frames = np.minimum(frames, len(times_n) - 1)
        return (frames[::-1] if draws[7] < 0.5 else frames), label

    def _window(
        self,
        times_n: NDArray[np.float64],
        gray_nd: NDArray[np.int16],
        draw: float,
        steps: int,
        verify: bool,
    ) -> tuple[int, int]:
        """Return the first and the last frame of a tuple, drawn in proportion to the motion between them."""
        n = len(times_n)
        if n <= steps:
            return 0, max(n - 1, 1)
        motion_n = np.concatenate([[0], np.cumsum(np.abs(np.diff(gray_nd, axis=0)).mean(axis=1))])
        weight_nn = motion_n[None] - motion_n[:, None] + 1e-6
        number_n = np.arange(n)
        allowed_nn = number_n[None] - number_n[:, None] >= steps
        short_nn = allowed_nn & (times_n[None] - times_n[:, None] <= self.config.longest_s + 1e-6)
        if verify:
            # Windows for right and wrong tuples are equally distributed, or the ends would tell.
            room_n = times_n - times_n[0] >= self.config.outside_s - 1e-6
            back_n = times_n[-1] - times_n >= self.config.outside_s - 1e-6
            short_nn &= (room_n & (number_n > 0))[:, None] | (back_n & (number_n < n - 1))[None]
        weight_nn = weight_nn * (short_nn if short_nn.any() else allowed_nn)
        place = int(np.searchsorted(np.cumsum(weight_nn), draw * weight_nn.sum(), side="right"))
        first, last = divmod(min(place, n * n - 1), n)
        return int(first), int(last)

    def _outside(
        self, times_n: NDArray[np.float64], gray_nd: NDArray[np.int16], first: int, last: int
    ) -> NDArray[np.int64]:
        """Return the frames before the first and after the last that make a wrong tuple."""
        gap = self.config.outside_s - 1e-6
        number_n = np.arange(len(times_n))
        outside_n = (number_n < first) & (times_n <= times_n[first] - gap)
        outside_n |= (number_n > last) & (times_n >= times_n[min(last, len(times_n) - 1)] + gap)
        found = number_n[outside_n if outside_n.any() else (number_n < first) | (number_n > last)]
        if not len(found):
            return np.array([first], np.int64)
        differences = np.min(
            [
                np.abs(gray_nd[found] - gray_nd[min(end, len(gray_nd) - 1)]).mean(axis=1)
                for end in (first, last)
            ],
            axis=0,
        )
        unlike = found[differences >= self.config.alike]
        return unlike if len(unlike) else found[[int(differences.argmax())]]

    def describe(self) -> dict[str, Any]:
        """Return the number of classes."""
        return {"num_labels": self.num_labels}
