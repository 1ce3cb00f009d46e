"""Layers joined to the convolution before them, for as long as an attack runs: BatchNorm, a shortcut's sum and ReLU.

In evaluation mode BatchNorm is an affine map of each channel, so conv(x; W, b) followed by it is the one convolution
conv(x; s W, s (b - mean) + shift) with s = scale / sqrt(var + eps). What is added to that and the ReLU behind it are
done with it (`afd.attacks.joined`), by weights that are kept in the dtype that autocast would cast them to at every
step; those of layers that nothing is joined to are kept so, too. The gradient changes by rounding only.

Nothing is known of a model beforehand, and no forward is taken for the next one. Each time that a convolution is
called, it asks what its caller will do with the result (`afd.attacks.callers`): if that goes straight into a BatchNorm,
whose values are now what they were when they were folded, the convolution does the work of both, and the BatchNorm
passes on what it is handed; so do the sum and the ReLU that are seen to follow. In all other cases each does its own
work: with hooks, modes of torch functions or transforms at work, weights or statistics that have changed since the
attack began, and whenever the caller may look at what lies between.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from afd.attacks import joined
from afd.attacks.callers import LOOKED_THROUGH, Consumer, Sum, consumers, hooked
from afd.attacks.joined import Conv, Kept
from afd.errors import ModelError
from afd.nn.modes import eager
from afd.python_state import watched, writes_unseen

CONVS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PARTNERS: dict[type, type] = dict(zip(CONVS, NORMS, strict=True))
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
RELU = F.relu  # stands for any of the next
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
SUMS = (Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


class Joining:
    """What one attack knows of the layers of its model.

    Args:
        channels_last: whether kept weights may be laid out so.

    Attributes:
        kept: weights, by the ids of layer and BatchNorm (0: none) and dtype; never more than the model has.
        between: a joined result on its way through what passes it on.
        watch: sees the functions that a model calls on it.
        looks: whether there is anything that a convolution could do the work of.
    """

    def __init__(self, channels_last: bool = True) -> None:
        self.channels_last = channels_last
        self.kept: dict[tuple[int, int, torch.dtype], Kept] = {}
        self.between: _Between | None = None
        self.watch = _Watch(self)
        self._stand_ins, self._placed = dict[int, _StandIn](), list[_StandIn]()  # the former by the layer's id
        self._thread, self.looks, self.fused = 0, False, False

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of the attack: they begin anew."""
        return Joining, (self.channels_last,)

    @property
    def pairs(self) -> dict[tuple[int, int, torch.dtype], Kept]:
        """The convolutions that a BatchNorm was folded into so far."""
        return {key: kept for key, kept in self.kept.items() if kept.norm is not None}

    @property
    def approximates(self) -> bool:
        """Whether any convolution has done the work of others so far, which changes results by rounding."""
        return self.fused or bool(self.pairs)

    @contextmanager
    def joined(self, model: nn.Module, casts: bool = True) -> Iterator[None]:
        """The layers of a model, in evaluation mode, look ahead in the body; `casts`: it may autocast."""
        try:
            if _joinable(model):
                self._thread, self.between = threading.get_ident(), None
                self.kept = {key: kept for key, kept in self.kept.items() if kept.fits()}
                joined.refresh(self.kept.values())
                self._place(model, casts or torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"))
            yield
            self.check()
        finally:
            self._remove()
            self._placed, self.between = [], None
            for kept in self.kept.values():
                kept.seen = None  # what changes weights by replaying a graph is not seen

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside `joined`: the model as it was written."""
        self._remove()
        try:
            yield
        finally:
            self._put()

    def keep(self, layer: Conv | nn.Linear, norm: Any, dtype: torch.dtype) -> Kept | None:
        """The weights of these in that dtype, where they may stand for both in this very call."""
        key = id(layer), 0 if norm is None else id(norm), dtype
        kept = self.kept.get(key)
        if kept is not None:
            return kept if kept.is_fresh() else None
        if torch.is_inference_mode_enabled():
            return None
        kept = Kept(layer, norm, dtype, self.channels_last)
        if not kept.fits():
            return None
        joined.refresh([kept])
        if not (layer.weight.is_cuda and torch.cuda.is_current_stream_capturing()):  # where nothing is computed yet
            self.kept[key] = kept
        return kept

    def stands(self, layer: Any) -> bool:
        """Whether a layer passes on what is done before it, and nobody else sees what it is shown."""
        stand_in = self._stand_ins.get(id(layer))
        return stand_in is not None and vars(layer).get("forward") is stand_in.method and not hooked(layer)

    def passed_on(self, shown: Tensor, station: Any) -> tuple[Tensor, bool]:
        """What a layer or function is to be shown, and whether its work is done in it already."""
        between = self.between
        if between is None or between.out is not shown or not self.here or torch.compiler.is_compiling():
            return shown, False
        if between.stations[0] is station and between.mode == joined.grad_mode():
            between.done.append(between.stations.pop(0))
            if not between.stations:
                self.between = None
            return shown, True
        self.between = None
        return between.redone(), False  # the caller takes another one, or records no gradient: from the beginning

    def latest_of(self, other: Any) -> Any:
        """What a BatchNorm or ReLU has returned; any other value as it is."""
        stand_in = self._stand_ins.get(id(other))
        return stand_in.latest() if isinstance(stand_in, _PassingOn) else other

    def check(self) -> None:
        """Raises ModelError if a joined result went elsewhere than it was seen to go: it must not be used silently."""
        if self.between is not None and self.here:
            missed = self.between.stations[0]
            self.between = None
            what = "its BatchNorm" if isinstance(missed, NORMS) else "the layers behind it"
            told = f"the result of a joined convolution did not reach {what}"
            raise ModelError(f"{told}; attack with fold_batchnorm=False")

    @property
    def here(self) -> bool:
        """Whether this is the thread that attacks."""
        return threading.get_ident() == self._thread

    def _place(self, model: nn.Module, casts: bool) -> None:
        layers = list(model.modules())
        self.looks = any(isinstance(layer, (*NORMS, *POOLS)) or _served(layer) for layer in layers)
        for layer in layers:
            kind = _stand_in_for(layer)
            may = (self.looks and kind is not _Linear) or (casts and kind in (_Conv, _Linear))
            if kind is None or "forward" in vars(layer) or not (may or joined.may_have_few_channels(layer)):
                continue
            stand_in = self._stand_ins.get(id(layer))
            if stand_in is None or stand_in.layer is not layer:
                stand_in = self._stand_ins[id(layer)] = kind(self, layer)
            self._placed.append(stand_in)
        self._stand_ins = {id(stand_in.layer): stand_in for stand_in in self._placed}
        self._put()

    def _put(self) -> None:
        for stand_in in self._placed:
            vars(stand_in.layer)["forward"] = stand_in.method

    def _remove(self) -> None:
        for stand_in in self._placed:
            vars(stand_in.layer).pop("forward", None)


class _Between:
    """A joined result on its way.

    Attributes:
        out: the result.
        stations: who will be shown it and pass it on: a BatchNorm, a `Sum`, a ReLU layer or `RELU`.
        done: those that have.
        mode: in which the convolution was called, and in which they must be.
    """

    def __init__(self, out: Tensor, stations: list[Any], conv: Conv, x: Tensor) -> None:
        self.out, self.stations, self.done = out, stations, list[Any]()
        self._conv, self._x, self.mode = conv, x, joined.grad_mode()

    def redone(self) -> Tensor:
        """What the result would be by now if nothing had been joined."""
        inference, grad = self.mode
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            out: Tensor = self._conv._conv_forward(self._x, self._conv.weight, self._conv.bias)
            for station in self.done:
                if isinstance(station, NORMS):
                    out = type(station).forward(station, out)
                else:
                    out = out + station.other if isinstance(station, Sum) else F.relu(out)
        return out


class _Watch(TorchFunctionMode):
    """Passes joined results on where a model's own forward calls functions on them: ReLU, and sums.

    It is there while such a forward runs, and for no longer.
    """

    def __init__(self, joining: Joining) -> None:
        self.joining = joining

    @property
    def on(self) -> bool:
        """Whether such a forward runs."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        between = self.joining.between
        if between is not None and any(one is between.out for one in args):
            station = between.stations[0]
            if isinstance(station, Sum) and not (func in SUMS and any(one is station.other for one in args)):
                station = None
            elif not isinstance(station, Sum):
                station = RELU if func in RELUS else None
            shown, done = self.joining.passed_on(between.out, station)
            if done:
                return shown
            args = [shown if one is between.out else one for one in args]
        return func(*args, **(kwargs or {}))


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
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for the layer's own."""


class _Conv(_StandIn):
    """A convolution that looks ahead."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name, by which it may be called)
        """The convolution's output, or that of the layers which are handed it next."""
        conv, joining = self.layer, self.joining
        dtype = None
        if not torch.compiler.is_compiling() and joining.here and input.dim() == conv.weight.dim():
            joining.check()
            dtype = None if watched(_Watch) else joined.computed_in(input, conv)
        if dtype is None:
            return conv._conv_forward(input, conv.weight, conv.bias)  # type: ignore[no-any-return]
        ahead = consumers(sys._getframe(), conv) if joining.looks else iter(())
        following, stations = next(ahead, None), []
        folds = PARTNERS.get(type(conv)) is type(following) and joining.stands(following)
        kept = joining.keep(conv, following, dtype) if folds else None
        if kept is not None:
            stations, following = [following], next(ahead, None)
        elif dtype != conv.weight.dtype:
            kept = joining.keep(conv, None, dtype)
        weight, bias = (conv.weight, conv.bias) if kept is None else (kept.weight, kept.bias)
        usual = weight.dtype == dtype and (kept is not None or joined.frozen(conv))
        x, geometry = input.to(dtype), joined.Geometry.of(conv) if usual else None
        kernel = None if geometry is None else joined.kernel_for(x, geometry)
        ends = self._pooled(following, ahead) if kernel is None else self._ends(following, ahead, x, geometry)
        if geometry is not None and (joined.few_channels(x, weight, geometry) if kernel is None else ends):
            other = ends[0].other if ends and isinstance(ends[0], Sum) else None
            joining.fused |= kernel is not None
            out = joined.joined_conv(x, weight, bias, geometry, kernel, other)
        else:
            out = conv._conv_forward(x, weight, bias)
        stations += ends
        if stations:
            joining.between = _Between(out, stations, conv, input)
        return out

    def _ends(self, following: Consumer | None, ahead: Iterator[Consumer], x: Tensor, geometry: Any) -> list[Consumer]:
        """A ReLU that follows, or a sum and a ReLU: what the convolution can do, too."""
        sums: list[Consumer] = []
        watched = self.joining.watch.on
        if isinstance(following, Sum) and watched:
            other = self.joining.latest_of(following.other)
            if not geometry.adds(other, x, self.layer.weight):
                return []
            sums, following = [Sum(other)], next(ahead, None)
        if type(following) is nn.ReLU and self.joining.stands(following):
            return [*sums, following]
        return [*sums, RELU] if watched and following in RELUS else []

    def _pooled(self, following: Consumer | None, ahead: Iterator[Consumer]) -> list[Consumer]:
        """A ReLU that follows and the pooling behind it, which is done first: less is left for the ReLU to do."""
        stands = self.joining.stands
        if type(following) is not nn.ReLU or not stands(following):
            return []
        pool = next(ahead, None)
        return [following, pool] if isinstance(pool, POOLS) and stands(pool) and not pool.return_indices else []


class _PassingOn(_StandIn):
    """A BatchNorm or ReLU that passes on what was done before.

    Attributes:
        latest: what it returned.
    """

    latest: Any = staticmethod(lambda: None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The layer's output."""
        shown, done = self.joining.passed_on(input, self.layer)
        out: Tensor = shown if done else type(self.layer).forward(self.layer, shown)
        self.latest = weakref.ref(out)
        return out


class _Pool(_StandIn):
    """A maximum over windows that does the ReLU before it afterwards."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The layer's output."""
        shown, relu_is_left = self.joining.passed_on(input, self.layer)
        out: Tensor = type(self.layer).forward(self.layer, shown)
        return joined.LastRelu.apply(out) if relu_is_left else out  # type: ignore[no-untyped-call]


class _Linear(_StandIn):
    """A linear layer whose weights are kept as autocast would cast them."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The layer's output."""
        layer, joining = self.layer, self.joining
        alone = not torch.compiler.is_compiling() and joining.here and not watched(_Watch)
        dtype = joined.computed_in(input, layer) if alone else None
        kept = None if dtype in (None, layer.weight.dtype) else joining.keep(layer, None, dtype)
        weights = layer if kept is None else kept
        return F.linear(input, weights.weight, weights.bias)


class _Custom(_StandIn):
    """A module of somebody's own, in whose forward functions are watched."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        joining, own = self.joining, type(self.layer).forward
        if torch.compiler.is_compiling() or not joining.here or joining.watch.on:
            return own(self.layer, *args, **kwargs)
        with joining.watch:
            return own(self.layer, *args, **kwargs)


LOOKED_THROUGH.add(_Custom.forward.__code__)
STAND_INS: dict[type, type[_StandIn]] = {
    **dict.fromkeys(CONVS, _Conv), **dict.fromkeys((*NORMS, nn.ReLU), _PassingOn), **dict.fromkeys(POOLS, _Pool),
    nn.Linear: _Linear,
}  # fmt: skip


def _stand_in_for(layer: nn.Module) -> type[_StandIn] | None:
    kind = type(layer)
    if kind in STAND_INS or kind.__module__.partition(".")[0] == "torch":
        computed = kind in (*CONVS, nn.Linear) and layer._parameters.get("weight") is None  # by somebody, in a forward
        return None if computed else STAND_INS.get(kind)
    return _Custom if isinstance(kind.forward, FunctionType) and any(map(_served, layer.modules())) else None


def _served(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return isinstance(layer, CONVS) and weight is not None and weight.device.type in joined.KERNELS


def _joinable(model: nn.Module) -> bool:
    layers = list(model.modules())
    return (
        any(type(layer) in (*CONVS, nn.Linear) for layer in layers)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and eager(model)
        and not writes_unseen(model)
    )
