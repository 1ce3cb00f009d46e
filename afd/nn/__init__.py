"""Networks: encoders, the classifier that exposes its features, spectral layers and the projection discriminator."""

from __future__ import annotations

from afd.nn.build import MODELS, build_model
from afd.nn.classifier import FeatureClassifier, FeatureSplit, Split, split
from afd.nn.convnet import ConvNet
from afd.nn.discriminator import ProjectionDiscriminator
from afd.nn.resnet import ResNet18
from afd.nn.spectral import SpectralEmbedding, SpectralGroup, SpectralLayer, SpectralLinear
from afd.nn.spectral_state import convert_spectral_state

__all__ = ["MODELS", "ConvNet", "FeatureClassifier", "FeatureSplit", "ProjectionDiscriminator", "ResNet18", "Split"]
__all__ += ["SpectralEmbedding", "SpectralGroup", "SpectralLayer", "SpectralLinear", "build_model"]
__all__ += ["convert_spectral_state", "split"]
