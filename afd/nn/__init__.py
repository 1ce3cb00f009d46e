"""Networks: encoders, the classifier that exposes its features, spectral layers and the projection discriminator."""

from __future__ import annotations

from afd.nn.classifier import FeatureClassifier, FeatureSplit, Split, split
from afd.nn.encoders import ACTIVATIONS, VGG, ConvNet, Encoder, PreActResNet, ResNet18, WideResNet
from afd.nn.networks import MODELS, build_model
from afd.nn.spectral import (
    ProjectionDiscriminator,
    SpectralEmbedding,
    SpectralGroup,
    SpectralLayer,
    SpectralLinear,
    convert_spectral_state,
)

__all__ = ["ACTIVATIONS", "MODELS", "VGG", "ConvNet", "Encoder", "FeatureClassifier", "FeatureSplit", "PreActResNet"]
__all__ += ["ProjectionDiscriminator", "ResNet18", "SpectralEmbedding", "SpectralGroup", "SpectralLayer"]
__all__ += ["SpectralLinear", "Split", "WideResNet", "build_model", "convert_spectral_state", "split"]
