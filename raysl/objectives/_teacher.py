"""Load a trained run as a classifier: its backbone and its linear classifier, frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raysl import checkpoint, plugins
from raysl.backbone import network as networks
from raysl.backbone.network import BackboneConfig, encode
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError, explained
from raysl.storage import Folder

# The file that `raysl.run` writes; this room may not import that one.
_METADATA = "metadata.json"
_CLASSIFIER = "objective.classify."
# A predictor of several crops has this layer before its classifier.
_PROJECTION = "objective.project.0."


@dataclass(frozen=True)
class Teacher:
    """A frozen network in evaluation mode. It is no module, so that an objective neither trains nor saves it.

    Args:
        network: the backbone and the classifier.
        method: the method that trained it, such as "predict-rotation".
        metadata: JSON for the run's metadata: run, step and checksum of the weights.
    """

    network: nn.ModuleList
    method: str
    metadata: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        classify: Any = self.network[1]
        return int(classify.out_features)

    @torch.no_grad()
    def logits(self, views_bpchw: Tensor) -> Tensor:
        """Return logits (b, p, classes) of every crop, on the device of the views."""
        encoder, classify = self.network.to(views_bpchw.device)
        logits_bpk: Tensor = classify(encode(encoder, views_bpchw))
        return logits_bpk


def load(run: str, step: int = 0) -> Teacher:
    """Load the teacher from a run.

    Args:
        run: folder of the run, a path or a URI.
        step: step of the checkpoint; 0 for the newest.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, or its objective has no classifier of single
            views.
    """
    folder = Folder(run)
    if not folder.exists(_METADATA):
        raise UserError(
            f"There is no run at {run!r} to load a teacher from: {_METADATA} is missing. Give the folder of a run."
        )
    what = f"The metadata of the run at {run!r} is damaged"
    with explained(what, f"Restore {_METADATA} from a copy.", ValueError, KeyError, TypeError, show=repr):
        metadata = folder.read_json(_METADATA)
        config = metadata["config"]
        backbone = BackboneConfig(**config["backbone"])
        places = plugins.check_trusted(backbone.modules(), run, metadata.get("sources", {}))
        backbone = replace(backbone, name=plugins.with_current_path(backbone.name, places))
        method, encoder = str(config["method"]), networks.build(backbone)
    found = _checkpoint(run, folder / "checkpoints", step)
    state = found.network(found.state())
    found.fill(encoder, found.backbone_state())
    weight_kd = state.get(f"{_CLASSIFIER}weight")
    joins_crops = f"{_PROJECTION}weight" in state
    if weight_kd is None or joins_crops or weight_kd.shape[1] != encoder.width:
        raise UserError(
            f"The run at {run!r} cannot be a teacher: its method {method!r} has no classifier of single views. Give a "
            "run of supervised, clusterfit or distill, or of predict with a transform of one crop, such as "
            "predict-rotation."
        )
    classify = nn.Linear(weight_kd.shape[1], weight_kd.shape[0])
    classify.load_state_dict({name: state[f"{_CLASSIFIER}{name}"] for name in ("weight", "bias")})
    metadata = {"run": str(folder), "method": method, "step": found.step, "crc32": found.crc32()}
    return Teacher(nn.ModuleList([encoder, classify]).eval().requires_grad_(False), method, metadata)


def _checkpoint(run: str, folder: Folder, step: int) -> Checkpoint:
    there = checkpoint.complete(folder)
    found = next((c for c in reversed(there) if step in (0, c.step)), None)
    if found is None:
        wanted = f"step {step}" if step else "any step"
        steps = ", ".join(str(c.step) for c in there) or "none"
        raise UserError(
            f"The run at {run!r} has no complete checkpoint of {wanted}. It has checkpoints of steps: {steps}."
        )
    return found
