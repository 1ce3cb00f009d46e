"""The networks that afd builds by name, and the recipe by which one that was saved is built again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from afd.errors import InputError, one_of, whole
from afd.nn.classifier import FeatureClassifier, FeatureSplit
from afd.nn.encoders import VGG, ConvNet, Encoder, PreActResNet, ResNet18, WideResNet
from afd.nn.modes import without_wrappers
from afd.nn.normalized import Normalized, Stats, normalized, stats_from, stats_of
from afd.nn.resnet50 import ResNet50
from afd.nn.sources import SOURCES, Shape, build_foreign, source_of, with_new_head

ModelName = Literal[
    "convnet", "resnet18", "resnet50", "preactresnet18", "wideresnet28-10", "wideresnet34-10", "vgg11-bn", "vgg13-bn",
    "vgg16-bn", "vgg19-bn",
]  # fmt: skip
MODELS: tuple[str, ...] = get_args(ModelName)


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
    name: str,
    image_shape: Shape,
    num_classes: int,
    width: int,
    activation: str = "relu",
    *,
    input_stats: Stats | None = None,
) -> FeatureClassifier:
    """A freshly initialised classifier.

    Args:
        name: one of `MODELS`, whose encoders are in `afd.nn.encoders`.
        image_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        width: filters of the first layer; a WideResNet's factor comes on top, so that the paper's is 16.
        activation: "relu", "silu" or "softplus" (of beta 1), everywhere in the network.
        input_stats: means and deviations that images in [0, 1] are normalised by (`Normalized`); None for none.

    Raises:
        InputTypeError: the width is no whole number.
        InputError: unknown name or activation, a width below 1, or images that are too small for the network.
    """
    one_of("model", name, MODELS)
    whole("width", width, 1)
    encoder = _encoder(name, image_shape, width, activation)
    model = FeatureClassifier(normalized(encoder, input_stats), encoder.num_features, num_classes)
    if isinstance(encoder, WideResNet):
        nn.init.zeros_(model.classifier.bias)
    model.recipe = {
        "name": name, "shape": list(image_shape), "classes": num_classes, "width": width, "activation": activation,
    }  # fmt: skip
    return model


def build_named(
    name: str,
    image_shape: Shape,
    num_classes: int,
    *,
    width: int = 64,
    activation: str = "relu",
    normalize: bool = True,
    input_stats: Stats | None = None,
    new_head: int | None = None,
    drop_path: float = 0.0,
    described: Mapping[str, Any] | None = None,
) -> FeatureClassifier | FeatureSplit:
    """A freshly initialised network of any name that `check_model` knows, split, with the recipe to build it again.

    Args:
        name: one of `MODELS`; ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``; or ``package.module:function``.
        image_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        width: as of `build_model`; of no matter to other networks.
        activation: likewise; other networks have their own, so that it must be "relu".
        normalize: whether features are scaled to length 1. In a network that is not afd's own, for the discriminator
            alone, so that it stays the function that it is.
        input_stats: as of `build_model`.
        new_head: has what a function returns a fresh last linear layer, of so many classes; other networks have one.
        drop_path: stochastic depth of a network that has it, the rate of its last block.
        described: of `build_foreign`.

    Raises:
        ExtraMissingError: the library is not installed.
        UnusableModelError: there is no such network, or it cannot be built for such images.
        InputError: a setting that such a network does not have, a head of another number of classes, or as
            `build_model`.
    """
    check_model(name)
    if new_head is not None and new_head != num_classes:
        raise InputError(f"new-head is {new_head}, but the data have {num_classes} classes; it must be as many")
    if name in MODELS:
        if drop_path:
            raise InputError(f"drop-path is {drop_path:g}, but model {name} has no stochastic depth")
        own = build_model(name, image_shape, num_classes, width, activation, input_stats=input_stats)
        own.normalize = normalize
        return own
    if activation != "relu":
        raise InputError(f"activation is {activation}, but model {name} has its own")
    network, found = build_foreign(name, image_shape, num_classes, drop_path=drop_path, described=described)
    if new_head is not None and not source_of(name)[0]:
        network = with_new_head(network, new_head)
    network = without_wrappers(network)
    split_already = isinstance(network, FeatureClassifier | FeatureSplit)
    if input_stats is not None and (split_already or isinstance(network, Normalized)):
        told = "split already; split an afd.nn.Normalized there" if split_already else "which normalises images itself"
        raise InputError(f"input-stats are given, but model {name} returns a {type(network).__name__}, {told}")
    if isinstance(network, FeatureClassifier):  # a function that splits by itself says all by itself
        return network
    scaled = None if normalize else False
    model = network if split_already else FeatureSplit(normalized(network, input_stats), normalize=scaled)
    assert isinstance(model, FeatureSplit)
    model.recipe = {
        "name": name, "shape": list(image_shape), "classes": num_classes, "new_head": new_head, "drop_path": drop_path,
        "described": found, "input_stats": stats_of(model.model) if input_stats is not None else None,
    }  # fmt: skip
    model.built = _layers(model.model)
    return model


def _encoder(name: str, shape: tuple[int, int, int], width: int, activation: str) -> Encoder:
    kind, *numbers = re.findall(r"[a-z]+|\d+", name)
    if kind == "convnet":
        return ConvNet(shape, width, activation=activation)
    if name == "resnet50":
        return ResNet50(shape[0], width, activation)
    if kind == "resnet":
        return ResNet18(shape[0], width, activation)
    if kind == "preactresnet":
        return PreActResNet(shape[0], width, activation=activation)
    if kind == "wideresnet":
        return WideResNet(shape[0], int(numbers[0]), int(numbers[1]), width, activation)
    return VGG(shape, int(numbers[0]), width, activation)


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """What `from_recipe` builds a model from, in plain JSON.

    None for a model that neither `build_model` nor `build_named` made, or whose layers are other ones by now: what
    would be built from its recipe might take its weights and compute something else.
    """
    if isinstance(model, FeatureSplit):
        return _foreign_recipe(model)
    if type(model) is not FeatureClassifier or model.recipe is None or not isinstance(model.classifier, nn.Linear):
        return None
    recipe = {**model.recipe, "classes": model.classifier.out_features, "normalize": model.normalize}
    if isinstance(model.encoder, Normalized):
        recipe["input_stats"] = stats_of(model.encoder)
    with torch.device("meta"):  # which takes no memory, and draws nothing from the generators
        fresh = from_recipe(recipe)
    return recipe if _layers(fresh) == _layers(model) else None


def _foreign_recipe(model: FeatureSplit) -> dict[str, Any] | None:
    """That of a network of `build_named`, whose layers were noted then: not all can be built without weights."""
    if model.recipe is None or _layers(model.model) != model.built:
        return None
    plain = {"normalize": model.normalize is not False}
    return {name: one for name, one in {**model.recipe, **plain}.items() if one is not None}


def from_recipe(recipe: Mapping[str, Any]) -> FeatureClassifier | FeatureSplit:
    """A fresh model of a recipe.

    Raises:
        InputError: no model can be made from it.
        ExtraMissingError, UnusableModelError: it is of a library, or a function, that is not here.
        KeyError, TypeError, ValueError: it is no recipe.
    """
    channels, height, width = recipe["shape"]
    shape, stats = (channels, height, width), stats_from(recipe.get("input_stats"))
    if ":" in recipe["name"]:
        return build_named(
            recipe["name"], shape, recipe["classes"], normalize=recipe["normalize"], input_stats=stats,
            new_head=recipe.get("new_head"), drop_path=recipe.get("drop_path", 0.0), described=recipe.get("described"),
        )  # fmt: skip
    activation = recipe.get("activation", "relu")  # as all were before recipes said so
    model = build_model(recipe["name"], shape, recipe["classes"], recipe["width"], activation, input_stats=stats)
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
