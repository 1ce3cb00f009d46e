"""What every attack runs on: the model as it stands in evaluation mode, and the gradient of a loss at its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afd.attacks.losses import Value
from afd.errors import InputError
from afd.nn.modes import evaluating
from afd.nn.outputs import logits_of

__all__ = ["evaluating", "judged", "logits_alone", "loss_gradient"]


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
        InputError: the model's output is not [N, classes], or a label is not one of its classes.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = _logits(model, x)
        if largest_label >= logits.shape[1]:
            raise InputError(f"y holds the label {largest_label}; the model has classes 0 ... {logits.shape[1] - 1}")
        losses = loss(logits, aim)
        (grad,) = torch.autograd.grad(losses.sum(), x)
    return grad, losses.detach(), logits.detach()


@torch.no_grad()
def judged(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits [N, K] in full precision, whatever mode the caller is in: what figures are made from.

    Args:
        model: classifier; call inside `evaluating`.
        x: images [N, ...]; the model is shown a copy, which it may overwrite.

    Raises:
        InputError, InputTypeError: what it returned holds no logits [N, K].
    """
    with torch.autocast(x.device.type, enabled=False):
        return logits_of(model(x.clone()), x.shape[0])


def logits_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits [N, classes] at images x, by the very code that `loss_gradient` runs, autograd included."""
    with torch.enable_grad():
        return _logits(model, x.detach().requires_grad_()).detach()


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        logits: Tensor = model(x)
    except RuntimeError as error:
        if "nference tensors cannot be saved for backward" in str(error):
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            names = ", ".join(name for name, tensor in tensors.items() if tensor.is_inference())
            raise InputError(
                "no gradient goes through what was made in torch.inference_mode; make, load or move the model outside "
                f"of that mode (here: {names or 'a tensor that it holds'})"
            ) from error
        raise
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        raise InputError(f"the model returned shape {list(logits.shape)}; an attack needs logits [{x.shape[0]}, K]")
    return logits
