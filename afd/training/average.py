"""An exponential average of the weights, which validation and the saved weights can use instead of the last ones."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from afd.errors import InputError


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows it: average ← decay * average + (1 - decay) * weights, buffers included.

    Raises:
        InputError: decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"ema is {decay}; it must be in [0, 1)")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
