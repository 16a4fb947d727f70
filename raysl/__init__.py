"""raysl: self-supervised visual representation learning on Ray.

The names most used; each is loaded when it is first asked for, so that `import raysl` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DataSet": "raysl.dataset",
    "Folder": "raysl.storage",
    "Method": "raysl.methods",
    "OptimConfig": "raysl.optim",
    "Plan": "raysl.stream.plan",
    "Pretraining": "raysl.config",
    "Run": "raysl.run",
    "SaveConfig": "raysl.checkpoint",
    "Stream": "raysl.stream.reader",
    "BackboneConfig": "raysl.backbone.network",
    "UserError": "raysl.errors",
    "View": "raysl.stream.views",
    "ViewConfig": "raysl.config",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raysl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
