"""Passes of a model, counted: forwards, backwards to the input, backwards to the weights; and a pass's operations.

Passes are what the cost of a training method consists of, in a unit in which a forward is 1, and so is either part of a
backward. A training pass is 3, a step of an attack 2, or 3 where it computes gradients of weights, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from afd.attacks import engine
from afd.errors import AfdError

KINDS = ("forwards", "input_backwards", "weight_backwards")


class UncountableError(AfdError):
    """A model has too few convolutions for its passes to be counted."""


@dataclass(frozen=True)
class Passes:
    """How often each image of a batch went through a model.

    Attributes:
        forwards: of the model.
        input_backwards: backwards from the outputs to the images, or to the first layer.
        weight_backwards: backwards to the weights.
    """

    forwards: float
    input_backwards: float
    weight_backwards: float

    @property
    def cost(self) -> float:
        """All of them."""
        return self.forwards + self.input_backwards + self.weight_backwards

    @property
    def figures(self) -> dict[str, float]:
        """By name, for a document."""
        return {**{kind: getattr(self, kind) for kind in KINDS}, "cost": self.cost}


def counted(work: Callable[[], object], model: nn.Module, x: Tensor) -> Passes:
    """The passes that `work` takes of a model, or of copies of it, for each image of a batch x.

    Counted are the operations of convolutions, as they reach the device, so that it does not matter who calls them:
    backwards say themselves whether they go to their input, to their weights, or both. Where a gradient of the input is
    differentiated itself, a layer is applied once more, which counts as a forward, and its weights get a gradient. The
    first layer is left out: where images ask for no gradient, its input gets none. (What is compiled or replayed as a
    graph is not seen.) Those of networks beside the model are not, as far as their weights are of other shapes.

    Raises:
        UncountableError: the model has no convolution behind the first.
    """
    with _Convolutions() as once, torch.no_grad():
        model(x)
    first, others = once.first, once.images
    per_image = others["forwards"] - others["forwards", first]
    if not per_image:
        raise UncountableError("the model has no convolution behind the first; passes are counted by those")
    with _Convolutions(once.shapes) as found:
        work()
    return Passes(*((found.images[kind] - found.images[kind, first]) / per_image for kind in KINDS))


def by_operations(work: Callable[[], object], model: nn.Module, x: Tensor) -> Passes:
    """The passes that `work` takes of any model for each image of a batch x, by its operations, all told as forwards.

    They are those of matrix products and convolutions, as torch counts them, divided by those of one forward. Networks
    beside the model count, too, and a pass is a little less where the first layer's input asks for no gradient.

    Raises:
        UncountableError: the model has no such operation.
    """
    with FlopCounterMode(display=False) as once, torch.no_grad():
        model(x)
    if not once.get_total_flops():
        raise UncountableError("the model has neither matrix products nor convolutions to count passes by")
    with FlopCounterMode(display=False) as found:
        work()
    return Passes(found.get_total_flops() / once.get_total_flops(), 0.0, 0.0)


class _Convolutions(TorchDispatchMode):
    """Counts the images that convolutions are applied to, in all, and by the shape of the weights.

    Args:
        known: shapes of the model's weights, where they are known.

    Attributes:
        images: by kind of pass, and by kind and shape.
        first: shape of the first weights that were met.
        shapes: of all weights that were met.
    """

    def __init__(self, known: Collection[tuple[int, ...]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.images: Counter[Any] = Counter()
        self.first: tuple[int, ...] = ()
        self.shapes: set[tuple[int, ...]] = set()
        self.known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and lets the operation pass."""
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        if name == "convolution":
            self._count_convolution(args[0], args[1])
        elif name == "convolution_backward":
            to_input, to_weights = args[10][:2]
            kinds = ["input_backwards"] * to_input + ["weight_backwards"] * to_weights
            self._count(len(args[1]), args[2].shape, *kinds)
        return func(*args, **(kwargs or {}))

    def _count_convolution(self, x: Tensor, weight: Tensor) -> None:
        shape = weight.shape
        if not self.known or shape in self.known:
            self._count(len(x), shape, "forwards")
            return
        # the weights' gradient in a second derivative: images [C_in, N, ...] with gradients of outputs [C_out, N, ...]
        ends = (shape[0], x.shape[0])
        for one in [one for one in self.known if one[:2] == ends][:1]:
            self._count(x.shape[1], one, "weight_backwards")

    def _count(self, images: int, shape: Iterable[int], *kinds: str) -> None:
        shape = tuple(shape)
        if self.known and shape not in self.known:
            return  # of a network beside the model
        self.first = self.first or shape
        self.shapes.add(shape)
        for kind in kinds:
            self.images[kind] += images
            self.images[kind, shape] += images


# --- Their arithmetic ------------------------------------------------------------------------------------------------

COUNTED_IMAGES = 2  # operations are counted on so many: they grow with the batch
Shape = Sequence[int]  # of a tensor, or one number a side


def pass_flops(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Operations of one forward and input gradient: those of matrix products and convolutions.

    As torch counts them, but without the products of a convolution with its padding, which oneDNN leaves out.
    """
    counted = min(COUNTED_IMAGES, len(x))
    images = x[:counted].clone().requires_grad_()
    aten = torch.ops.aten
    formulas = {aten.convolution: _conv_flops, aten.convolution_backward: _conv_backward_flops}
    with engine.evaluating(model), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        torch.autograd.backward(F.cross_entropy(model(images), y[:counted], reduction="sum"))
    return float(counter.get_total_flops()) * len(x) / counted


def _conv_flops(
    x: Shape, weight: Shape, _bias: Shape | None, stride: Shape, padding: Shape, dilation: Shape, transposed: bool,
    *_: Any, out_shape: Shape,
) -> int:  # fmt: skip
    """Of a convolution of tensors of these shapes; a transposed one has the products of that whose gradient it is."""
    near, far = (out_shape, x) if transposed else (x, out_shape)
    sides = zip(near[2:], far[2:], weight[2:], stride, padding, dilation, strict=True)
    return 2 * x[0] * weight[0] * weight[1] * math.prod(starmap(_products, sides))


def _conv_backward_flops(
    grad: Shape, x: Shape, weight: Shape, bias: Shape | None, *settings: Any, out_shape: object
) -> int:
    """As many for each gradient that is asked for, of the input and of the weights."""
    del out_shape
    *how, wanted = settings
    return int(wanted[0] + wanted[1]) * _conv_flops(x, weight, bias, *how, out_shape=grad)


@cache
def _products(side: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Products along one side of the image that are not with padding."""
    places = (i * stride + k * dilation - padding for i in range(out) for k in range(kernel))
    return sum(0 <= place < side for place in places)
