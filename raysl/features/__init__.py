"""Frozen features of a data set: by which network, of which layer, computed once and kept."""

from raysl.features.encoders import Encode, Encoder, Pixels, RandomTrunk, Trained, Untrained, Weights, named
from raysl.features.extraction import extract, extract_all, pool
from raysl.features.folder import FeaturesConfig, make
from raysl.features.table import FeatureForm, FeatureProtocol, FeatureTable, labels

__all__ = [
    "Encode",
    "Encoder",
    "FeatureForm",
    "FeatureProtocol",
    "FeatureTable",
    "FeaturesConfig",
    "Pixels",
    "RandomTrunk",
    "Trained",
    "Untrained",
    "Weights",
    "extract",
    "extract_all",
    "labels",
    "make",
    "named",
    "pool",
]
