"""The networks that afd builds by name, and the recipe by which one that was saved is built again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afd.errors import one_of
from afd.nn.classifier import FeatureClassifier
from afd.nn.convnet import ConvNet
from afd.nn.resnet import ResNet18

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
