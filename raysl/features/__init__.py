"""Frozen features of a data set: by which network, of which layer, computed once and kept."""

from raysl.features.encoders import (
    Encode,
    Encoder,
    Pixels,
    RandomTrunk,
    Trainable,
    Trained,
    Weights,
    named,
    stages,
    tap,
    untrained,
)
from raysl.features.extraction import extract, extract_all, pool
from raysl.features.folder import FeaturesConfig, make, view_size
from raysl.features.heads import Heads, heads
from raysl.features.table import FeatureForm, FeatureProtocol, FeatureTable

__all__ = [
    "Encode",
    "Encoder",
    "FeatureForm",
    "FeatureProtocol",
    "FeatureTable",
    "FeaturesConfig",
    "Heads",
    "Pixels",
    "RandomTrunk",
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
