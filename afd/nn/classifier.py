"""Classifiers split where AFD needs it: features F(x), and the linear layer C that they enter.

`FeatureClassifier` is built in two parts; `FeatureSplit` finds them in any module. Both offer what `Split` lists.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import InputError, InputTypeError


class Split(Protocol):
    """A classifier C(F(x)) whose features can be had: images [N, ...] -> logits [N, num_classes]."""

    num_features: int
    num_classes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""

    def features(self, x: Tensor) -> Tensor:
        """Features [N, num_features]."""

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one pass."""


class FeatureClassifier(nn.Module):
    """C(F(x)): encoder, normalisation of its features to length 1, linear classifier (Bashivan et al. 2021, section 3).

    Args:
        encoder: maps images [N, C, H, W] to raw features [N, num_features].
        num_features: width of the features.
        num_classes: number of logits.
        normalize: whether features are scaled to length 1; saved with the model.
    """

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int, normalize: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(num_features, num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.normalize = normalize

    def features(self, x: Tensor) -> Tensor:
        """Features [N, num_features] of images [N, C, H, W] in [0, 1]; of length 1 if the model normalises them."""
        raw: Tensor = self.encoder(x)
        return unit_length(raw) if self.normalize else raw

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, num_features] and logits [N, num_classes] from one pass."""
        z = self.features(x)
        return z, self.classifier(z)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1]."""
        return self.features_and_logits(x)[1]


class Entrance:
    """Stands before the layer that features enter: scales them to length 1 if asked to, and notes them on request.

    It is a forward pre-hook that stays on the layer, because the scaling is part of what the trained model computes.
    """

    def __init__(self, normalize: bool) -> None:
        self.normalize = normalize
        self.recording = False
        self.seen: Tensor | None = None

    def __call__(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the layer is given instead of `inputs`."""
        z = inputs[0]
        if self.normalize:
            z = unit_length(z)
        if self.recording:
            self.seen = z
        return (z, *inputs[1:])


class FeatureSplit(nn.Module):
    """Any classifier as C(F(x)): its features are what enters one of its linear layers.

    The wrapped module stays the user's own: same parameters, same state_dict, and with `normalize` it computes the
    normalised function itself, called through this wrapper or not. Its output may be the logits or an object that has
    them as ``.logits``.

    Args:
        model: images [N, ...] -> logits [N, num_classes].
        feature_layer: name of the linear layer (as in `model.named_modules()`) that the features enter; by default the
            last one.
        normalize: whether features are scaled to length 1, as in the paper.

    Raises:
        InputError: the model has no linear layer, or none of that name.
    """

    def __init__(self, model: nn.Module, feature_layer: str | None = None, normalize: bool = True) -> None:
        super().__init__()
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if not linear:
            raise InputError(f"model is a {type(model).__name__} without a linear layer, which features would enter")
        self.feature_layer = list(linear)[-1] if feature_layer is None else feature_layer
        if self.feature_layer not in linear:
            raise InputError(f"feature_layer is {feature_layer!r}; the model's linear layers are {', '.join(linear)}")
        self.model = model
        self.num_features = linear[self.feature_layer].in_features
        self.num_classes = list(linear.values())[-1].out_features
        self.entrance = _entrance_of(linear[self.feature_layer], normalize)

    @property
    def normalize(self) -> bool:
        """Whether features are scaled to length 1."""
        return self.entrance.normalize

    def features(self, x: Tensor) -> Tensor:
        """Features [N, num_features]."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, num_features] and logits [N, num_classes] from one pass.

        Raises:
            InputError: the layer was not called, or not with [N, num_features].
        """
        entrance = self.entrance
        entrance.recording = True
        try:
            logits = self(x)
            z = entrance.seen
        finally:
            entrance.recording, entrance.seen = False, None
        if z is None:
            raise InputError(f"feature_layer is {self.feature_layer!r}, which the model's forward did not call")
        if z.dim() != 2:
            raise InputError(
                f"features of shape {list(z.shape)} enter {self.feature_layer!r}; they must be [N, {self.num_features}]"
            )
        return z, logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        output = self.model(x)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise InputTypeError(f"the model returned a {type(output).__name__}; it must be logits or have .logits")
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise InputError(f"the model returned shape {list(logits.shape)}; it must be [N, {self.num_classes}]")
        return logits


def split(model: nn.Module, feature_layer: str | None = None, normalize: bool | None = None) -> Any:
    """`model` as a `Split`; one that is split already is returned as it is.

    Args:
        model: any classifier.
        feature_layer: as in `FeatureSplit`.
        normalize: as in `FeatureSplit`; None for True, or what a model that is split already does.

    Raises:
        InputError: as in `FeatureSplit`, or the model is split already in another way.
    """
    if not isinstance(model, (FeatureClassifier, FeatureSplit)):
        return FeatureSplit(model, feature_layer, normalize is not False)
    if normalize not in (None, model.normalize):
        raise InputError(f"normalize is {normalize}; the model was built with normalize={model.normalize}")
    if feature_layer not in (None, getattr(model, "feature_layer", "classifier")):
        raise InputError(f"feature_layer is {feature_layer!r}; the model is a {type(model).__name__}, already split")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside a `FeatureSplit`; any other module as it is."""
    return model.model if isinstance(model, FeatureSplit) else model


def unit_length(z: Tensor) -> Tensor:
    """Rows of length 1, in float32 under autocast; a row of zeros stays zero."""
    return F.normalize(z.float() if torch.is_autocast_enabled(z.device.type) else z, dim=-1)


torch.fx.wrap("unit_length")  # a symbolic trace of the model must not look into it: its branch asks for a real tensor


def _entrance_of(layer: nn.Linear, normalize: bool) -> Entrance:
    """The layer's entrance: the one it has from an earlier split, with its setting renewed, or a new one."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, Entrance):
            hook.normalize = normalize
            return hook
    entrance = Entrance(normalize)
    layer.register_forward_pre_hook(entrance)
    return entrance
