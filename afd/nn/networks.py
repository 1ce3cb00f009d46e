"""The networks that afd builds by name, and the recipe by which one that was saved is built again."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import torch
from torch import nn

from afd.errors import InputError, one_of, whole
from afd.nn.classifier import FeatureClassifier
from afd.nn.encoders import VGG, ConvNet, Encoder, PreActResNet, ResNet18, WideResNet

ModelName = Literal[
    "convnet", "resnet18", "preactresnet18", "wideresnet28-10", "wideresnet34-10", "vgg11-bn", "vgg13-bn", "vgg16-bn",
    "vgg19-bn",
]  # fmt: skip
MODELS: tuple[str, ...] = get_args(ModelName)


SOURCES = ("timm", "torchvision", "hf")  # of networks that are not afd's own


def check_model(name: str) -> str:
    """The name of a network, found to be one: of `MODELS`, ``timm:NAME`` and such, or ``package.module:function``.

    Raises:
        InputError: it is none.
    """
    source, _, rest = name.partition(":")
    if name not in MODELS and not (source and rest):
        raise InputError(
            f"model is {name!r}; allowed are {', '.join(MODELS)}, {', '.join(f'{one}:NAME' for one in SOURCES)} and "
            "package.module:function"
        )
    return name


def own_width(name: str) -> int | None:
    """The width that a network has in its paper, which a data set does not change; None for AFD's own two."""
    return None if name in ("convnet", "resnet18") else 16 if name.startswith("wideresnet") else 64


def build_model(
    name: str, image_shape: tuple[int, int, int], num_classes: int, width: int, activation: str = "relu"
) -> FeatureClassifier:
    """A freshly initialised classifier.

    Args:
        name: one of `MODELS`, whose encoders are in `afd.nn.encoders`.
        image_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        width: filters of the first layer; a WideResNet's factor comes on top, so that the paper's is 16.
        activation: "relu", "silu" or "softplus" (of beta 1), everywhere in the network.

    Raises:
        InputTypeError: the width is no whole number.
        InputError: unknown name or activation, a width below 1, or images that are too small for the network.
    """
    one_of("model", name, MODELS)
    whole("width", width, 1)
    encoder = _encoder(name, image_shape, width, activation)
    model = FeatureClassifier(encoder, encoder.num_features, num_classes)
    if isinstance(encoder, WideResNet):
        nn.init.zeros_(model.classifier.bias)
    model.recipe = {
        "name": name, "shape": list(image_shape), "classes": num_classes, "width": width, "activation": activation,
    }  # fmt: skip
    return model


def _encoder(name: str, shape: tuple[int, int, int], width: int, activation: str) -> Encoder:
    kind, *numbers = re.findall(r"[a-z]+|\d+", name)
    if kind == "convnet":
        return ConvNet(shape, width, activation=activation)
    if kind == "resnet":
        return ResNet18(shape[0], width, activation)
    if kind == "preactresnet":
        return PreActResNet(shape[0], width, activation=activation)
    if kind == "wideresnet":
        return WideResNet(shape[0], int(numbers[0]), int(numbers[1]), width, activation)
    return VGG(shape, int(numbers[0]), width, activation)


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
    activation = recipe.get("activation", "relu")  # as all were before recipes said so
    model = build_model(recipe["name"], (channels, height, width), recipe["classes"], recipe["width"], activation)
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
            vars(module).get("activation"),  # a function, in a ResNet18 of ReLUs
        )
        for name, module in model.named_modules()
    ]
