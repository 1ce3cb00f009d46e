"""What every attack runs on: the model as it stands in evaluation mode, and the gradient of a loss at its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.losses import Value
from afd.errors import InputError, InputTypeError, ModelError
from afd.nn.modes import evaluating
from afd.nn.outputs import logits_of

__all__ = ["check_label", "evaluating", "judged", "logits_alone", "loss_gradient", "shown"]

CUT_OFF = (
    "no gradient leads from the model's output to the images: something on the way detaches it, computes without "
    "autograd, or turns it into integers; gradient attacks cannot aim at such a model"
)


def shown(model: nn.Module, x: Tensor) -> Any:
    """What a model returns for images x, of which it is given a copy: it may normalise them in place."""
    return model(x.clone())


def loss_gradient(
    model: nn.Module, loss: Value, x: Tensor, aim: Tensor, largest_label: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """∇_x Σ loss(model(x), aim) with the losses and logits behind it, all detached.

    Args:
        model: classifier; call inside `evaluating`.
        loss: one value per sample; their sum is differentiated, so that samples do not depend on their batch.
        x: images [N, ...], leaf or not; not modified.
        aim: what the loss is judged by, [N, ...].
        largest_label: known to the host, so that its check needs no synchronisation; -1 for no check.

    Returns:
        The gradient, of x's shape and dtype; the losses [N]; the logits [N, classes].

    Raises:
        InputError, InputTypeError: the model's output holds no logits [N, classes], or a label is not one of its
            classes.
        ModelError: no gradient leads from the output to the images.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = _logits(model, x)
        check_label(largest_label, logits)
        losses = loss(logits, aim)
        if not losses.requires_grad:
            raise ModelError(CUT_OFF)
        try:
            (grad,) = torch.autograd.grad(losses.sum(), x, allow_unused=True)
        except NotImplementedError as error:  # by a quantised layer, say
            raise ModelError(f"the model cannot be differentiated: {' '.join(str(error).split())}") from error
        if grad is None:
            raise ModelError(CUT_OFF)
    return grad, losses.detach(), logits.detach()


def check_label(largest_label: int, logits: Tensor) -> None:
    """Raises InputError unless logits [N, K] have a class for a label; there is one for -1."""
    if largest_label >= logits.shape[1]:
        raise InputError(f"y holds the label {largest_label}; the model has classes 0 ... {logits.shape[1] - 1}")


def logits_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits [N, classes] at images x, by the very code that `loss_gradient` runs, autograd included."""
    with torch.enable_grad():
        return _logits(model, x.detach().requires_grad_()).detach()


@torch.no_grad()
def judged(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits [N, K] in full precision, whatever mode the caller is in: what figures are made from.

    Args:
        model: classifier; call inside `evaluating`.
        x: images [N, ...]; not modified.

    Raises:
        InputError, InputTypeError: what it returned holds no logits [N, K], or its weights have another dtype than x.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _logits(model, x)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        output = shown(model, x)
    except RuntimeError as error:
        _explain(error, model, x)
        raise
    logits = logits_of(output, x.shape[0])
    if logits.device != x.device:
        raise InputError(f"the model returned logits on {logits.device}; they must be on x's device, {x.device}")
    return logits


def _explain(error: RuntimeError, model: nn.Module, x: Tensor) -> None:
    """Raises what torch's error means where that is known."""
    reason = " ".join(str(error).split())
    if "nference tensors cannot be saved for backward" in reason:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = ", ".join(name for name, tensor in tensors.items() if tensor.is_inference())
        raise InputError(
            "no gradient goes through what was made in torch.inference_mode; make, load or move the model outside "
            f"of that mode (here: {names or 'a tensor that it holds'})"
        ) from error
    kinds = {one.dtype for one in model.parameters() if one.is_floating_point()}
    if kinds and x.dtype not in kinds:
        raise InputTypeError(
            f"the model's weights are {', '.join(map(str, kinds))}, and x is {x.dtype}, which it does not take "
            f"({reason}); give both one dtype (precision='bf16' is for weights in float32)"
        ) from error
