"""What BatchNorm layers do while a model is attacked: the main hidden difference between published training methods.

- "eval": they normalise by their running statistics, as in evaluation.
- "train": by those of the batch at hand, by which the running ones are updated at each step: ``model.train()`` before
  the loop (Madry's and Rice's code, AWP, FGSM-RS, Free).
- "batch": by those of the batch at hand, and the running ones stay as they are (Gowal et al. 2020, and after).
- "clean": by the mean and the biased variance that the clean batch has at each layer, found by one forward when the
  call begins (LLR). The k-th call of a layer in a forward takes what its k-th call found.

Everything else, such as dropout, is in evaluation mode. A layer that stands in evaluation mode inside a model that is
in training mode is frozen on purpose and stays so; in a model that is wholly in evaluation mode all take part. In
"train" only the forwards at the attack's own points update anything: those that look at the images themselves, for
`validate`, for "kl" or for what APGD counts as broken, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from afd.errors import InputError, ModelError
from afd.nn.modes import Buffers, eager, evaluating, held, local

MODES = ("eval", "train", "batch", "clean")


class BatchNorms:
    """The BatchNorm layers of one attack's model, for the length of a call.

    Attributes:
        mode: one of `MODES`, during a call.
    """

    def __init__(self) -> None:
        self.mode = "eval"
        self._layers: list[_BatchNorm] = []
        self._stand_ins: list[_Clean] = []
        self._before: Buffers | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of the attack: a call begins anew."""
        return BatchNorms, ()

    @contextmanager
    def running(self, model: nn.Module, mode: str) -> Iterator[None]:
        """`evaluating(model)`, but for its BatchNorm layers, which do what the mode says.

        Raises:
            InputError: "clean" cannot be had of such layers.
        """
        if mode == "eval":
            with evaluating(model):
                yield
            return
        with held(model.modules() if isinstance(model, nn.Module) else ()):
            layers = taking_part(model)
            if mode == "clean":
                check_clean(local(model), layers, "batchnorm is 'clean'", "; allowed are eval, train, batch")
            with evaluating(model, keep=layers if mode == "train" else ()):
                self.mode, self._layers = mode, layers
                self._before = Buffers(list(layers)) if mode == "train" else None
                try:
                    for layer in layers:
                        layer.train()
                    yield
                finally:
                    self._remove()
                    self.mode, self._layers, self._before = "eval", [], None

    def begin_again(self) -> None:
        """Takes back what this call has done to running statistics: it begins from the images once more."""
        if self._before is not None:
            self._before.put_back()

    def begin_forward(self) -> None:
        """A forward of the model begins, in which each layer's first call is yet to come."""
        for one in self._stand_ins:
            one.calls = 0

    def find(self, forward: Callable[[], object]) -> None:
        """In "clean", takes the statistics of what a forward shows each layer, for all forwards from here on."""
        if self.mode != "clean":
            return
        self._remove()
        for layer in self._layers:
            layer.train()
        self._stand_ins = [_Clean(layer) for layer in self._layers]
        for one in self._stand_ins:
            one.place(one.measured)
        forward()
        for one in self._stand_ins:
            one.layer.eval()
            one.place(one.normalised)

    def untouched(self) -> AbstractContextManager[None]:
        """The body's forwards update no running statistics."""
        return _put_back(self._layers) if self.mode == "train" else nullcontext()

    def _remove(self) -> None:
        for one in self._stand_ins:
            one.remove()
        self._stand_ins = []


def taking_part(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers whose statistics an attack may ask for: all but those that are frozen on purpose."""
    layers = list(model.modules())
    anything_trains = any(getattr(layer, "training", False) for layer in layers)
    return [layer for layer in layers if isinstance(layer, _BatchNorm) and (layer.training or not anything_trains)]


class CleanBatch:
    """The statistics that a batch has at a model's BatchNorm layers in a training pass, for other passes to go by.

    In the words of this module that is "clean", with gradients: what is computed in `passing` goes back through mean
    and variance into the pass that they are of, as in the released code of LLR. No other pass updates running
    statistics. The layers are those that train; `noted` is for one pass.

    Args:
        model: in training mode, or any part of it.

    Raises:
        InputError: statistics cannot be had of such layers.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in taking_part(model) if layer.training]
        check_clean(model, layers, "this method passes images with the clean batch's statistics")
        self._stand_ins = [_Clean(layer) for layer in layers]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, a pass of the model has its batch's statistics noted, with the gradients that lead to them."""
        with self._placed(_Clean.noted):
            yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, one pass of the model, in training mode, normalises by what was noted; gradients go there."""
        with self._placed(_Clean.followed):
            yield

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """`afd.nn.modes.evaluating`, but that these layers normalise by what was noted, as by constants.

        Yields:
            What is called before each pass.
        """
        with evaluating(model), self._placed(_Clean.normalised):
            yield self._begin_pass

    def _begin_pass(self) -> None:
        for one in self._stand_ins:
            one.calls = 0

    @contextmanager
    def _placed(self, forward: Callable[[_Clean, Tensor], Tensor]) -> Iterator[None]:
        self._begin_pass()
        try:
            for one in self._stand_ins:
                one.place(partial(forward, one))
            yield
        finally:
            for one in self._stand_ins:
                one.remove()


class _Clean:
    """Takes the place of a BatchNorm's forward: first to measure what it is shown, then to normalise by that.

    Attributes:
        calls: of the layer in this forward.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer, self.calls = layer, 0
        self.found: list[tuple[Tensor, Tensor]] = []
        self._placed_before = vars(layer).get("forward")
        self._own: Callable[[Tensor], Tensor] = layer.forward

    def place(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Makes one of the two below what the layer's caller gets."""
        vars(self.layer)["forward"] = forward

    def remove(self) -> None:
        """Leaves the layer's own forward in place."""
        if self._placed_before is None:
            vars(self.layer).pop("forward", None)
        else:
            vars(self.layer)["forward"] = self._placed_before

    def measured(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name, by which it may be called)
        """The layer in training mode; notes mean and biased variance of each channel."""
        out = self._own(input)
        self.found.append(_statistics(input.detach()))
        return out

    def noted(self, input: Tensor) -> Tensor:  # noqa: A002
        """`measured`, with the gradients that lead to the statistics."""
        out = self._own(input)
        self.found.append(_statistics(input))
        return out

    def normalised(self, input: Tensor) -> Tensor:  # noqa: A002
        """The layer in evaluation mode, as if what was noted at this call were its running statistics."""
        buffers: dict[str, Any] = self.layer._buffers
        held_before = {name: buffers.get(name) for name in ("running_mean", "running_var")}
        buffers.update(zip(held_before, (one.detach() for one in self._of_this_call()), strict=True))
        try:
            return self._own(input)
        finally:
            buffers.update(held_before)

    def followed(self, input: Tensor) -> Tensor:  # noqa: A002
        """`normalised`, with gradients to what was noted, which torch's own normalisation has none to."""
        mean, variance = self._of_this_call()
        weight, bias = self.layer.weight, self.layer.bias
        scale = (variance + self.layer.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = (one.to(input.dtype).view(-1, *([1] * (input.dim() - 2))) for one in (scale, shift))
        return torch.addcmul(shift, input, scale)

    def _of_this_call(self) -> tuple[Tensor, Tensor]:
        number = self.calls if len(self.found) > 1 else 0  # of one, a recomputed forward needs no count
        self.calls += 1
        if number >= len(self.found):
            raise ModelError(
                f"a {type(self.layer).__name__} is called more often at an attack's points than at the clean images, "
                f"{len(self.found)} times, so that batchnorm='clean' has no statistics for it"
            )
        return self.found[number]


def _statistics(of: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of what a layer is shown, [N, C, ...], in float32 or wider."""
    of = of if of.dtype == torch.float64 else of.float()
    variance, mean = torch.var_mean(of, [dim for dim in range(of.dim()) if dim != 1], correction=0)
    return mean, variance


@contextmanager
def _put_back(layers: list[_BatchNorm]) -> Iterator[None]:
    buffers = Buffers(list(layers))
    try:
        yield
    finally:
        buffers.put_back()


def check_clean(model: nn.Module, layers: list[_BatchNorm], asked: str, instead: str = "") -> None:
    """Raises InputError unless layers can be given statistics; `asked`: by whom, `instead`: what may be asked for."""
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
        raise InputError(
            f"{asked} and the model has a SyncBatchNorm, whose statistics are those of other processes' images, "
            f"too{instead}"
        )
    if layers and not eager(model):
        raise InputError(
            f"{asked} and the model is compiled, scripted or on several devices, where its layers cannot be given "
            "statistics; pass the module that it was made from"
        )
