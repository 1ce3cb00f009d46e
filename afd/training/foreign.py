"""A model that somebody else wrote, as a trainer takes it in: what is in its wrappers, what it does with images."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from afd.attacks.inputs import outside_inference
from afd.errors import AfdError, InputError, InputTypeError, warn_caller
from afd.methods import Execution
from afd.methods.execution import TrainingPass, isolated, lay_out_plainly, needs_plain_layout
from afd.nn import ConvNet, FeatureClassifier, FeatureSplit, ResNet18
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


def device_of(network: nn.Module) -> torch.device:
    """The device of a model's parameters.

    Raises:
        InputError: it has none, or parameters on the device meta.
    """
    first = next(network.parameters(), None)
    if first is None:
        raise InputError(f"model is a {type(network).__name__} without parameters; there is nothing to train")
    own = network.model if isinstance(network, FeatureSplit) else network
    for name, tensor in chain(own.named_parameters(), own.named_buffers()):
        if tensor.is_meta and not is_lazy(tensor):
            raise InputError(
                f"the model's {name} is on the device meta, where tensors hold no values; load the weights first"
            )
    return first.device


def settle(network: nn.Module, execution: Execution, x: Tensor) -> int:
    """The number of classes, after a look at what a model that is not afd's own does with images x.

    One that cannot go on from what lies channels-last, which convolutions are shown unless `execution` says otherwise,
    is laid out plainly from then on.

    Raises:
        InputError, InputTypeError: it does not take such images, or its logits are not those of its feature layer.
    """
    device = device_of(network)
    if not isinstance(network, FeatureSplit):
        own = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
        if len(own) == 1 and torch.float64 in own ^ {x.dtype} and own != {x.dtype}:
            raise InputError(f"x is {x.dtype} and the model {own.pop()}; convert one to the dtype of the other")
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
    return int(network.num_classes)  # type: ignore[arg-type]


def _try(network: nn.Module, execution: Execution, x: Tensor) -> None:
    passes = TrainingPass(network, execution)  # type: ignore[arg-type]
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
