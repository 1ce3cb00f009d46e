"""An exponential average of the weights, which validation and the saved weights can use instead of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from afd.errors import InputError
from afd.methods.execution import as_torch_starts

NARROW = (torch.float16, torch.bfloat16)


class Average(AveragedModel):
    """A copy of a model that follows it: average ← decay * average + (1 - decay) * weights.

    Floating-point parameters and buffers are averaged, each tensor once however many modules share it. Other buffers,
    such as counts and tables of positions, are not numbers between which anything lies: they are the model's own. The
    average of bfloat16 and float16 tensors is kept in float32 besides (`wide`): a step of 1 - decay is less than the
    distance between two of their values, so that an average in their own dtype would stay where it began.

    Args:
        model: that is followed.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        with as_torch_starts():  # its counter stays on the CPU, where asking for it waits for no device
            super().__init__(model)
        self.decay = decay
        self.wide = {name: tensor.detach().float() for name, tensor in _named(self.module) if tensor.dtype in NARROW}

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's weights in; the first ones are the average."""
        followed = dict(_named(model))
        numbers: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, own in _named(self.module):
            kept, new = self.wide.get(name, own), followed[name].detach()
            if not self.n_averaged or not (own.is_floating_point() or own.is_complex()):
                kept.copy_(new)
                continue
            averages, weights = numbers.setdefault((kept.device, kept.dtype), ([], []))
            averages.append(kept.detach())
            weights.append(new.to(kept))
        for averages, weights in numbers.values():
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for name, own in _named(self.module):
            if name in self.wide:
                own.copy_(self.wide[name])
        self.n_averaged += 1


def averaged(model: nn.Module, decay: float) -> Average:
    """A copy of `model` that follows it.

    Raises:
        InputError: decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"ema is {decay}; it must be in [0, 1)")
    return Average(model, decay)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return chain(model.named_parameters(), model.named_buffers())
