"""Layers joined to the convolution before them, for as long as an attack runs: today, BatchNorm.

In evaluation mode BatchNorm is an affine map of each channel, so conv(x; W, b) followed by it is the one convolution
conv(x; s W, s (b - mean) + shift) with s = scale / sqrt(var + eps). On a CPU that saves one pass over the activations
forward and one backward at each layer. The gradient changes by rounding only.

Nothing is known of a model beforehand, and no forward is taken for the next one. Each time that a convolution is
called, it asks what its caller will do with the result (`afd.attacks.callers`): if that goes straight into a BatchNorm,
whose values are now what they were when they were folded, the convolution does the work of both, and the BatchNorm
passes on what it is handed. In all other cases both do their own work: with hooks, modes of torch functions or
transforms at work, weights or statistics that have changed since the attack began, and whenever the caller may look at
what lies between.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from afd.attacks.callers import hooked, next_module
from afd.errors import ModelError
from afd.execution import unsafe_channels_last
from afd.nn.modes import eager, version_of

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
CONVS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PARTNERS: dict[type, type] = dict(zip(CONVS, NORMS, strict=True))
WIDE = (torch.float32, torch.float64)  # folded in less, a weight could overflow


class Pair:
    """A convolution, the BatchNorm behind it, and the weights of the one that does the work of both.

    Args:
        conv: the convolution.
        norm: of as many dimensions.
        channels_last: whether its weights may be laid out so, which convolutions are fastest in.
    """

    def __init__(self, conv: Conv, norm: Norm, channels_last: bool) -> None:
        self.conv, self.norm = conv, norm
        weight = conv.weight
        fast = channels_last and weight.dim() == 4 and not unsafe_channels_last(conv, weight.device)
        layout = torch.channels_last if fast else torch.contiguous_format
        self.weight = torch.empty_like(weight, memory_format=layout, requires_grad=False)
        self.bias = torch.empty_like(weight[:, 0].flatten(1)[:, 0], requires_grad=False)
        self.seen: list[tuple[Tensor | None, int | None, int | None]] | None = None
        self.eps = norm.eps

    def fits(self) -> bool:
        """Whether both layers are such as can be folded, into these weights."""
        norm, weight = self.norm, self.conv.weight
        if norm.training or norm.running_mean is None or norm.running_var is None or norm.eps < 0:
            return False
        given = [tensor for tensor in self._tensors() if tensor is not None]
        return (
            weight is self._tensors()[0]
            and weight.shape == self.weight.shape
            and weight.dtype in WIDE
            and all((t.dtype, t.device) == (self.weight.dtype, self.weight.device) for t in given)
            and all(type(t) in (Tensor, nn.Parameter) and not (t.requires_grad or t.is_inference()) for t in given)
            and all(vector.shape == self.bias.shape for vector in given[1:])
        )

    def is_fresh(self) -> bool:
        """Whether no tensor or setting is another one, or was written to, since the last refresh."""
        if self.seen is None or self.norm.training or self.norm.eps != self.eps:
            return False
        for now, (then, version, place) in zip(self._tensors(), self.seen, strict=True):
            if now is not then:
                return False
            if now is not None and (now._version != version or now.data_ptr() != place or now.requires_grad):
                return False
        return True

    @torch.no_grad()
    def refresh(self) -> None:
        """Folds the layers as they are now, in place, so that recorded graphs see them."""
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        torch.mul(conv.weight, scale.view(-1, *[1] * (self.weight.dim() - 1)), out=self.weight)
        centre = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        shift = 0.0 if norm.bias is None else norm.bias
        self.bias.copy_(centre * scale + shift)
        self.eps = norm.eps
        self.seen = [(t, version_of(t), None if t is None else t.data_ptr()) for t in self._tensors()]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """As registered; an attribute of a module is asked for in each forward, which takes a while in Python."""
        conv, norm, statistics = self.conv._parameters, self.norm._parameters, self.norm._buffers
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        return conv.get("weight"), conv.get("bias"), mean, var, norm.get("weight"), norm.get("bias")


class Joining:
    """What one attack knows of the convolutions of its model.

    Args:
        channels_last: whether folded weights may be laid out so.

    Attributes:
        pairs: what was folded so far, by the ids of convolution and BatchNorm; never more than the model has.
        between: the result of a joined convolution, on its way to the BatchNorm that passes it on.
    """

    def __init__(self, channels_last: bool = True) -> None:
        self.channels_last = channels_last
        self.pairs: dict[tuple[int, int], Pair] = {}
        self.between: tuple[Tensor, Pair, Tensor] | None = None
        self._stand_ins: dict[int, _StandIn] = {}  # by the layer's id
        self._placed: list[_StandIn] = []
        self._thread = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of the attack: they begin anew."""
        return Joining, (self.channels_last,)

    @contextmanager
    def joined(self, model: nn.Module) -> Iterator[None]:
        """The convolutions of a model, in evaluation mode, look ahead until the body ends or raises."""
        try:
            if _joinable(model):
                self._thread, self.between = threading.get_ident(), None
                for key, pair in list(self.pairs.items()):
                    if pair.fits():
                        pair.refresh()
                    else:
                        del self.pairs[key]
                self._place(model)
            yield
            self.check()
        finally:
            self._remove()
            self._placed, self.between = [], None
            for pair in self.pairs.values():
                pair.seen = None  # what changes weights by replaying a graph is not seen

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside `joined`: the model as it was written."""
        self._remove()
        try:
            yield
        finally:
            self._put()

    def pair(self, conv: Conv, norm: nn.Module | None) -> Pair | None:
        """What is folded of these, where it may stand for both in this very call."""
        stand_in = self._stand_ins.get(id(norm))
        if norm is None or stand_in is None or vars(norm).get("forward") is not stand_in.method:
            return None  # somebody else's forward, or none that passes on
        if hooked(norm) or _watched():
            return None
        key = id(conv), id(norm)
        pair = self.pairs.get(key)
        if pair is not None:
            return pair if pair.is_fresh() else None
        if not isinstance(norm, NORMS) or PARTNERS.get(type(conv)) is not type(norm):
            return None
        if torch.is_inference_mode_enabled():
            return None
        pair = Pair(conv, norm, self.channels_last)
        if not pair.fits():
            return None
        pair.refresh()
        if not _capturing(conv):  # where nothing is computed yet
            self.pairs[key] = pair
        return pair

    def check(self) -> None:
        """Raises ModelError if a joined result went elsewhere than it was seen to go: it must not be used silently."""
        if self.between is not None and self.here:
            self.between = None
            raise ModelError(
                "the result of a joined convolution did not reach its BatchNorm; attack with fold_batchnorm=False"
            )

    @property
    def here(self) -> bool:
        """Whether this is the thread that attacks."""
        return threading.get_ident() == self._thread

    def _place(self, model: nn.Module) -> None:
        for layer in model.modules():
            kind = _Conv if type(layer) in CONVS else _Norm if type(layer) in NORMS else None
            if kind is None or "forward" in vars(layer):
                continue
            stand_in = self._stand_ins.get(id(layer))
            if stand_in is None or stand_in.layer is not layer:
                stand_in = self._stand_ins[id(layer)] = kind(self, layer)
            self._placed.append(stand_in)
        self._put()

    def _put(self) -> None:
        for stand_in in self._placed:
            vars(stand_in.layer)["forward"] = stand_in.method

    def _remove(self) -> None:
        for stand_in in self._placed:
            vars(stand_in.layer).pop("forward", None)


class _StandIn(ABC):
    """What takes the place of a layer's forward; the same object in every call, by which recordings know it."""

    def __init__(self, joining: Joining, layer: Any) -> None:
        self.joining, self.layer, self.method = joining, layer, self.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        """For a copy of the layer, which lives on when the attack is over."""
        return type(self)(Joining(), copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise."""
        return type(self), (Joining(), self.layer)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name, by which it may be called)
        """Stands for the layer's own."""


class _Conv(_StandIn):
    """A convolution that looks ahead."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The convolution's output, or that of the BatchNorm which is handed it next."""
        conv, joining = self.layer, self.joining
        pair = None
        if not torch.compiler.is_compiling() and joining.here and input.dim() == conv.weight.dim():
            joining.check()
            pair = joining.pair(conv, next_module(sys._getframe(), conv))
        if pair is None:
            out: Tensor = conv._conv_forward(input, conv.weight, conv.bias)
            return out
        out = conv._conv_forward(input, pair.weight, pair.bias)
        joining.between = out, pair, input
        return out


class _Norm(_StandIn):
    """A BatchNorm that passes on what was done before."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The BatchNorm's output."""
        norm, joining = self.layer, self.joining
        between = None if torch.compiler.is_compiling() else joining.between
        if between is not None and between[0] is input and joining.here:
            (_, pair, x), joining.between = between, None
            if pair.norm is norm:
                return input
            # the caller has taken another one: from the beginning
            input = pair.conv._conv_forward(x, pair.conv.weight, pair.conv.bias)  # noqa: A001
        out: Tensor = type(norm).forward(norm, input)
        return out


_for_all = [hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and "ward" in name]


def _watched() -> bool:
    """Whether something stands around all layers that may make a difference between one and two of them."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._len_torch_function_stack():  # a default device is one
        return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    return any(_for_all)


def _capturing(conv: Conv) -> bool:
    return conv.weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _joinable(model: nn.Module) -> bool:
    layers = list(model.modules())
    return (
        any(type(layer) in NORMS for layer in layers)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and eager(model)
        and not any(_writes_unseen(kind) for kind in {type(layer) for layer in layers})  # type: ignore[arg-type]
    )


@functools.cache
def _writes_unseen(kind: Any) -> bool:
    """Whether what a class of somebody's own runs in its forward reaches for ``.data``: such writes are not counted."""
    forward = vars(kind).get("forward", getattr(kind, "forward", None))
    if kind.__module__.partition(".")[0] == "torch" or not isinstance(forward, FunctionType):
        return False
    known, waiting = set(), [forward]
    while waiting:
        function = waiting.pop()
        if function in known or function.__module__.partition(".")[0] == "torch":
            continue
        known.add(function)
        for code in _nested(function.__code__):
            if "data" in code.co_names:
                return True
            called = (getattr(kind, name, function.__globals__.get(name)) for name in code.co_names)
            waiting += [one for one in called if isinstance(one, FunctionType)]
    return False


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
