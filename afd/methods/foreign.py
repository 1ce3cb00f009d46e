"""A model that somebody else wrote, as training takes it in: what is in its wrappers, what it does with images."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from afd.attacks.inputs import outside_inference
from afd.errors import AfdError, InputError, InputTypeError, warn_caller
from afd.methods.execution import Execution, TrainingPass, explained, isolated, lay_out_plainly, needs_plain_layout
from afd.nn import ConvNet, FeatureClassifier, FeatureSplit, ResNet18, Split, split
from afd.nn.modes import evaluating, without_wrappers, wraps_compiled

TRIED = 8  # images that a model is tried on


def taken_in(model: nn.Module) -> nn.Module:
    """The module that is trained: the one inside of a wrapper that computes what it does.

    Raises:
        InputTypeError: it is no module.
        InputError: it was made in `torch.inference_mode`, so that no gradient can reach it.

    Warns:
        UserWarning: what a wrapper would do is done otherwise.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    inner = without_wrappers(model)
    if wraps_compiled(model):
        warn_caller(
            "model is compiled; the module inside of it is trained as it is (Execution(compile=True) compiles the "
            "passes of training)",
            UserWarning,
        )
    elif isinstance(model, DataParallel):
        warn_caller(
            "model is a DataParallel; the module inside of it is trained, on one device (several take part under "
            "torchrun)",
            UserWarning,
        )
    for name, tensor in inner.named_parameters():
        if not is_lazy(tensor) and tensor.is_inference():
            raise InputError(
                f"the model's {name} was made in torch.inference_mode, and no gradient reaches it; make or load the "
                "model outside of that mode"
            )
    return inner


def as_split(model: Any) -> Split:
    """A classifier as training passes want it, out of its wrappers: with features beside its logits.

    Raises:
        InputTypeError, InputError: `afd.nn.split` does not take it, or it is wrapped for several processes.

    Warns:
        UserWarning: as of `taken_in`.
    """
    if isinstance(model, DistributedDataParallel):
        raise InputError(
            "model is a DistributedDataParallel, which would not see all passes of a step; build the step with the "
            "module inside and wrap=partial(DistributedDataParallel, find_unused_parameters=True) (or Accelerate's "
            "prepare_model)"
        )
    inner: Any = taken_in(model)
    network: Split = inner if hasattr(inner, "features_and_logits") else split(inner)
    return network


def device_of(network: Any) -> torch.device:
    """The device of a model's parameters.

    Raises:
        InputError: it has none, or parameters on the device meta.
    """
    first: nn.Parameter | None = next(network.parameters(), None)
    if first is None:
        raise InputError(f"model is a {type(network).__name__} without parameters; there is nothing to train")
    own = network.model if isinstance(network, FeatureSplit) else network
    for name, tensor in chain(own.named_parameters(), own.named_buffers()):
        if tensor.is_meta and not is_lazy(tensor):
            raise InputError(
                f"the model's {name} is on the device meta, where tensors hold no values; load the weights first"
            )
    return first.device


def settle(network: Any, execution: Execution, x: Tensor) -> int:
    """The number of classes, after a look at what a model that is not afd's own does with images x.

    One that cannot go on from what lies channels-last, which convolutions are shown unless `execution` says otherwise,
    is laid out plainly from then on.

    Raises:
        InputError, InputTypeError: it does not take such images, or its logits are not those of its feature layer.
    """
    device = device_of(network)
    check_dtype(network, x)
    if isinstance(network, FeatureClassifier) and isinstance(network.encoder, ConvNet | ResNet18):
        return int(network.num_classes)
    some = outside_inference(x[:TRIED]).to(device)
    try:
        with isolated(device), evaluating(network):
            _try(network, execution, some)
    except AfdError:
        raise
    except RuntimeError as error:  # of the model's own operations, on images of another shape or dtype
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the model does not take images {list(some.shape)} of {x.dtype}: {reason}") from error
    return int(network.num_classes)


def check_dtype(network: Any, x: Tensor) -> None:
    """Raises InputError where one of images and weights is float64, the other is not, and nothing converts them."""
    if isinstance(network, FeatureSplit):
        return
    own = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
    if len(own) == 1 and torch.float64 in own ^ {x.dtype} and own != {x.dtype}:
        raise InputError(f"x is {x.dtype} and the model {own.pop()}; convert one to the dtype of the other")


def check_features(network: Any, x: Tensor) -> None:
    """Tries a model that is not afd's own on images: its features must be those that its logits are made of.

    Raises:
        InputError, InputTypeError: they are not, or may not be; the message names the layers in question.
    """
    if isinstance(network, FeatureSplit):
        classes = network.num_classes
        with isolated(x.device), explained(1), evaluating(network):
            network.settle(outside_inference(x[:TRIED]))
        network.num_classes = classes  # where there are others, the passes say so


def _try(network: Any, execution: Execution, x: Tensor) -> None:
    passes = TrainingPass(network, execution)
    look = network.settle if isinstance(network, FeatureSplit) else network
    try:
        with torch.no_grad():
            look(passes.shown(x))
    except RuntimeError as error:
        if not execution.channels_last or not needs_plain_layout(error):
            raise
        lay_out_plainly(network)
        with torch.no_grad():
            look(passes.shown(x))
