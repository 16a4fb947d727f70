"""The heads with which a method compares an image and its transformed version, from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysl.backbone import norm
from raysl.config import methods
from raysl.extraction.encoders import Encoder, Trained
from raysl.model import DatasetInfo, Model
from raysl.pretext import Pretext


@dataclass(frozen=True)
class Heads:
    """The views that a method compares, and their embeddings."""

    transform: str  # name of the pretext transform, such as "jigsaw"
    image: Pretext  # makes the view of the image
    transformed: Pretext  # makes the transformed view, with the hyperparameters of the run
    # Function from uint8 crops (b, p, 3, h, w) of both views, on the device, to their embeddings (b, d).
    embed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def heads(encoder: Encoder, device: torch.device, by_batch: bool = False) -> Heads | None:
    """Return the heads of a run with an objective that compares views; None for other runs and other encoders.

    For `by_batch` see `Encoder.load`; each view has its own statistics. Raises UserError if the checkpoint is damaged.
    """
    if not isinstance(encoder, Trained):
        return None
    method = methods.parse(encoder.run.config().method)
    invariant = getattr(methods.load_objective(method.objective)[1], "invariant_views", None)
    if invariant is None:
        return None
    model = trained_model(encoder)
    if by_batch:
        norm.use_batch_statistics(model)
    model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(image_bpchw: Tensor, transformed_bpchw: Tensor) -> tuple[Tensor, Tensor]:
        found = model(dict(zip(invariant, (image_bpchw, transformed_bpchw), strict=True)))
        image_bd, transformed_bd = (found[name].float() for name in invariant)
        return image_bd, transformed_bd

    image, transformed = (model.objective.views[name] for name in invariant)
    return Heads(method.pretext, image, transformed, embed)


def trained_model(encoder: Trained) -> Model:
    """Return the whole model of a run, in eval mode on the CPU. Raises UserError if the checkpoint is damaged."""
    config, data = encoder.run.config(), encoder.run.metadata()["data"]
    with torch.random.fork_rng(devices=[]):
        # The checkpoint holds all weights.
        model = Model(
            config.without_starting_weights(),
            DatasetInfo(data["num_images"], data["num_classes"], data["fingerprint"]),
        )
    found = encoder.checkpoint
    found.fill(model, found.network(found.state()))
    return model.eval()
