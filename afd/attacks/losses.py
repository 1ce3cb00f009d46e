"""What an attack ascends: one loss per sample from logits [N, K] and what they are judged by; higher is worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import InputError, one_of

Value = Callable[[Tensor, Tensor], Tensor]  # (outputs [N, K], target) -> losses [N], or, one of yours, a scalar []
JudgedBy = Literal["classes", "labels", "prediction", "target"]
OUTPUTS = ("logits", "features")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y]; for soft labels y [N, K], Σ_k y_k (-log softmax(logits)_k)."""
    return F.cross_entropy(wide(logits), y, reduction="none")


def kl_divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(p || softmax(logits)), p the clean prediction given as log p [N, K]: what TRADES ascends (Zhang et al. 2019).

    At the image itself the divergence and its gradient are 0, so an attack must start elsewhere.

    Raises:
        InputError: the clean prediction is one of other classes.
    """
    if clean.shape != logits.shape:
        raise InputError(f"target has shape {list(clean.shape)}; the model's logits are {list(logits.shape)}")
    return F.kl_div(wide(logits).log_softmax(1), clean, reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of another class minus that of y: positive where the prediction is not y.

    Raises:
        InputError: fewer than 2 classes.
    """
    _at_least_classes("margin", 2, logits)
    logits, own = wide(logits), y[:, None]
    others = logits.scatter(1, own, float("-inf"))
    return others.amax(1) - logits.gather(1, own).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin over the gap of the largest and third largest logit.

    It does not change when the logits are shifted or scaled.

    Raises:
        InputError: fewer than 3 classes.
    """
    _at_least_classes("dlr", 3, logits)
    largest = wide(logits).topk(3, dim=1).values
    return margin(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, own_and_target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020): (z_target - z_own) / (z_(1) - (z_(3) + z_(4)) / 2).

    z_(k) is the k-th largest logit.

    Args:
        logits: [N, K].
        own_and_target: [N, 2], the class to leave and the class to reach.

    Raises:
        InputError: fewer than 4 classes.
    """
    _at_least_classes("dlr-targeted", 4, logits)
    logits = wide(logits)
    largest = logits.topk(4, dim=1).values
    own, target = logits.gather(1, own_and_target).unbind(1)
    return (target - own) / (largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + 1e-12)


def logit_difference(logits: Tensor, own_and_target: Tensor) -> Tensor:
    """z_target - z_own, [N], of logits [N, K] and the class to leave beside the class to reach, [N, 2]: FAB's loss."""
    own, target = wide(logits).gather(1, own_and_target).unbind(1)
    return target - own


# --- What losses are judged by --------------------------------------------------------------------------------------


def the_labels(_clean: Callable[[], Tensor], y: Tensor, _rank: int) -> Tensor:
    """y itself."""
    return y


def the_prediction(clean: Callable[[], Tensor], _y: Tensor | None, _rank: int) -> Tensor:
    """log softmax of the clean logits, [N, K]."""
    return wide(clean()).log_softmax(1)


def a_likely_class(clean: Callable[[], Tensor], y: Tensor, rank: int) -> Tensor:
    """y beside the other class that the clean logits rank highest (0), second (1), and so on: [N, 2].

    Raises:
        InputError: there are not so many other classes.
    """
    logits = wide(clean())
    if rank >= logits.shape[1] - 1:
        raise InputError(
            f"the attack aims at {rank + 1} other classes; the model has {logits.shape[1]}, so n_target_classes is "
            f"at most {logits.shape[1] - 1}"
        )
    others = logits.scatter(1, y[:, None], float("-inf"))
    return torch.stack([y, others.topk(rank + 1, dim=1).indices[:, rank]], 1)


@dataclass(frozen=True)
class Loss:
    """A loss, and what it is judged by: `target(clean, y, rank)`, clean giving the logits of x where they are needed.

    Attributes:
        value: (outputs, target) -> losses.
        target: what it is judged by.
        judged_by: what a call must give for that: "classes" (y [N]); "labels" (y, or soft labels [N, K]); "prediction"
            (nothing, or the clean logits as target); or "target" (target, or any y): a loss of somebody's own.
    """

    value: Value
    target: Callable[[Callable[[], Tensor], Any, int], Tensor]
    judged_by: JudgedBy = "classes"


@dataclass(frozen=True)
class Own:
    """A loss of somebody else's: in whatever precision the model runs, this is given float32, and runs in it."""

    function: Value

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        """What the function returns."""
        with torch.autocast(outputs.device.type, enabled=False):
            return self.function(wide(outputs), target)


LOSSES = {
    "ce": Loss(cross_entropy, the_labels, "labels"),
    "dlr": Loss(dlr, the_labels),
    "dlr-targeted": Loss(dlr_targeted, a_likely_class),
    "kl": Loss(kl_divergence, the_prediction, "prediction"),
    "margin": Loss(margin, the_labels),
}
TARGETED = ("ce", "margin")  # those that can be descended towards a class


def loss_named(name: str, *, targeted: bool = False) -> Loss:
    """A loss by name.

    Raises:
        InputError: unknown name, or a loss that cannot be descended towards a target class.
    """
    one_of("loss", name, LOSSES)
    if targeted and name not in TARGETED:
        raise InputError(f"loss is {name!r}, which takes no target class; with targeted=True, allowed are ce, margin")
    return LOSSES[name]


def loss_of(loss: str | Value, *, targeted: bool = False) -> Loss:
    """A loss by name, or somebody's own, a function (outputs, target) -> losses [N] or a scalar [].

    Raises:
        InputError: as `loss_named`.
    """
    return Loss(Own(loss), the_labels, "target") if callable(loss) else loss_named(loss, targeted=targeted)


def check_outputs(outputs: str, loss: str | Value) -> None:
    """Raises InputError unless a loss can be given such outputs of a model."""
    one_of("outputs", outputs, OUTPUTS)
    if outputs == "features" and not callable(loss):
        raise InputError(f"outputs is 'features', and loss is {loss!r}, which is one of logits; give a function")


def wide(outputs: Tensor) -> Tensor:
    """Outputs in float32, or float64 if they come so."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _at_least_classes(loss: str, least: int, logits: Tensor) -> None:
    if logits.shape[1] < least:
        raise InputError(f"loss is {loss!r}, which needs at least {least} classes; the model has {logits.shape[1]}")
