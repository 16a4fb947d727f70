"""Frozen features of a data set: by which network, of which layer, computed once and kept."""

from raysl.extraction.encoders import (
    Encode,
    Encoder,
    Pixels,
    RandomBackbone,
    Trainable,
    Trained,
    Weights,
    named,
    stages,
    tap,
    untrained,
)
from raysl.extraction.feature_tasks import extract, extract_all, pool
from raysl.extraction.heads import Heads, heads
from raysl.extraction.store import FeaturesConfig, make, view_size
from raysl.extraction.table import FeatureForm, FeatureProtocol, FeatureTable

__all__ = [
    "Encode",
    "Encoder",
    "FeatureForm",
    "FeatureProtocol",
    "FeatureTable",
    "FeaturesConfig",
    "Heads",
    "Pixels",
    "RandomBackbone",
    "Trainable",
    "Trained",
    "Weights",
    "extract",
    "extract_all",
    "heads",
    "make",
    "named",
    "pool",
    "stages",
    "tap",
    "untrained",
    "view_size",
]
