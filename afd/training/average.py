"""An exponential average of the weights, which validation and the saved weights can use instead of the last ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from afd.errors import InputError, number
from afd.methods.execution import as_torch_starts

WIDE = 4  # bytes of a number that averages are kept in
FRESH = "deepcopy protocol"  # of torch's error on a tensor that autograd computed


class Average(AveragedModel):
    """A copy of a model that follows it: average ← decay * average + (1 - decay) * weights.

    Floating-point parameters and buffers are averaged, each tensor once however many modules share it. Other buffers,
    such as counts and tables of positions, are not numbers between which anything lies: they are the model's own. The
    average of bfloat16 and float16 tensors is kept in float32 besides (`wide`): a step of 1 - decay is less than the
    distance between two of their values, so that an average in their own dtype would stay where it began.

    Between infinity and itself nothing lies either, which a mask of -inf is made of: what is not finite, here or there,
    is copied. Trainable parameters and BatchNorm's statistics are not looked at for it in every round.

    Args:
        model: that is followed.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # its counter stays on the CPU, where asking for it waits for no device
        with as_torch_starts(), _leaves(model):
            super().__init__(model)
        self.decay = decay
        named = dict(_named(self.module))
        for tensor in named.values():
            if torch._debug_has_internal_overlap(tensor):  # an expanded one cannot be written to
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        narrow = (name for name, one in named.items() if one.is_floating_point() and one.element_size() < WIDE)
        self.wide = {name: named[name].detach().float() for name in narrow}
        self.careful = _seldom_finite(self.module)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's weights in; the first ones are the average."""
        followed = dict(_named(model))
        numbers: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        looked_at: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, own in _named(self.module):
            kept, new = self.wide.get(name, own), followed[name].detach()
            if not self.n_averaged or not (own.is_floating_point() or own.is_complex()):
                kept.copy_(new)
                continue
            averages, weights = numbers.setdefault((kept.device, kept.dtype), ([], []))
            averages.append(kept.detach())
            weights.append(new.to(kept))
            if name in self.careful:
                looked_at.append((kept, weights[-1], kept.isfinite() & weights[-1].isfinite()))
        for averages, weights in numbers.values():
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for kept, new, finite in looked_at:
            kept.copy_(torch.where(finite, kept, new))
        for name, own in _named(self.module):
            if name in self.wide:
                own.copy_(self.wide[name])
        self.n_averaged += 1


def averaged(model: nn.Module, decay: float) -> Average:
    """A copy of `model` that follows it.

    Raises:
        InputTypeError: decay is no number.
        InputError: decay is not in [0, 1), or the model cannot be copied.
    """
    number("ema", decay, -math.inf)
    if not 0 <= decay < 1:
        raise InputError(f"ema is {decay}; it must be in [0, 1)")
    try:
        return Average(model, decay)
    except (RuntimeError, TypeError) as error:  # of the deepcopy
        why = "a tensor that it holds was computed by autograd" if FRESH in str(error) else " ".join(str(error).split())
        raise InputError(
            f"ema averages a copy of the model, which cannot be copied: {why}; detach or drop it"
        ) from error


@contextmanager
def _leaves(model: nn.Module) -> Iterator[None]:
    """Inside, what hooks have computed of parameters does not hang on them, so that it can be copied.

    The older `weight_norm` and `spectral_norm`, and pruning, keep a layer's weight as such an attribute, and compute it
    anew before every pass.
    """
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for place, name, value in held:
        place[name] = value.detach()
    try:
        yield
    finally:
        for place, name, value in held:
            place[name] = value


def _seldom_finite(model: nn.Module) -> set[str]:
    """Names of tensors that may hold infinities: buffers but for BatchNorm's, and parameters that do so now."""
    statistics = {
        id(buffer) for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(False)
    }
    found = {name for name, buffer in model.named_buffers() if id(buffer) not in statistics}
    names, parameters = [], []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            names.append(name)
            values = parameter.detach()
            parameters.append((values if values.is_complex() else values.float()).isfinite().all().cpu())
    return found | {name for name, finite in zip(names, parameters, strict=True) if not finite}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return chain(model.named_parameters(), model.named_buffers())
