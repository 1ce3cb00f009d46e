"""Networks: encoders, the classifier that exposes its features, spectral layers and the projection discriminator."""

from __future__ import annotations

from afd.nn.classifier import FeatureClassifier, FeatureSplit, Split, split
from afd.nn.networks import MODELS, ConvNet, ResNet18, build_model
from afd.nn.spectral import (
    ProjectionDiscriminator,
    SpectralEmbedding,
    SpectralGroup,
    SpectralLayer,
    SpectralLinear,
    convert_spectral_state,
)

__all__ = ["MODELS", "ConvNet", "FeatureClassifier", "FeatureSplit", "ProjectionDiscriminator", "ResNet18", "Split"]
__all__ += ["SpectralEmbedding", "SpectralGroup", "SpectralLayer", "SpectralLinear", "build_model"]
__all__ += ["convert_spectral_state", "split"]
