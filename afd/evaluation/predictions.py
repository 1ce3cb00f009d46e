"""What a classifier says of images, in full precision: the one place that figures take predictions from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd.attacks.engine import evaluating, judged
from afd.nn.modes import local

UNDEFINED = -1  # the class of an image whose logits hold NaN; argmax would take NaN for the largest


@dataclass(frozen=True)
class Predictions:
    """What a model said of N images.

    Attributes:
        classes: the likeliest class of each, int64 [N]; `UNDEFINED`, which no label is, where a logit is NaN.
        finite: whether all logits of an image are finite, bool [N].
        num_classes: how many logits an image has; 0 where there are no images.
    """

    classes: Tensor
    finite: Tensor
    num_classes: int

    @property
    def undefined(self) -> Tensor:
        """Which images the model has no class for, bool [N]."""
        return self.classes == UNDEFINED


def predict(model: nn.Module, x: Tensor) -> Predictions:
    """What a model, in evaluation mode and full precision, says of images [N, ...]; nothing waits for the device.

    Raises:
        InputError, InputTypeError: what it returned holds no logits [N, K].
    """
    if not len(x):
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Predictions(none, none.bool(), 0)
    with evaluating(model):
        logits = judged(local(model), x)
    classes = torch.where(logits.isnan().any(1), UNDEFINED, logits.argmax(1))
    return Predictions(classes, logits.isfinite().all(1), logits.shape[1])
