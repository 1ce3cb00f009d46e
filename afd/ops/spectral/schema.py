"""The spectral ops as torch sees them: what they allow, their schemas and their fake kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, one_of
from afd.ops import backend
from afd.ops.library import define, transformed, unaffected
from afd.ops.spectral import autograd, native, reference

# --- Checks ---------------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.float64)


def group(
    names: Sequence[str],
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_iter: int,
    eps: float,
    first: str,
) -> None:
    """Contiguous matrices (or filters) of one dtype and device, each with its u and v."""
    one_of("first", first, ("u", "v"))
    if not 0 <= n_iter < 2**31:
        raise InputError(f"n_iter is {n_iter}; it must be at least 0{'' if n_iter < 0 else ' and below 2**31'}")
    if not 1e-30 <= eps < math.inf:
        raise InputError(f"eps is {eps}; it must be a finite number >= 1e-30")
    if not len(weights) == len(us) == len(vs) == len(names) > 0:
        lengths = f"{len(weights)} weights, {len(us)} us, {len(vs)} vs and {len(names)} names"
        raise InputError(f"the group has {lengths}; it needs one of each for every layer, and at least one layer")
    for name, weight, u, v in zip(names, weights, us, vs, strict=True):
        if weight.dim() < 2 or not weight.numel():
            raise InputError(f"{name} has shape {list(weight.shape)}; it must be [rows, ...] and not empty")
        if not weight.is_contiguous():
            raise InputError(f"{name} has stride {weight.stride()}; it must be contiguous")
        rows = weight.shape[0]
        vector(f"u of {name}", u, rows, weight)
        vector(f"v of {name}", v, weight.numel() // rows, weight)
        like(name, weight, weights[0], names[0])
        if weight.dtype not in DTYPES:
            raise InputTypeError(f"{name} is {weight.dtype}; allowed are torch.float32 and torch.float64")


def like(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """`tensor` has the dtype and device of another one."""
    if tensor.device != other.device:
        raise InputError(f"{name} is on {tensor.device}; it must be on {other_name}'s device, {other.device}")
    if tensor.dtype != other.dtype:
        raise InputTypeError(f"{name} is {tensor.dtype}; it must have {other_name}'s dtype, {other.dtype}")


def vector(name: str, tensor: Tensor, length: int, weight: Tensor) -> None:
    """A vector [length] like the weight that it belongs to."""
    if tensor.shape != (length,):
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be [{length}]")
    like(name, tensor, weight, "the weight")


def features(name: str, x: Tensor, width: int) -> None:
    """A batch [N, width] of at least one sample."""
    if x.dim() != 2 or x.shape[1] != width:
        raise InputError(f"{name} has shape {list(x.shape)}; it must be [N, {width}]")
    if not x.shape[0]:
        raise InputError(f"{name} is an empty batch; it must hold at least one sample")
    if x.dtype not in DTYPES:
        raise InputTypeError(f"{name} is {x.dtype}; allowed are torch.float32 and torch.float64")


def gradient(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """What a backward pass is handed: of the forward's shape, dtype and device."""
    if tensor.shape != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    like(name, tensor, x, "the input")


def matrix(name: str, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, x: Tensor, x_name: str) -> None:
    """A contiguous matrix like x, with its σ, u and v."""
    if weight.dim() != 2:
        raise InputError(f"{name} has shape {list(weight.shape)}; it must be a matrix")
    if not weight.is_contiguous():
        raise InputError(f"{name} has stride {weight.stride()}; it must be contiguous")
    like(name, weight, x, x_name)
    if sigma.dim() != 0:
        raise InputError(f"sigma of {name} has shape {list(sigma.shape)}; it must be a scalar")
    like(f"sigma of {name}", sigma, weight, "the weight")
    vector(f"u of {name}", u, weight.shape[0], weight)
    vector(f"v of {name}", v, weight.shape[1], weight)


def bias(tensor: Tensor | None, weight: Tensor) -> None:
    """A bias for each row of the weight, or none."""
    if tensor is not None:
        vector("bias", tensor, weight.shape[0], weight)


def slope(value: float) -> None:
    """The slope of a LeakyReLU that can be undone."""
    if not 0 < value <= 1:
        raise InputError(f"negative_slope is {value}; it must be in (0, 1], where 1 is the identity")


def labels(y: Tensor, h: Tensor, classes: int) -> None:
    """Class indices, one a sample. Their values are looked at on the CPU only: elsewhere that would wait."""
    if y.dtype != torch.int64:
        raise InputTypeError(f"y is {y.dtype}; labels are torch.int64")
    if y.shape != h.shape[:1]:
        raise InputError(f"y has shape {list(y.shape)}; it must be [{h.shape[0]}], one label for each sample")
    if y.device != h.device:
        raise InputError(f"y is on {y.device}; it must be on the features' device, {h.device}")
    if y.device.type == "cpu" and y.numel() and not transformed():
        least, most = (int(extreme) for extreme in y.aminmax())
        if least < 0 or most >= classes:
            raise InputError(f"y holds {least if least < 0 else most}; labels must be in [0, {classes})")


def linear(
    x: Tensor, weight: Tensor, b: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, negative_slope: float
) -> None:
    """All that `afd.ops.spectral_linear` says of its arguments."""
    matrix("weight", weight, sigma, u, v, x, "x")
    features("x", x, weight.shape[1])
    bias(b, weight)
    slope(negative_slope)


def head(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    sigma_w: Tensor,
    u_w: Tensor,
    v_w: Tensor,
    y: Tensor | None,
    e: Tensor | None,
    sigma_e: Tensor | None,
    u_e: Tensor | None,
    v_e: Tensor | None,
) -> None:
    """All that `afd.ops.projection_logits` says of its arguments."""
    matrix("w", w, sigma_w, u_w, v_w, h, "h")
    if w.shape[0] != 1:
        raise InputError(
            f"w has shape {list(w.shape)}; it must be [1, width], like the weight of a layer with one output"
        )
    features("h", h, w.shape[1])
    bias(b, w)
    if y is not None:
        if e is None or sigma_e is None or u_e is None or v_e is None:
            raise InputError("y is given without e; labels need an embedding and its spectrum")
        matrix("e", e, sigma_e, u_e, v_e, h, "h")
        if e.shape[1] != h.shape[1]:
            raise InputError(f"e has shape {list(e.shape)}; it must be [classes, {h.shape[1]}]")
        labels(y, h, e.shape[0])


# --- spectral_norm --------------------------------------------------------------------------------------------------


@unaffected
def spectral_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, eps: float, first: str, names: list[str]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The op on CPU and CUDA, without gradients: what is left of it where there is nothing to dispatch."""
    group(names, weights, us, vs, n_iter, eps, first)
    serve = native if backend.serves_natively(weights[0]) else reference
    found: tuple[Tensor, list[Tensor], list[Tensor]] = serve.spectral_norm(weights, us, vs, n_iter, eps, first)
    if found[0].device.type == "cpu":
        for name, sigma in zip(names, found[0].tolist(), strict=True):
            if sigma - sigma != 0:
                raise InputError(f"the spectral norm of {name} is {sigma}; its values must be finite, and not so large")
    return found


def _fake_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return weights[0].new_empty(len(weights)), [torch.empty_like(u) for u in us], [torch.empty_like(v) for v in vs]


define(spectral_norm, _fake_norm, autograd.spectral_norm)


# --- spectral_linear ------------------------------------------------------------------------------------------------


def _spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, negative_slope: float
) -> Tensor:
    linear(x, weight, bias, sigma, u, v, negative_slope)
    serve = native if backend.serves_natively(x) else reference
    out: Tensor = serve.spectral_linear(x, weight, bias, sigma, negative_slope)
    return out


def _spectral_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    negative_slope: float,
    wanted: Annotated[list[bool], 3],
) -> list[Tensor]:
    linear(x, weight, bias, sigma, u, v, negative_slope)
    gradient("grad", grad, (x.shape[0], weight.shape[0]), x)
    gradient("out", out, (x.shape[0], weight.shape[0]), x)
    if backend.serves_natively(x):
        return native.spectral_linear_backward(grad, x, weight, bias, out, sigma, u, v, negative_slope, wanted)
    found = reference.spectral_linear_backward(grad, x, weight, bias, out, sigma, u, v, negative_slope)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want]


def _fake_linear_backward(_grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    bias = weight.new_empty(weight.shape[0])
    return [torch.empty_like(t) for t, want in zip((x, weight, bias), rest[-1], strict=True) if want]


define(_spectral_linear, lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]), autograd.spectral_linear)
define(_spectral_linear_backward, _fake_linear_backward)


# --- projection_logits ----------------------------------------------------------------------------------------------


def _projection_logits(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    sigma_w: Tensor,
    u_w: Tensor,
    v_w: Tensor,
    y: Tensor | None,
    e: Tensor | None,
    sigma_e: Tensor | None,
    u_e: Tensor | None,
    v_e: Tensor | None,
) -> Tensor:
    head(h, w, bias, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e)
    serve = native if backend.serves_natively(h) else reference
    score: Tensor = serve.projection_logits(h, w, bias, sigma_w, y, e, sigma_e)
    return score


def _projection_logits_backward(
    grad: Tensor,
    h: Tensor,
    w: Tensor,
    sigma_w: Tensor,
    u_w: Tensor,
    v_w: Tensor,
    y: Tensor | None,
    e: Tensor | None,
    sigma_e: Tensor | None,
    u_e: Tensor | None,
    v_e: Tensor | None,
    wanted: Annotated[list[bool], 4],
) -> list[Tensor]:
    head(h, w, None, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e)
    gradient("grad", grad, (h.shape[0],), h)
    of_e = None if sigma_e is None or u_e is None or v_e is None else (sigma_e, u_e, v_e)
    serve = native if backend.serves_natively(h) else reference
    found = serve.projection_logits_backward(grad, h, w, (sigma_w, u_w, v_w), y, e, of_e)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want and gradient is not None]


def _fake_projection_backward(_grad: Tensor, h: Tensor, w: Tensor, *rest: Any) -> list[Tensor]:
    e, wanted = rest[4], rest[-1]
    shapes = (h, w, w[:, 0], e)
    return [torch.empty_like(t) for t, want in zip(shapes, wanted, strict=True) if want]


define(_projection_logits, lambda h, *_: h.new_empty(h.shape[0]), autograd.projection_logits)
define(_projection_logits_backward, _fake_projection_backward)
