"""Frozen features of images: encoders, their layers, and passes over data sets."""

from raysl.extraction.encoders import (
    Encoder,
    NetworkEncoder,
    Pixels,
    RandomBackbone,
    Trained,
    Weights,
    check_encoder,
    check_layers,
    encoder_by_name,
    stages,
    untrained,
    view_size,
)
from raysl.extraction.exports import SETTINGS
from raysl.extraction.feature_tasks import FeatureProtocol, actor_resources, extract_all
from raysl.extraction.features import FeaturesConfig, compute_features
from raysl.extraction.heads import Heads, heads
from raysl.extraction.inference import FeatureExtractor, load
from raysl.extraction.layers import Encode, EncodeMaps, feature_spec
from raysl.extraction.reestimated import Reestimated, load_maps
from raysl.extraction.reestimated import load as load_reestimated
from raysl.storage.feature_files import FeatureForm
from raysl.storage.feature_store import FeatureStore
