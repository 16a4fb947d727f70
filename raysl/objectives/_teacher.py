"""A trained run as a classifier: its backbone and its linear classifier, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysl import checkpoint
from raysl.backbone import network as networks
from raysl.backbone.network import BackboneConfig, encode
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError
from raysl.storage import Folder

# Written by `raysl.run`, which stands above this room.
_PASSPORT = "metadata.json"
_CLASSIFIER = "objective.classify."
# Of a predictor of several crops, whose classifier takes what this makes of all of them.
_PROJECTION = "objective.project.0."


@dataclass(frozen=True)
class Teacher:
    """A frozen network in evaluation mode. Not a module: what holds it neither trains nor saves it.

    Args:
        network: the backbone, and after it the classifier.
        method: by which it was trained, such as "predict-rotation".
        facts: JSON, for the metadata: which run, step and weights.
    """

    network: nn.ModuleList
    method: str
    facts: dict[str, Any]

    @property
    def num_classes(self) -> int:
        classify: Any = self.network[1]
        return int(classify.out_features)

    @torch.no_grad()
    def logits(self, views_bpchw: Tensor) -> Tensor:
        """Logits (b, p, classes) of every crop, on the device of the views."""
        encoder, classify = self.network.to(views_bpchw.device)
        logits_bpk: Tensor = classify(encode(encoder, views_bpchw))
        return logits_bpk


def load(run: str, step: int = 0) -> Teacher:
    """The teacher that a run has become.

    Args:
        run: its folder, a path or a URI.
        step: of one of its checkpoints; 0 for the newest.

    Raises:
        UserError: there is no run, or no such checkpoint; it is damaged; or its objective has no classifier of single
            views.
    """
    folder = Folder(run)
    if not folder.exists(_PASSPORT):
        raise UserError(
            f"No run at {run!r} that could teach: there is no {_PASSPORT}. Give the folder of a run."
        )
    try:
        config = folder.read_json(_PASSPORT)["config"]
        method, encoder = str(config["method"]), networks.build(BackboneConfig(**config["backbone"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The metadata of the run at {run!r} is damaged: {error!r}. Restore {_PASSPORT} from a copy."
        ) from error
    found = _checkpoint(run, folder / "checkpoints", step)
    state: dict[str, Tensor] = found.state()["network"]
    encoder.load_state_dict(found.backbone_state())
    weight_kd = state.get(f"{_CLASSIFIER}weight")
    joins_crops = f"{_PROJECTION}weight" in state
    if weight_kd is None or joins_crops or weight_kd.shape[1] != encoder.width:
        raise UserError(
            f"The run at {run!r} cannot teach: it was trained by {method!r}, which has no classifier of single views "
            "whose answers could be learned. Give a run of supervised, clusterfit or distill, or of predict with a "
            "transform of one crop, such as predict-rotation."
        )
    classify = nn.Linear(weight_kd.shape[1], weight_kd.shape[0])
    classify.load_state_dict({name: state[f"{_CLASSIFIER}{name}"] for name in ("weight", "bias")})
    facts = {"run": str(folder), "method": method, "step": found.step, "crc32": found.crc32()}
    return Teacher(nn.ModuleList([encoder, classify]).eval().requires_grad_(False), method, facts)


def _checkpoint(run: str, folder: Folder, step: int) -> Checkpoint:
    there = checkpoint.complete(folder)
    found = next((c for c in reversed(there) if step in (0, c.step)), None)
    if found is None:
        steps = ", ".join(str(c.step) for c in there) or "none"
        raise UserError(
            f"The run at {run!r} has no complete checkpoint of step {step or 'any'}. Those that it has: {steps}."
        )
    return found
