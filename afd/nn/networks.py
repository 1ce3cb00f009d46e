"""The networks that afd builds by name, and the recipe by which one that was saved is built again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import InputError, one_of
from afd.nn.classifier import FeatureClassifier


class ConvNet(nn.Module):
    """Three 3x3 convolutions (two of them halving the image) and a linear layer, with ReLU after each.

    Args:
        image_shape: (channels, height, width); height and width at least 4.
        width: filters of the first convolution; the others have twice as many.
        num_features: length of the feature vector.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32, num_features: int = 128) -> None:
        super().__init__()
        channels, height, width_in = image_shape
        if min(height, width_in) < 4:
            raise InputError(f"image_shape is {image_shape}; height and width must be at least 4")
        cells = ((height + 3) // 4) * ((width_in + 3) // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(2 * width * cells, num_features),
            nn.ReLU(inplace=True),
        )
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, num_features]."""
        features: Tensor = self.layers(x)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The encoder of ResNet-18: stem, four stages of two blocks, global average pooling.

    The paper's networks are ``width=64`` (512 features) for colour images and ``width=16`` for MNIST. Four stages end
    in 8 * width features, 128 at width 16, where the paper counts 64.

    Args:
        in_channels: channels of an image.
        width: filters of the first stage, doubled in each later one.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 8 * width] of images [N, in_channels, H, W]."""
        out = self.stages(F.relu(self.bn(self.stem(x))))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)


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
    model = FeatureClassifier(encoder, encoder.num_features, num_classes)
    model.recipe = {"name": name, "shape": list(image_shape), "classes": num_classes, "width": width}
    return model


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """What `from_recipe` builds a model from, in plain JSON.

    None for a model that `build_model` did not make, or whose layers are other ones by now: what would be built from
    its recipe might take its weights and compute something else.
    """
    if type(model) is not FeatureClassifier or model.recipe is None or not isinstance(model.classifier, nn.Linear):
        return None
    recipe = {**model.recipe, "classes": model.classifier.out_features, "normalize": model.normalize}
    with torch.device("meta"):  # which takes no memory, and draws nothing from the generators
        fresh = from_recipe(recipe)
    return recipe if _layers(fresh) == _layers(model) else None


def from_recipe(recipe: dict[str, Any]) -> FeatureClassifier:
    """A fresh model of a recipe.

    Raises:
        InputError: no model can be made from it.
        KeyError, TypeError, ValueError: it is no recipe.
    """
    channels, height, width = recipe["shape"]
    model = build_model(recipe["name"], (channels, height, width), recipe["classes"], recipe["width"])
    model.normalize = recipe["normalize"]
    return model


def _layers(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a model consists of: its modules' names, kinds and settings, and whatever else takes part in a pass."""
    return [
        (
            name,
            nn.BatchNorm2d if type(module) is nn.SyncBatchNorm else type(module),  # which computes the same, for itself
            module.extra_repr(),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            "forward" in vars(module),
        )
        for name, module in model.named_modules()
    ]
