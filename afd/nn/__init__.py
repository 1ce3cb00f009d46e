"""Networks: encoders, the classifier that exposes its features, spectral layers and the projection discriminator."""

from __future__ import annotations

from afd.nn.classifier import FeatureClassifier, FeatureSplit, Split, split
from afd.nn.encoders import ACTIVATIONS, VGG, ConvNet, Encoder, PreActResNet, ResNet18, WideResNet
from afd.nn.freezing import freeze
from afd.nn.networks import MODELS, build_model, build_named
from afd.nn.normalized import Normalized
from afd.nn.resnet50 import ResNet50
from afd.nn.spectral import (
    ProjectionDiscriminator,
    SpectralEmbedding,
    SpectralGroup,
    SpectralLayer,
    SpectralLinear,
    convert_spectral_state,
)

__all__ = ["ACTIVATIONS", "MODELS", "VGG", "ConvNet", "Encoder", "FeatureClassifier", "FeatureSplit", "Normalized"]
__all__ += ["PreActResNet", "ProjectionDiscriminator", "ResNet18", "ResNet50", "SpectralEmbedding", "SpectralGroup"]
__all__ += ["SpectralLayer", "SpectralLinear", "Split", "WideResNet", "build_model", "build_named"]
__all__ += ["convert_spectral_state", "freeze", "split"]
