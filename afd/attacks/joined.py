"""A convolution, the addition of a shortcut and the ReLU behind it as one function, and the weights that it is given.

Forward, each is one launch where the device has one; backward, the gradient is masked by where the output is positive
and taken at the images alone. What is kept for that is the output, which the next layer keeps anyway.

The weights are a layer's own as the attack computes with them: BatchNorm folded in, in the dtype that autocast would
cast them to at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.execution import unsafe_channels_last
from afd.nn.modes import version_of

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
WIDE = (torch.float32, torch.float64)  # folded in less, a weight could overflow


# --- Weights --------------------------------------------------------------------------------------------------------


class Kept:
    """The weights of a layer as an attack computes with them, or of a convolution and the BatchNorm behind it.

    Args:
        layer: a convolution or a linear layer.
        norm: the BatchNorm that is folded in, of as many dimensions; or None.
        dtype: that the attack computes in.
        channels_last: whether weights may be laid out so, which convolutions are fastest in.
    """

    def __init__(self, layer: Conv | nn.Linear, norm: Norm | None, dtype: torch.dtype, channels_last: bool) -> None:
        self.layer, self.norm = layer, norm
        weight = layer.weight
        fast = channels_last and weight.dim() == 4 and not unsafe_channels_last(layer, weight.device)
        layout = torch.channels_last if fast else torch.contiguous_format
        self.weight = torch.empty_like(weight, memory_format=layout, dtype=dtype, requires_grad=False)
        has_bias = norm is not None or layer.bias is not None
        self.bias = torch.empty(len(weight), dtype=dtype, device=weight.device) if has_bias else None
        self.seen: list[tuple[Tensor | None, int | None, int | None]] | None = None
        self.eps = 0.0 if norm is None else norm.eps

    def fits(self) -> bool:
        """Whether the layers are such as can be kept, in these tensors."""
        norm, weight = self.norm, self.layer.weight
        if norm is not None and (norm.training or norm.running_mean is None or norm.running_var is None):
            return False
        given = [tensor for tensor in self._tensors() if tensor is not None]
        return (
            self.eps >= 0
            and weight is self._tensors()[0]
            and self.layer.bias is self._tensors()[1]
            and weight.shape == self.weight.shape
            and weight.dtype in WIDE
            and (self.bias is not None or self.layer.bias is None)
            and all((t.dtype, t.device) == (weight.dtype, self.weight.device) for t in given)
            and all(type(t) in (Tensor, nn.Parameter) and not (t.requires_grad or t.is_inference()) for t in given)
            and all(vector.shape == weight.shape[:1] for vector in given[1:])
        )

    def is_fresh(self) -> bool:
        """Whether no tensor or setting is another one, or was written to, since the last refresh."""
        if self.seen is None or (self.norm is not None and (self.norm.training or self.norm.eps != self.eps)):
            return False
        for now, (then, version, place) in zip(self._tensors(), self.seen, strict=True):
            if now is not then:
                return False
            if now is not None and (now._version != version or now.data_ptr() != place or now.requires_grad):
                return False
        return True

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """As registered; an attribute of a module is asked for in each forward, which takes a while in Python."""
        own = self.layer._parameters
        if self.norm is None:
            return own.get("weight"), own.get("bias")
        affine, statistics = self.norm._parameters, self.norm._buffers
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        return own.get("weight"), own.get("bias"), mean, var, affine.get("weight"), affine.get("bias")


@torch.no_grad()
def refresh(kept: Iterable[Kept]) -> None:
    """Takes the layers as they are now, in place, so that recorded graphs see them.

    In a few launches for all layers of a kind, and one for each weight that is scaled.
    """
    kinds: dict[tuple[object, ...], list[Kept]] = {}
    for one in kept:
        given = tuple(None if tensor is None else tensor.dtype for tensor in one._tensors())
        kinds.setdefault((one.weight.dtype, one.weight.device, given), []).append(one)
    for alike in kinds.values():
        weights, biases, *of_norm = ([*tensors] for tensors in zip(*(one._tensors() for one in alike), strict=True))
        targets = [one.weight for one in alike]
        if of_norm:
            biases = _fold(alike, targets, weights, biases, *of_norm)
        else:
            torch._foreach_copy_(targets, weights)
        if biases[0] is not None:
            torch._foreach_copy_([one.bias for one in alike if one.bias is not None], biases)
        for one in alike:
            one.eps = one.eps if one.norm is None else one.norm.eps
            one.seen = [(t, version_of(t), None if t is None else t.data_ptr()) for t in one._tensors()]


def _fold(
    alike: list[Kept], targets: list[Tensor], weights: list[Any], biases: list[Any], means: list[Any],
    variances: list[Any], scales: list[Any], shifts: list[Any],
) -> list[Any]:  # fmt: skip
    """conv(x; W, b) and the norm behind it as conv(x; s W, s (b - mean) + shift), s = scale / sqrt(var + eps).

    Writes the weights, and returns the biases.
    """
    shares = torch._foreach_add(variances, [one.norm.eps for one in alike])  # type: ignore[union-attr]
    torch._foreach_sqrt_(shares)
    torch._foreach_reciprocal_(shares)
    if scales[0] is not None:
        torch._foreach_mul_(shares, scales)
    for target, weight, share in zip(targets, weights, shares, strict=True):
        torch.mul(weight, share.view(-1, *[1] * (weight.dim() - 1)), out=target)
    folded = list(torch._foreach_neg(means) if biases[0] is None else torch._foreach_sub(biases, means))
    torch._foreach_mul_(folded, shares)
    if shifts[0] is not None:
        torch._foreach_add_(folded, shifts)
    return folded


def computed_in(x: Tensor, layer: Conv | nn.Linear) -> torch.dtype | None:
    """The dtype that a layer computes x in; None where that is not its weights' and not autocast's."""
    weight, device = layer.weight, x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        low = torch.get_autocast_dtype(device)
        return low if x.dtype in (torch.float32, low) else None
    return weight.dtype if x.dtype == weight.dtype else None


def frozen(layer: Any) -> bool:
    """Whether a layer's weights are its own parameters, plain tensors that no gradient is asked of."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight is not layer.weight or bias is not layer.bias:
        return False  # computed by somebody, from the images maybe
    given = [one for one in (weight, bias) if one is not None]
    return all(type(one) in (Tensor, nn.Parameter) and not (one.requires_grad or one.is_inference()) for one in given)


def grad_mode() -> tuple[bool, bool]:
    """Whether this is inference mode, and whether operations are recorded."""
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


# --- Kernels --------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """How a convolution's window moves; padded by zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: Conv) -> Geometry | None:
        """That of a convolution that pads by zeros, on both sides alike; None of any other."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)

    def output(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """The shape of what comes out."""
        sizes = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        moves = [(size + 2 * pad - reach * (window - 1) - 1) // step + 1 for size, window, step, pad, reach in sizes]
        return len(x), len(weight), *moves

    def adds(self, other: Any, x: Tensor, weight: Tensor) -> bool:
        """Whether another value can be added to what comes out: a tensor like that."""
        alike = type(other) is Tensor and (other.dtype, other.device) == (x.dtype, x.device)
        return alike and other.shape == self.output(x, weight)


@dataclass(frozen=True)
class Kernel:
    """What computes relu(conv(x) + bias) and relu(conv(x) + bias + other) on a device; ReLU passes NaN on.

    Attributes:
        relu: (x, weight, bias, geometry) -> a new tensor.
        add_relu: (x, weight, bias, geometry, other) -> likewise.
        serves: (x, geometry) -> whether it can, and may.
    """

    relu: Callable[[Tensor, Tensor, Tensor | None, Geometry], Tensor]
    add_relu: Callable[[Tensor, Tensor, Tensor | None, Geometry, Tensor], Tensor]
    serves: Callable[[Tensor, Geometry], bool]


def kernel_for(x: Tensor, geometry: Geometry) -> Kernel | None:
    """What runs on x's device in its dtype; None where layers are better left to themselves."""
    kernel = KERNELS.get(x.device.type)
    return kernel if kernel is not None and x.numel() and kernel.serves(x, geometry) else None


def _cudnn_relu(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    out: Tensor = torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, *geometry)
    return out


def _cudnn_add_relu(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, other: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.cudnn_convolution_add_relu.default(x, weight, other, 1.0, bias, *geometry)
    return out


def _cudnn_serves(x: Tensor, geometry: Geometry) -> bool:
    """For images in float32 and less, in one group; not where results must be the same in each run."""
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    usual = x.dim() == 4 and geometry.groups == 1 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not usual or deterministic or not torch.backends.cudnn.is_acceptable(x):
        return False
    key = x.device, x.dtype
    if key not in _passes and not torch.cuda.is_current_stream_capturing():
        _passes[key] = passes_nan(CUDNN, *key)
    return _passes.get(key, False)


# None for CPUs: oneDNN's convolution with ReLU saves a pass, but turns NaN into 0, so that a broken model would look
# sound; and without it a function of ours costs more than what it saves.
CUDNN = Kernel(_cudnn_relu, _cudnn_add_relu, _cudnn_serves)
KERNELS = {"cuda": CUDNN}
NOT_OFFERED = ("cuDNN", "CUDNN", "unable to find an engine", "not implemented", "Could not run")
_passes: dict[tuple[torch.device, torch.dtype], bool] = {}


@torch.no_grad()
def passes_nan(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs there, and its ReLU turns no NaN into a number; waits for the device."""
    x = torch.full((1, 8, 4, 4), float("nan"), device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.ones(8, 8, 1, 1, device=device, dtype=dtype), torch.zeros(8, device=device, dtype=dtype)
    at = Geometry((1, 1), (0, 0), (1, 1), 1)
    try:
        outs = [kernel.relu(x, weight, bias, at), kernel.add_relu(x, weight, bias, at, torch.zeros_like(x))]
    except RuntimeError as error:
        if not any(told in str(error) for told in NOT_OFFERED):
            raise
        return False
    return all(bool(out.isnan().all()) for out in outs)


# --- One function ---------------------------------------------------------------------------------------------------


def joined_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    kernel: Kernel | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """`JoinedConv`, of which no weight gets a gradient."""
    out: Tensor = JoinedConv.apply(x, other, weight, bias, geometry, kernel)  # type: ignore[no-untyped-call]
    return out


class JoinedConv(torch.autograd.Function):
    """relu(conv(x) + bias + other), of which x and other have gradients; without a kernel, conv(x) + bias in 2D."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        kernel: Kernel | None,
    ) -> Tensor:
        """x [N, C, ...], weight [D, C / groups, ...], bias [D], other like the output [N, D, ...]; of one dtype."""
        if kernel is None:
            out = F.conv2d(x, weight, bias, *geometry)
        elif other is None:
            out = kernel.relu(x, weight, bias, geometry)
        else:
            out = kernel.add_relu(x, weight, bias, geometry, other)
        ctx.geometry, ctx.joined, ctx.shape = geometry, kernel is not None, x.shape
        ctx.layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        ctx.save_for_backward(weight, *([out] if ctx.joined else []))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of torch's own differentiable functions, so that a gradient has a gradient."""
        weight, *outs = ctx.saved_tensors
        if outs:
            grad = torch.ops.aten.threshold_backward(grad, outs[0], 0)
        to_x, to_other = ctx.needs_input_grad[:2]
        of_x = input_gradient(grad, weight, ctx.shape, ctx.geometry, ctx.layout) if to_x else None
        return of_x, grad if to_other else None, None, None, None, None


class LastRelu(torch.autograd.Function):
    """ReLU that keeps what it is given, which nobody else has: a model may write to the result in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [N, ...], which may be written to no more."""
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Of torch's own differentiable function, so that a gradient has a gradient."""
        (x,) = ctx.saved_tensors
        masked: Tensor = torch.ops.aten.threshold_backward(grad, x, 0)
        return masked


def input_gradient(
    grad: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry, layout: torch.memory_format
) -> Tensor:
    """The gradient at a convolution's input of that shape and layout, of one at its output [N, D, ...]."""
    if _few_channels(weight, shape, geometry) and grad.device.type == "cpu" and _is_channels_last(grad):
        return _of_few_channels(grad, weight, shape, geometry).to(grad.dtype).contiguous(memory_format=layout)
    like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)  # of which none is read
    stride, padding, dilation, groups = geometry
    out_padding = [0] * len(stride)
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, like, weight, None, stride, padding, dilation, False, out_padding, groups, [True, False, False]
    )
    return found[0]


MOST_CHANNELS, LEAST_SHARE, LEAST_OUTPUTS = 4, 16, 1 << 19  # measured: 1 to 32 at 28x28, 3 to 64 at 32x32


def few_channels(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the gradient at images x is found faster by a matrix product: see `_of_few_channels`."""
    on_cpu = x.device.type == "cpu" and x.dtype != torch.float64 and x.requires_grad and torch.is_grad_enabled()
    serves = on_cpu and _is_channels_last(x) and _few_channels(weight, x.shape, geometry)
    return serves and math.prod(geometry.output(x, weight)) >= LEAST_OUTPUTS


def may_have_few_channels(layer: nn.Module) -> bool:
    """Whether the gradient at a layer's images may be found so, if there are many."""
    geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
    if geometry is None:
        return False
    weight: Any = layer.weight
    on_cpu = weight.device.type == "cpu" and weight.dtype != torch.float64
    return on_cpu and _few_channels(weight, weight.shape, geometry)


def _few_channels(weight: Tensor, shape: torch.Size, geometry: Geometry) -> bool:
    """A convolution of images, to many more channels than they have."""
    outputs, inputs, *window = weight.shape
    many = inputs <= MOST_CHANNELS and outputs >= LEAST_SHARE * inputs
    usual = geometry.groups == 1 and set(geometry.dilation) == {1} and max(window) > 1
    return many and usual and len(shape) == 4


def _of_few_channels(grad: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient [N, C, H, W] float32 at images: one matrix product, whose columns are added where they belong.

    oneDNN computes the gradient at C channels as if there were as many as a register has floats.
    """
    count, channels, height, width = shape
    (rows, columns), (top, left) = geometry.stride, geometry.padding
    above, across = grad.shape[2:]
    tall, wide = weight.shape[2:]
    flat = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    taps = torch.mm(weight.flatten(1).t(), flat.t()).view(channels, tall, wide, count, above, across)
    padded = taps.new_zeros(channels, count, height + 2 * top, width + 2 * left, dtype=torch.float32)
    for i in range(tall):
        for j in range(wide):
            window = padded[:, :, i : i + rows * (above - 1) + 1 : rows, j : j + columns * (across - 1) + 1 : columns]
            window += taps[:, i, j]
    return padded[:, :, top : top + height, left : left + width].transpose(0, 1)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
