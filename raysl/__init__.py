"""raysl: self-supervised visual representation learning on Ray.

Every verb of the command line is a function here: `raysl.pretrain(data="photos", run="runs/first")`. Each name is
loaded when it is first used, so that `import raysl` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_FUNCTIONS = (
    "ingest pretrain probe features cluster clusterfit sweep report export views reproduce doctor".split()
)
_MODULE_OF = {
    **dict.fromkeys(_FUNCTIONS, "raysl.api"),
    "BackboneConfig": "raysl.backbone.network",
    "BankConfig": "raysl.contrastive.bank",
    "Callback": "raysl.run.callbacks",
    "ClusterfitConfig": "raysl.clustering.cluster_and_fit",
    "DataSet": "raysl.dataset",
    "DoctorConfig": "raysl.diagnostics",
    "ExportConfig": "raysl.model_export",
    "FeatureExtractor": "raysl.extraction.inference",
    "FeaturesConfig": "raysl.extraction.features",
    "IngestConfig": "raysl.ingestion.pipeline",
    "Interrupted": "raysl.errors",
    "KMeansConfig": "raysl.clustering.options",
    "MLflowLogger": "raysl.run.callbacks",
    "OptimConfig": "raysl.optim",
    "Pretraining": "raysl.config",
    "ReportConfig": "raysl.reporting.page",
    "ReproduceConfig": "raysl.training.reproduction",
    "Run": "raysl.run",
    "SaveConfig": "raysl.checkpoint",
    "StreamConfig": "raysl.stream.reader",
    "SweepConfig": "raysl.tuning.config",
    "load": "raysl.extraction.inference",
    "rows": "raysl.evaluation.results",
    "TensorBoardLogger": "raysl.run.callbacks",
    "tune_trainable": "raysl.tuning.trainable",
    "UserError": "raysl.errors",
    "ViewConfig": "raysl.config",
    "WandbLogger": "raysl.run.callbacks",
}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'raysl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
