"""Audio-visual correspondence: does a frame belong to a second of sound?

Arandjelovic and Zisserman 2017, "Look, listen and learn" (arXiv 1705.08168), and 2018, "Objects that sound" (arXiv
1712.06651). One network sees a frame, another hears a spectrogram of the second around it, and

    L = -log p(y | frame, sound),  y = 1 for the sound of the frame and 0 for other sounds; both have the same weight.

Other sounds come from the other clips of the batch, from another moment of the same clip, or both. "fused" classifies
the concatenated embeddings (L3-Net). "distance" classifies the Euclidean distance of unit embeddings (AVE-Net), which
makes them fit for retrieval. "map" compares the sound with every place of the frame and takes the best (AVOL-Net), and
so learns where the sound comes from; results/video shows such maps. The published accuracy of
L3-Net on Flickr-SoundNet is 78 %.

With --audio-visual.loss infonce the frame picks its sound among the others (van den Oord et al. 2018, arXiv 1807.03748,
eq. 4, over pairs as in Morgado et al. 2021, arXiv 2004.12943):

    L = -log ( exp f(frame, sound) / sum_k exp f(frame, sound_k) ),  f the score of the form, whose scale is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import Backbone, encode, encode_maps
from raysl.communication import collective
from raysl.contrastive import losses
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import projection
from raysl.pretext import Pretext
from raysl.pretext._sound import BANDS, MomentFrame, MomentSound

# No color augmentation: in the drawn clips the color decides the overtone. Little cropping, so that the box is seen.
COMMAND = (
    "raysl pretrain --data 'clips:6000?frames=9' --run RUN --method audio_visual --epochs 12 --batch-size 64 "
    "--view.image-size 64 --view.min-scale 0.8 --view.recipe plain --optim.name adamw --optim.lr 0.008 "
    "--optim.warmup 0.05"
)


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the correspondence.

    Args:
        form: "fused", "distance" or "map"; see above.
        loss: "binary", a classification of each pair, or "infonce", a choice of one sound among all.
        negatives: where the other sounds come from: "clips", "times" of the same clip, or "both".
        dim: D, size of the embeddings (paper: 128).
        window_s: length of the sound in seconds (paper: 1).
        sound_width: channels of the first layer of the sound network, a multiple of 4; the last has four times as many.
    """

    form: Literal["fused", "distance", "map"] = "map"
    loss: Literal["binary", "infonce"] = "binary"
    negatives: Literal["clips", "times", "both"] = "clips"
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    window_s: Annotated[float, Bounds(0.1, 60)] = 1.0
    sound_width: Annotated[int, Bounds(4, 1024)] = 16


class SoundBackbone(nn.Module):
    """A network from spectrograms to features. With GroupNorm, the number of workers does not matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            # The first layer halves the time, of which there is more than a sound needs.
            stride = (1, 2) if channels == 1 else 1
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.GroupNorm(4, out)]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.width = channels * BANDS // 8

    def forward(self, sounds_bchw: Tensor) -> Tensor:
        """Compute features (b, width) of uint8 spectrograms: the mean over time, with every pitch by itself."""
        maps: Tensor = self.layers(sounds_bchw.float() / 127.5 - 1)
        return maps.mean(dim=3).flatten(1)


class AudioVisual(Base):
    """The sound network, an embedding of each side, and the classifier of the pair."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        setup.no_transform("audio_visual")
        if config.sound_width % 4:
            raise UserError(
                f"--audio-visual.sound-width is {config.sound_width}; it must be a multiple of 4."
            )
        self.views: dict[str, Pretext] = {
            "frame": MomentFrame(setup.identity.source, config.window_s),
            "sound": MomentSound(config.window_s, 1 if config.negatives == "clips" else 2),
        }
        self.chance = math.log(2) if config.loss == "binary" else None
        self.sound_backbone = SoundBackbone(config.sound_width)
        # Without BatchNorm all cosines are alike at first, and the loss stays that of guessing for many steps.
        self.see = projection("bn", setup.width, config.dim)
        self.hear = projection("bn", self.sound_backbone.width, config.dim)
        if config.form == "fused":
            self.classify: nn.Module = nn.Sequential(
                nn.Linear(2 * config.dim, config.dim), nn.ReLU(inplace=True), nn.Linear(config.dim, 1)
            )
        else:
            self.classify = nn.Linear(1, 1)
            with torch.no_grad():
                # A small distance, or a large cosine, speaks for the pair.
                self.classify.weight.fill_(-4.0 if config.form == "distance" else 8.0)
                self.classify.bias.fill_(4.0 if config.form == "distance" else -2.0)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute embeddings: the frame (b, d), or (b, d, h, w) for "map"; the sounds (b, p, d)."""
        sounds_bpchw = views["sound"]
        heard = self.hear(self.sound_backbone(sounds_bpchw.flatten(0, 1)))
        if self.config.form == "map":
            seen = self._map(backbone, views["frame"])
        else:
            seen = self.see(encode(backbone, views["frame"])[:, 0])
        return {"frame": seen, "sound": heard.view(*sounds_bpchw.shape[:2], -1)}

    def _map(self, backbone: nn.Module, frames_bpchw: Tensor) -> Tensor:
        assert isinstance(backbone, Backbone)
        maps_bdhw = encode_maps(backbone, frames_bpchw)[:, 0]
        places_bhwd = maps_bdhw.movedim(1, -1)
        seen: Tensor = self.see(places_bhwd.flatten(0, 2))
        return seen.view(*places_bhwd.shape[:3], -1).movedim(-1, 1)

    def sound_map(self, backbone: nn.Module, frames_bpchw: Tensor, sounds_bpchw: Tensor) -> Tensor:
        """Return how well the sound fits each place of the frame, a cosine in -1..1: (b, h, w).

        Args:
            frames_bpchw: uint8 (b, 1, 3, s, s), as of the view "frame".
            sounds_bpchw: uint8 (b, p, 1, bands, windows), as of the view "sound"; the first is used.
        """
        heard_bd = F.normalize(self.hear(self.sound_backbone(sounds_bpchw[:, 0])).float(), dim=1)
        seen_bdhw = F.normalize(self._map(backbone, frames_bpchw).float(), dim=1)
        return torch.einsum("bdhw,bd->bhw", seen_bdhw, heard_bd)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the loss of the pairs of this worker's frames.

        The metric "accuracy" is the mean of the accuracies of right and wrong pairs for "binary", and the share of
        frames that pick their sound for "infonce".
        """
        with torch.autocast(outputs["frame"].device.type, enabled=False):
            right_b, wrong = self._scores(outputs["frame"].float(), outputs["sound"].float(), batch)
        return (_binary if self.config.loss == "binary" else _info_nce)(right_b, wrong)

    def _scores(self, seen: Tensor, sounds_bpd: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of right pairs (b,), and of each kind of wrong ones (b, k); -inf where a pair is right."""
        right_b = self._logits(seen, sounds_bpd[:, :1])[:, 0]
        wrong: list[Tensor] = []
        if self.config.negatives != "times":
            sounds_kd = collective.gather_with_gradient(sounds_bpd[:, 0].contiguous())
            logits_bk = self._logits(seen, sounds_kd[None].expand(len(seen), -1, -1))
            own_bk = batch.indices_b[:, None] == collective.gather(batch.indices_b)[None]
            wrong.append(logits_bk.masked_fill(own_bk, -torch.inf))
        if self.config.negatives != "clips":
            wrong.append(self._logits(seen, sounds_bpd[:, 1:]))
        return right_b, wrong

    def _logits(self, seen: Tensor, sounds_bkd: Tensor) -> Tensor:
        """Return the logits of every frame with k sounds: (b, k)."""
        if self.config.form == "fused":
            frames_bkd = seen[:, None].expand(-1, sounds_bkd.shape[1], -1)
            return self.classify(torch.cat([frames_bkd, sounds_bkd], dim=2))[..., 0]  # type: ignore[no-any-return]
        sounds_bkd = F.normalize(sounds_bkd, dim=2)
        seen = F.normalize(seen, dim=1)
        if self.config.form == "map":
            score_bk = torch.einsum("bdn,bkd->bkn", seen.flatten(2), sounds_bkd).amax(dim=2)
        else:
            squared_bk = (2 - 2 * torch.einsum("bd,bkd->bk", seen, sounds_bkd)).clamp(min=1e-8)
            score_bk = squared_bk.sqrt()
        return self.classify(score_bk[..., None])[..., 0]  # type: ignore[no-any-return]


def _binary(right_b: Tensor, wrong: list[Tensor]) -> Loss:
    """Return the binary cross-entropy, in which right and wrong pairs, and the kinds of wrong ones, weigh the same."""
    costs, accuracies = [], []
    for logits_bk in wrong:
        other_bk = logits_bk.isfinite()
        count_b = other_bk.sum(1).clamp(min=1)
        # Softplus of -inf is 0: the own sound does not count.
        costs.append(F.softplus(logits_bk).sum(1) / count_b)
        accuracies.append(((logits_bk < 0) & other_bk).sum(1) / count_b)
    loss_b = (F.softplus(-right_b) + torch.stack(costs).mean(0)) / 2
    accuracy_b = ((right_b > 0).float() + torch.stack(accuracies).mean(0)) / 2
    return Loss(loss_b.mean(), {"accuracy": accuracy_b.mean()})


def _info_nce(right_b: Tensor, wrong: list[Tensor]) -> Loss:
    """Return InfoNCE over the own sound and all others."""
    wrong_bk = torch.cat(wrong, dim=1)
    first_b = (right_b > wrong_bk.amax(dim=1)).float()
    return Loss(losses.info_nce(right_b, wrong_bk).mean(), {"accuracy": first_b.mean()})
