"""What every attack runs on: the model as it stands in evaluation mode, and the gradient of a loss at its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import InputError, one_of

Loss = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y, reduction="sum")


LOSSES: dict[str, Loss] = {"ce": _cross_entropy}  # summed, so that each sample's gradient is independent of the batch


def loss_named(name: str) -> Loss:
    """The loss an attack ascends, by name.

    Raises:
        InputError: unknown name.
    """
    one_of("loss", name, LOSSES)
    return LOSSES[name]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters; every flag is put back afterwards, also when the body raises."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def input_gradient(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, largest_label: int) -> Tensor:
    """∇_x loss(model(x), y), of x's shape and dtype, detached.

    Args:
        model: classifier; call inside `evaluating`.
        loss: sums over samples.
        x: images [N, ...], leaf or not; not modified.
        y: labels [N] int64.
        largest_label: max(y), known to the host, so that the range check needs no synchronisation.

    Raises:
        InputError: the model's output is not [N, classes], or a label is not one of its classes.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
            raise InputError(f"the model returned shape {list(logits.shape)}; an attack needs logits [{x.shape[0]}, K]")
        if largest_label >= logits.shape[1]:
            raise InputError(f"y holds the label {largest_label}; the model has classes 0 ... {logits.shape[1] - 1}")
        (grad,) = torch.autograd.grad(loss(logits, y), x)
    return grad
