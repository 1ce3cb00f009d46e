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
from afd.nn import outputs
from afd.nn.modes import without_wrappers
from afd.nn.outputs import logits_of

# the entry of a state_dict by which a model that scales its features refuses to be taken for one that does not
MARKER = "scales_features_to_length_1__load_with_afd_training_load_weights"


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

    Attributes:
        plain_layout: whether training passes must show it images in torch's usual layout, whatever `Execution` says.
        recipe: what `afd.nn.build_model` made it from, in plain JSON; None if that did not.
    """

    recipe: dict[str, Any] | None = None

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int, normalize: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(num_features, num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.normalize = normalize
        self.plain_layout = False

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
    """Stands before the layer that features enter: notes them on request, and may scale them to length 1.

    It is a forward pre-hook that stays on the layer, because scaling is part of what the trained model computes.

    Attributes:
        normalize: whether features are scaled to length 1: True also for the layer, None for the discriminator alone.
        recording: whether to note what enters.
        seen: what has entered since, as it entered.
    """

    def __init__(self) -> None:
        self.normalize: bool | None = None
        self.recording = False
        self.seen: list[Tensor] = []

    def __call__(
        self, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the layer is given instead of its inputs, of which the features are the first, named or not."""
        if inputs:
            return (self.entered(inputs[0]), *inputs[1:]), named
        if not named:
            return None  # the layer will say what it misses
        first = "input" if "input" in named else next(iter(named))
        return inputs, {**named, first: self.entered(named[first])}

    def entered(self, z: Tensor) -> Tensor:
        """Features as the layer is given them."""
        if self.normalize:
            z = unit_length(z)
        if self.recording:
            self.seen.append(z)
        return z


class FeatureSplit(nn.Module):
    """Any classifier as C(F(x)): its features are what enters one of its linear layers.

    The wrapped module stays the user's own, with the same parameters. Its output may be whatever
    `afd.nn.outputs.logits_of` finds logits in.

    Args:
        model: images [N, ...] -> logits [N, num_classes].
        feature_layer: name of the linear layer (as in `model.named_modules()`) that the features enter; by default the
            last one that is registered, which `settle` compares with what the model does.
        normalize: whether features are scaled to length 1. None: for the discriminator alone, so that the model stays
            the function that it is. True: for the layer that they enter, too, as in the paper: the model itself then
            computes another function, called through this wrapper or not, and its state_dict says so by an entry
            named `MARKER` at that layer. False: nowhere.
        num_classes: number of logits; by default as many as the layer, or the one that it leads to, puts out.

    Attributes:
        plain_layout: as in `FeatureClassifier`.
        recipe: what `afd.nn.build_named` made the model from, in plain JSON; None if that did not.
        built: the layers that it then had.
        settles: whether the number of classes is not known yet, and the first logits that are asked for say it.

    Raises:
        InputTypeError: `normalize` is none of the three.
        InputError: the model has no such linear layer, or has it inside of something compiled, or has parameters that
            are yet without values.
    """

    recipe: dict[str, Any] | None = None
    built: list[Any] | None = None

    def __init__(
        self,
        model: nn.Module,
        feature_layer: str | None = None,
        normalize: bool | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if normalize is not None and not isinstance(normalize, bool):
            raise InputTypeError(f"normalize is {normalize!r}; it must be True, False or None")
        self.plain_layout = self.settles = False
        linear = outputs.linear_layers(model)
        self.named = feature_layer is not None
        self.feature_layer = list(linear)[-1] if feature_layer is None else feature_layer
        if self.feature_layer not in linear:
            raise InputError(f"feature_layer is {feature_layer!r}; the model's linear layers are {', '.join(linear)}")
        self.model = model
        outputs.check_visible(model, self.feature_layer)
        self.num_features = self.classifier.in_features
        self.num_classes = num_classes or outputs.classes(linear, self.feature_layer)
        self.entrance = _entrance_at(self.classifier, normalize)

    @property
    def normalize(self) -> bool | None:
        """Whether features are scaled to length 1; see above."""
        return self.entrance.normalize

    @property
    def classifier(self) -> nn.Linear:
        """The layer that features enter."""
        layer = self.model.get_submodule(self.feature_layer)
        assert isinstance(layer, nn.Linear)
        return layer

    def settle(self, x: Tensor) -> None:
        """Compares layer and number of classes with what the model does with images x [N, ...]; corrects the latter.

        Call it inside of `afd.nn.modes.evaluating`. A layer that was named by the user need only be called.

        Raises:
            InputError: the layer was not called, or not with features [N, num_features]; or nobody named it, and the
                logits are those of another layer, or may be. The message names the layers in question.
            InputTypeError: the output holds no logits.
        """
        with torch.no_grad(), outputs.layer_outputs(self.model) as called:
            entered, output = self._watched(x)
        logits = logits_of(output, len(x))
        if not self.named:
            outputs.check_choice(self.feature_layer, called, logits)
        self._features(entered, len(x))
        self.num_classes, self.settles = logits.shape[1], False

    def features(self, x: Tensor) -> Tensor:
        """Features [N, num_features], of length 1 unless `normalize` is False."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, num_features] and logits [N, num_classes] from one pass.

        Raises:
            InputError: the layer was not called once, or not with [N, num_features].
        """
        entered, output = self._watched(x)
        logits = self._logits(output, len(x))
        z = self._features(entered, len(x))
        return unit_length(z) if self.normalize is None else z, logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        output = self.model(x)
        if self.settles:
            self.num_classes, self.settles = logits_of(output, len(x)).shape[1], False
        return self._logits(output, len(x))

    def _watched(self, x: Tensor) -> tuple[list[Tensor], Any]:
        """What entered the layer in one pass of the model, and what the model returned."""
        entrance = self.entrance
        entrance.recording, entrance.seen = True, []
        try:
            output = self.model(x)
            return entrance.seen, output
        finally:
            entrance.recording, entrance.seen = False, []

    def _features(self, seen: list[Tensor], samples: int) -> Tensor:
        if not seen:
            raise InputError(f"feature_layer is {self.feature_layer!r}, which the model's forward did not call")
        if len(seen) > 1:
            raise InputError(
                f"feature_layer is {self.feature_layer!r}, which the model's forward called {len(seen)} times; "
                "features are what enters a layer that is called once"
            )
        z = seen[0]
        if z.dim() != 2 or len(z) != samples:
            raise InputError(
                f"features of shape {list(z.shape)} enter {self.feature_layer!r}; they must be [N, {self.num_features}]"
                f", N = {samples} images"
            )
        return z

    def _logits(self, output: Any, samples: int) -> Tensor:
        logits = logits_of(output, samples)
        if logits.shape[1] != self.num_classes:
            raise InputError(
                f"the model returned shape {list(logits.shape)}; it must be [N, {self.num_classes}] (if it is right as "
                "it is, give its number of classes to afd.nn.split as num_classes)"
            )
        return logits


def split(
    model: nn.Module,
    feature_layer: str | None = None,
    normalize: bool | None = None,
    num_classes: int | None = None,
) -> Any:
    """`model` as a `Split`; one that is split already is returned as it is.

    Args:
        model: any classifier.
        feature_layer: as in `FeatureSplit`.
        normalize: as in `FeatureSplit`; for a model that is split already, None is what it does.
        num_classes: as in `FeatureSplit`.

    Raises:
        InputTypeError: the model is no module.
        InputError: as in `FeatureSplit`, or the model is split already in another way.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    model = without_wrappers(model)
    if not isinstance(model, (FeatureClassifier, FeatureSplit)):
        return FeatureSplit(model, feature_layer, normalize, num_classes)
    if normalize not in (None, model.normalize):
        raise InputError(f"normalize is {normalize}; the model was built with normalize={model.normalize}")
    if feature_layer not in (None, getattr(model, "feature_layer", "classifier")):
        raise InputError(f"feature_layer is {feature_layer!r}; the model is a {type(model).__name__}, already split")
    if num_classes not in (None, model.num_classes):
        raise InputError(f"num_classes is {num_classes}; the model was built with num_classes={model.num_classes}")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside of a `FeatureSplit` and of wrappers that compute what it does."""
    model = without_wrappers(model)
    return model.model if isinstance(model, FeatureSplit) else model


def unit_length(z: Tensor) -> Tensor:
    """Rows of length 1, in float32 (or wider) under autocast; a row of zeros stays zero."""
    narrow = torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64
    return F.normalize(z.float() if narrow else z, dim=-1)


torch.fx.wrap("unit_length")  # a symbolic trace of the model must not look into it: its branch asks for a real tensor


def entrance_of(layer: nn.Module) -> Entrance | None:
    """The entrance that a layer has from an earlier split, if it has."""
    return next((hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, Entrance)), None)


def unscaled(model: nn.Module) -> None:
    """Takes away what earlier splits of a model scale before its layers, the entries of its state_dict included."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and entrance_of(layer) is not None:
            _entrance_at(layer, False)


def _entrance_at(layer: nn.Linear, normalize: bool | None) -> Entrance:
    """The layer's entrance: the one it has from an earlier split, with its setting renewed, or a new one."""
    entrance = entrance_of(layer)
    if entrance is None:
        entrance = Entrance()
        layer.register_forward_pre_hook(entrance, with_kwargs=True)
    entrance.normalize = normalize
    if normalize and MARKER not in layer._buffers:
        # not that of layer.weight, which may be computed anew, and change something, whenever it is read
        device = next(layer.parameters()).device
        layer.register_buffer(MARKER, torch.ones((), dtype=torch.bool, device=device))
    elif not normalize:
        layer._buffers.pop(MARKER, None)
    return entrance
