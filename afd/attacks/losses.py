"""What an attack ascends: one loss per sample from logits [N, K] and labels [N]; higher is worse for the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import InputError, one_of

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y]."""
    return F.cross_entropy(_wide(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of another class minus that of y: positive where the prediction is not y.

    Raises:
        InputError: fewer than 2 classes.
    """
    _at_least_classes("margin", 2, logits)
    logits, own = _wide(logits), y[:, None]
    others = logits.scatter(1, own, float("-inf"))
    return others.amax(1) - logits.gather(1, own).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin over the gap of the largest and third largest logit.

    It does not change when the logits are shifted or scaled.

    Raises:
        InputError: fewer than 3 classes.
    """
    _at_least_classes("dlr", 3, logits)
    largest = _wide(logits).topk(3, dim=1).values
    return margin(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


def loss_named(name: str, *, targeted: bool = False) -> Loss:
    """A loss by name.

    Raises:
        InputError: unknown name, or a loss that has no targeted form.
    """
    one_of("loss", name, LOSSES)
    if targeted and name == "dlr":
        raise InputError("loss is 'dlr', which has no target class; with targeted=True, allowed are ce, margin")
    return LOSSES[name]


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 if they come so."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _at_least_classes(loss: str, least: int, logits: Tensor) -> None:
    if logits.shape[1] < least:
        raise InputError(f"loss is {loss!r}, which needs at least {least} classes; the model has {logits.shape[1]}")
