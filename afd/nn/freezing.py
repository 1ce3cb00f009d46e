"""Parameters that stay as they are, by patterns of their names, and the BatchNorm layers that stay with them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from afd.errors import InputError, InputTypeError
from afd.nn.normalized import plain_model


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Has parameters of a model stay as they are, and returns their names.

    A BatchNorm layer all of whose parameters are frozen stays in evaluation mode in training, so that it goes on
    normalising by the statistics that belong to those parameters, which stay, too. (Without `freeze`, a layer whose
    parameters somebody has frozen is trained in the mode that the model's ``train()`` sets.)

    Args:
        model: a network as it was written, or a `Normalized` around it.
        patterns: of names as in ``model.named_parameters()``, such as "layer1.*"; case matters.

    Raises:
        InputError: a pattern is no parameter's, with near names, or all parameters would be frozen.
    """
    if isinstance(patterns, str):
        raise InputTypeError(f"patterns is {patterns!r}; it must be a list of patterns")
    inner = plain_model(model)
    parameters = dict(inner.named_parameters(remove_duplicate=False))  # all names of one that several layers share
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            near = get_close_matches(pattern.strip("*."), parameters, 4, 0.4) or [*parameters][:4]
            raise InputError(f"freeze is {pattern!r}, which no parameter is called; near names are {', '.join(near)}")
    frozen = [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]
    left = {id(one) for name, one in parameters.items() if one.requires_grad} - {
        id(parameters[name]) for name in frozen
    }
    if patterns and not left:
        raise InputError(f"freeze is {' '.join(patterns)}, which are all parameters, and leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for layer in inner.modules() if frozen else ():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, _BatchNorm) and own and not any(one.requires_grad for one in own):
            keep_in_evaluation(layer)
    return frozen


class Stays:
    """In the place of a frozen layer's ``train``: it is in evaluation mode whatever the model is in."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: ARG002
        """The layer, in evaluation mode."""
        self.layer.training = False
        return self.layer


def keep_in_evaluation(layer: Any) -> None:
    """Puts a layer into evaluation mode for good."""
    layer.eval()
    layer.train = Stays(layer)


def synchronised(model: Any) -> Any:
    """The model with torch's synchronised layers in the place of BatchNorm's; those that are frozen stay so."""
    frozen = [name for name, layer in model.named_modules() if isinstance(vars(layer).get("train"), Stays)]
    found = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name in frozen:  # the layer in its place is a new one
        keep_in_evaluation(found.get_submodule(name))
    return found
