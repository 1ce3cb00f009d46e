"""Layers joined to the convolution before them, for as long as an attack runs: today, BatchNorm.

In evaluation mode BatchNorm is an affine map of each channel, so conv(x; W, b) followed by it is the one convolution
conv(x; s W, s (b - mean) + shift) with s = scale / sqrt(var + eps). On a CPU that saves one pass over the activations
forward and one backward at each layer. The gradient changes by rounding only.

Nothing is known of a model beforehand. While it runs, its convolutions put off their work: each returns a `Deferred`,
a tensor that knows its input and has no values. What happens to it next decides. Where the next thing is a layer in
`JOINS`, one convolution does the work of both; anything else makes it do its own work, as if it had not waited. So
whatever a forward does this time, a branch, a draw, another BatchNorm than a minute ago, is what is computed.

A forward in which that cannot be told is run again as it is written: where a `Deferred` disappeared unused or outlived
the forward (a model that keeps an activation), went where torch does not ask it (C++ extensions, `autograd.Function`),
or was used under another grad mode or autocast than it was made under, or after its input or weights were written to.
A convolution that was to no avail made to wait waits no more. What the forward had drawn and written down until then is
undone: a convolution waits for the first time in a forward before which all that was put aside (`Trial`).
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from afd.attacks.execution import unsafe_channels_last
from afd.attacks.trial import Trial
from afd.nn.modes import eager, version_of

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOST_PAIRS = 4  # of one convolution: what follows it may change now and then, but not be made anew in every forward
WIDE = (torch.float32, torch.float64)  # folded in less, a weight could overflow


class EscapedError(Exception):
    """What a deferred convolution should have computed cannot be told any more."""


class Deferred(Tensor):
    """The output of a convolution that has not been computed: a tensor without values that computes itself when used.

    To code that goes past torch's Python interface it is an empty tensor of device "meta", which mixes with no other.
    """

    work: Work

    @staticmethod
    def of(work: Work) -> Deferred:
        """The output of this work."""
        made: Deferred = Tensor._make_subclass(Deferred, _NOWHERE)
        made.work = work
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        join = JOINS.get(func)
        if join is not None and type(args[0]) is Deferred and args[0].work.value is None:
            found = join(args[0].work, *args[1:], **kwargs)
            if found is not NotImplemented:
                return found
        return func(*computed(args), **computed(kwargs))


_NOWHERE = torch.empty(0, device="meta")


def computed(values: Any) -> Any:
    """The values, containers of them too, with every `Deferred` among them computed by itself."""
    return tree_map_only(Deferred, lambda deferred: deferred.work.alone(), values)


class Work:
    """A convolution and its input: computed by itself, or together with what follows."""

    __slots__ = ("circumstances", "conv", "joining", "number", "value", "x")

    def __init__(self, joining: Joining, conv: Conv, x: Tensor) -> None:
        self.joining, self.conv, self.x = joining, conv, x
        self.circumstances = self._circumstances()
        self.value: Tensor | None = None
        self.number = joining.begin(conv)

    def alone(self) -> Tensor:
        """What the convolution computes by itself."""
        if self.value is None:
            self.check()
            self.joining.drop(self.conv)  # it waited in vain, or what it computed with another layer was not all
            self.joining.unused.pop(self.number, None)
            self.value = self.conv._conv_forward(self.x, self.conv.weight, self.conv.bias)
        return self.value

    def together(self, pair: Pair) -> Tensor:
        """What the convolution and the BatchNorm behind it compute."""
        self.joining.unused.pop(self.number, None)
        out: Tensor = self.conv._conv_forward(self.x, pair.weight, pair.bias)
        return out

    def check(self) -> None:
        """Raises EscapedError unless all is as it was when the convolution should have run."""
        if self._circumstances() != self.circumstances:
            self.joining.drop(self.conv)
            raise EscapedError

    def _circumstances(self) -> tuple[object, ...]:
        device, tensors = self.x.device.type, (self.x, self.conv.weight, self.conv.bias)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return *modes, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), *map(version_of, tensors)


# --- What can be joined ---------------------------------------------------------------------------------------------


class Pair:
    """A convolution's tensors and a BatchNorm's, and the weights of the one convolution that does the work of both.

    Args:
        conv: the convolution.
        statistics: mean, variance, weight and bias of the BatchNorm.
        eps: of the BatchNorm.
    """

    def __init__(self, conv: Conv, statistics: tuple[Tensor | None, ...], eps: float) -> None:
        self.tensors, self.eps = (conv.weight, conv.bias, *statistics), eps
        self.seen: tuple[object, ...] | None = None
        weight = conv.weight
        # a layout that convolutions are fastest in
        fast = weight.dim() == 4 and not unsafe_channels_last(conv, weight.device)
        layout = torch.channels_last if fast else torch.contiguous_format
        self.weight = torch.empty_like(weight, memory_format=layout, requires_grad=False)
        self.bias = torch.empty_like(weight[:, 0].flatten(1)[:, 0], requires_grad=False)

    def is_fresh(self) -> bool:
        """Whether no tensor has been written to, or given other memory, since the last refresh."""
        return self.seen == self._now()

    @torch.no_grad()
    def refresh(self) -> None:
        """Folds the tensors as they are now, in place, so that recorded graphs see them."""
        conv_weight, conv_bias, mean, var, weight, bias = self.tensors
        assert conv_weight is not None
        assert mean is not None
        assert var is not None
        scale = (var + self.eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        torch.mul(conv_weight, scale.view(-1, *[1] * (self.weight.dim() - 1)), out=self.weight)
        centre = -mean if conv_bias is None else conv_bias - mean
        shift = 0.0 if bias is None else bias
        self.bias.copy_(centre * scale + shift)
        self.seen = self._now()

    def _now(self) -> tuple[object, ...]:
        return tuple(None if one is None else (one._version, one.data_ptr()) for one in self.tensors)


def _batch_norm(
    work: Work,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001  (of running statistics, which stay as they are)
    eps: float = 1e-5,
) -> Any:
    """`F.batch_norm` of a deferred convolution; NotImplemented where it is no fixed affine map of each channel."""
    if training or running_mean is None or running_var is None or eps < 0:
        return NotImplemented
    work.check()
    pair = work.joining.pair(work, (running_mean, running_var, weight, bias), eps)
    return NotImplemented if pair is None else work.together(pair)


JOINS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    Tensor.dim: lambda work: work.x.dim(),  # BatchNorm asks for it first; a convolution leaves it as it is
}


# --- A model whose convolutions wait --------------------------------------------------------------------------------


class Joining:
    """What one attack knows of the convolutions of its model.

    Attributes:
        pairs: folded weights, by the layers that they stand for.
        unused: convolutions that the running forward put off and has not come back to.
    """

    def __init__(self) -> None:
        self.pairs: dict[tuple[object, ...], Pair] = {}
        self.unused: dict[int, Conv] = {}
        self._numbers = itertools.count()
        self._made: list[weakref.ref[Deferred]] = []
        self._trial: Trial | None = None  # of the running forward
        self._news = True  # whether a convolution may have something to try
        self._stand_ins: dict[int, _StandIn] = {}  # by the layer's id
        self._placed: list[_StandIn] = []

    @contextmanager
    def joined(self, model: nn.Module) -> Iterator[None]:
        """The convolutions of a model, in evaluation mode, wait for what follows until the body ends or raises."""
        try:
            if _joinable(model):
                for pair in self.pairs.values():
                    pair.refresh()
                self._place(model)
            yield
        finally:
            self._remove()
            self._placed = []
            for pair in self.pairs.values():
                pair.seen = None  # what changes weights by replaying a graph is not seen

    def run(self, model: nn.Module, x: Tensor) -> Any:
        """What a model returns for a copy of x, which it may overwrite; call inside `joined`."""
        if not self._placed:
            return model(x.clone())
        trial = self._trial = Trial(model) if self._news else None
        try:
            return self._attempt(model, x)
        except EscapedError:
            pass  # what the model raises now is its own
        finally:
            self._trial = None
        if trial is not None:
            trial.undo()
        with self.suspended():
            return model(x.clone())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside `joined`: the model as it was written."""
        self._remove()
        try:
            yield
        finally:
            self._put()

    def pair(self, work: Work, statistics: tuple[Tensor | None, ...], eps: float) -> Pair | None:
        """The folded weights of a convolution and these, fresh; None where they cannot be folded."""
        conv = work.conv
        tensors = (conv.weight, conv.bias, *statistics)
        given = [tensor for tensor in tensors if tensor is not None]
        if any(tensor.requires_grad or tensor.is_inference() for tensor in given):
            return None
        key = (id(conv), *map(id, statistics), eps)
        pair = self.pairs.get(key)
        if pair is None or any(one is not other for one, other in zip(pair.tensors, tensors, strict=True)):
            channels, kind = conv.weight.shape[:1], (conv.weight.dtype, conv.weight.device)
            alike = all((t.dtype, t.device) == kind and type(t) in (Tensor, nn.Parameter) for t in given)
            vectors = all(tensor.shape == channels for tensor in given[1:])
            few = sum(of == id(conv) for of, *_ in self.pairs) < MOST_PAIRS or key in self.pairs
            if not (alike and vectors and few and kind[0] in WIDE and work.x.dim() == conv.weight.dim()):
                return None
            pair = self.pairs[key] = Pair(conv, statistics, eps)
        if not pair.is_fresh():
            pair.refresh()
        return pair

    def may_wait(self, stand_in: _Waiting) -> bool:
        """Whether a convolution may wait now: once it has done so, always; for the first time in a trial."""
        if stand_in.tried or self._trial is not None:
            return True
        self._news = True
        return False

    def begin(self, conv: Conv) -> int:
        """A convolution is put off; returns the number of its work."""
        number = next(self._numbers)
        self.unused[number] = conv
        return number

    def drop(self, conv: Conv) -> None:
        """This convolution waits no more."""
        self._stand_ins[id(conv)].waits = False

    def made(self, deferred: Deferred) -> Deferred:
        """Remembers a deferred output of the running forward."""
        self._made.append(weakref.ref(deferred))
        return deferred

    def _attempt(self, model: nn.Module, x: Tensor) -> Any:
        self.unused.clear()
        self._made.clear()
        self._news = False
        try:
            output = computed(model(x.clone()))
        except EscapedError:
            raise
        except Exception as error:  # it may have met a tensor without values
            if self.unused:
                self._drop_unused()
                raise EscapedError from error
            raise
        kept = [deferred for deferred in (made() for made in self._made) if deferred is not None]
        if self.unused or kept:
            self._drop_unused()
            for deferred in kept:
                self.drop(deferred.work.conv)
            raise EscapedError
        return output

    def _drop_unused(self) -> None:
        for conv in self.unused.values():
            self.drop(conv)

    def _place(self, model: nn.Module) -> None:
        for layer in model.modules():
            if _hooked(layer):
                kind: type[_StandIn] = _Shown
            elif type(layer) in CONVS and "forward" not in vars(layer):
                kind = _Waiting
            else:
                continue
            stand_in = self._stand_ins.get(id(layer))
            if type(stand_in) is not kind or stand_in.layer is not layer:
                stand_in = self._stand_ins[id(layer)] = kind(self, layer)
            self._placed.append(stand_in)
        self._put()

    def _put(self) -> None:
        for stand_in in self._placed:
            vars(stand_in.layer).update(stand_in.methods)

    def _remove(self) -> None:
        for stand_in in self._placed:
            for name in stand_in.methods:
                vars(stand_in.layer).pop(name, None)


class _StandIn:
    """Methods that take the place of a layer's own; the same objects in every call, by which recordings know them."""

    methods: dict[str, Any]

    def __init__(self, joining: Joining, layer: Any) -> None:
        self.joining, self.layer, self.waits = joining, layer, True

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        """For a copy of the layer, which lives on when the attack is over."""
        other = type(self)(Joining(), copy.deepcopy(self.layer, memo))
        other.waits = False
        return other


class _Waiting(_StandIn):
    """A convolution that puts off its work."""

    def __init__(self, joining: Joining, layer: Any) -> None:
        super().__init__(joining, layer)
        self.methods, self.tried = {"forward": self.forward}, False

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output, computed once it is used."""
        if type(x) is Deferred:
            x = x.work.alone()
        if not (self.waits and type(x) is Tensor and self.joining.may_wait(self)):
            out: Tensor = self.layer._conv_forward(x, self.layer.weight, self.layer.bias)
            return out
        self.tried = True
        return self.joining.made(Deferred.of(Work(self.joining, self.layer, x)))


class _Shown(_StandIn):
    """A layer with hooks, which are shown computed tensors."""

    def __init__(self, joining: Joining, layer: Any) -> None:
        super().__init__(joining, layer)
        self.methods = {"_call_impl": self.call, "forward": self.forward}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's call, hooks included."""
        return type(self.layer)._call_impl(self.layer, *computed(args), **computed(kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        return computed(type(self.layer).forward(self.layer, *args, **kwargs))


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _joinable(model: nn.Module) -> bool:
    """Whether convolutions may wait: there is something to join, and all that looks on can be shown what it expects."""
    layers = list(model.modules())
    for layer in layers:
        if layer._backward_hooks or layer._backward_pre_hooks or (_hooked(layer) and "forward" in vars(layer)):
            return False
    for_all = (hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_"))
    watched = torch.compiler.is_compiling() or any(for_all)
    return not watched and any(isinstance(layer, _BatchNorm) for layer in layers) and eager(model)
