"""Networks: encoders, the classifier that exposes its features, spectral layers and the projection discriminator."""

from __future__ import annotations

from afd.errors import one_of
from afd.nn.classifier import FeatureClassifier, FeatureSplit, Split, split
from afd.nn.convnet import ConvNet
from afd.nn.discriminator import ProjectionDiscriminator
from afd.nn.resnet import ResNet18
from afd.nn.spectral import SpectralEmbedding, SpectralGroup, SpectralLayer, SpectralLinear
from afd.nn.spectral_state import convert_spectral_state

__all__ = ["MODELS", "ConvNet", "FeatureClassifier", "FeatureSplit", "ProjectionDiscriminator", "ResNet18", "Split"]
__all__ += ["SpectralEmbedding", "SpectralGroup", "SpectralLayer", "SpectralLinear", "build_model"]
__all__ += ["convert_spectral_state", "split"]

MODELS = ("convnet", "resnet18")


def build_model(name: str, image_shape: tuple[int, int, int], num_classes: int, width: int) -> FeatureClassifier:
    """A freshly initialised classifier.

    Args:
        name: "convnet" or "resnet18".
        image_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        width: filters of the first layer.

    Raises:
        InputError: unknown name.
    """
    one_of("model", name, MODELS)
    encoder = ConvNet(image_shape, width) if name == "convnet" else ResNet18(image_shape[0], width)
    return FeatureClassifier(encoder, encoder.num_features, num_classes)
