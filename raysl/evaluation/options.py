"""Configuration of a probe run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raysl import probes
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError, unknown
from raysl.evaluation.results import ENCODERS, MOMENTUM
from raysl.extraction.encoders import Encoder, Trained
from raysl.fields import Bounds, Seed, check
from raysl.probes import Probe
from raysl.storage import Folder


@dataclass(frozen=True)
class ProbeConfig:
    """Configuration of a probe run: the probes, their protocols, and the folder of the results.

    Args:
        probes: names of probes.
        layers: layers whose features are measured; "all" for conv1, res2 to res5 (of a transformer, its blocks) and
            pooled. Pixels have only "pooled".
        encoders: encoders of a run, of "trained", "random" (the untrained backbone), "pixels", and "momentum" (the
            moving average of the backbone that methods such as BYOL, MoCo and DINO keep).
        configs: the Config of a probe by its name; a missing one has its defaults.
        bn_statistics: statistics of BatchNorm in frozen features: "reestimated" on 2,048 unlabeled train images in the
            evaluation view, or "kept", the running statistics of training, which mix all its views. Part of the
            protocol.
        out: folder for the results and the features; empty for the folder of the run. A model that is not a run needs
            it. A run in a read-only folder can be probed with it.
        image_size: side of the evaluation view in pixels, of a model that is not a run; 0 for its usual size.
        seed: seed of the probes of a model that is not a run, and of the weights of "random".
        checkpoint: a checkpoint of the run; None for the newest.
        cache: folder for features; None for one inside of the folder of the results.
        low_priority: compute beside trainers without taking their CPUs.
        in_process: compute features and probes of features in this process instead of actors and tasks of Ray.
    """

    probes: Sequence[str] = ("knn", "linear")
    layers: Sequence[str] = ("pooled",)
    encoders: Sequence[str] = ENCODERS
    configs: Mapping[str, Any] = field(default_factory=dict)
    bn_statistics: Literal["reestimated", "kept"] = "reestimated"
    out: str = ""
    image_size: Annotated[int, Bounds(0, 2**14)] = 0
    seed: Seed = 0
    checkpoint: Checkpoint | None = None
    cache: Folder | None = None
    low_priority: bool = False
    in_process: bool = False

    def __post_init__(self) -> None:
        check(self)
        for name, example in (("probes", "knn linear"), ("layers", "pooled"), ("encoders", "trained")):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty. Name at least one, as in --{name} {example}.")
        for name in self.probes:
            probes.load(name)
        for name in self.encoders:
            if name not in (*ENCODERS, MOMENTUM):
                raise unknown("encoder", name, (*ENCODERS, MOMENTUM))

    def check_encoder(self, source: Encoder, title: str) -> None:
        """Raise UserError if a model that is no run has no folder for results, or a run is given another image size."""
        if isinstance(source, Trained):
            if self.image_size:
                raise UserError(
                    f"--image-size is for a model that is not a run; {str(source.run.folder)!r} is a run and is probed "
                    "at its own image size. Remove it."
                )
        elif not self.out:
            raise UserError(f"{title} is not a run and has no folder for results. Give one with --out.")

    def ready(self) -> dict[str, tuple[Any, Probe]]:
        """Return the Config and the probe of each name."""
        made = {}
        for name in dict.fromkeys(self.probes):
            config_type, probe_type = probes.load(name)
            config = self.configs.get(name) or config_type()
            made[name] = config, probe_type(config)
        return made
