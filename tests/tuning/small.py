"""A sweep of runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig
from raysl.objectives.pirl import Config as Pirl
from raysl.tuning.config import SweepConfig


def base(images: str, **changes: Any) -> Pretraining:
    """A run on `images`, with fields changed."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "workers": 1,
        "view": ViewConfig(image_size=16, recipe="plain"),
        "save": SaveConfig(every_steps=4),
        "parts": {"pirl": Pirl(num_negatives=32, dim=16)},
    }
    return Pretraining(images, "-", **{**settings, **changes})


def config(data: tuple[str, str], out: Path, **changes: Any) -> SweepConfig:
    """A sweep of two trials, one of which diverges, with fields changed."""
    settings: dict[str, Any] = {
        "vary": ("optim.lr=0.03,1e30",),
        "scheduler": "asha",
        "rungs": 2,
        "reduction": 2,
        "seeds": (0,),
        "max_concurrent": 1,
        "validation": data[1],
    }
    return SweepConfig(out=str(out), **{**settings, **changes})
