"""The spectral ops as torch sees them: schemas, fake kernels and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError
from afd.ops import backend
from afd.ops.ambient import unaffected
from afd.ops.library import define
from afd.ops.spectral import autograd, checks, native, reference

# --- spectral_norm --------------------------------------------------------------------------------------------------


@unaffected
def spectral_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, eps: float, first: str, names: list[str]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The op on CPU and CUDA, without gradients: what is left of it where there is nothing to dispatch."""
    checks.group(names, weights, us, vs, n_iter, eps, first)
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


define(
    "spectral_norm",
    "Tensor[] weights, Tensor[] us, Tensor[] vs, int n_iter, float eps, str first, str[] names",
    "(Tensor, Tensor[], Tensor[])",
    spectral_norm,
    _fake_norm,
    autograd.spectral_norm,
)


# --- spectral_linear ------------------------------------------------------------------------------------------------


def _spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, slope: float
) -> Tensor:
    checks.linear(x, weight, bias, sigma, u, v, slope)
    serve = native if backend.serves_natively(x) else reference
    out: Tensor = serve.spectral_linear(x, weight, bias, sigma, slope)
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
    slope: float,
    wanted: list[bool],
) -> list[Tensor]:
    checks.linear(x, weight, bias, sigma, u, v, slope)
    checks.gradient("grad", grad, (x.shape[0], weight.shape[0]), x)
    checks.gradient("out", out, (x.shape[0], weight.shape[0]), x)
    if backend.serves_natively(x):
        return native.spectral_linear_backward(grad, x, weight, bias, out, sigma, u, v, slope, wanted)
    found = reference.spectral_linear_backward(grad, x, weight, bias, out, sigma, u, v, slope)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want]


def _fake_linear_backward(_grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    bias = weight.new_empty(weight.shape[0])
    return [torch.empty_like(t) for t, want in zip((x, weight, bias), rest[-1], strict=True) if want]


_SPECTRUM = "Tensor sigma, Tensor u, Tensor v"
define(
    "spectral_linear",
    f"Tensor x, Tensor weight, Tensor? bias, {_SPECTRUM}, float negative_slope",
    "Tensor",
    _spectral_linear,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    autograd.spectral_linear,
)
define(
    "spectral_linear_backward",
    f"Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor out, {_SPECTRUM}, float negative_slope, "
    "bool[3] wanted",
    "Tensor[]",
    _spectral_linear_backward,
    _fake_linear_backward,
)


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
    checks.head(h, w, bias, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e)
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
    wanted: list[bool],
) -> list[Tensor]:
    checks.head(h, w, None, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e)
    checks.gradient("grad", grad, (h.shape[0],), h)
    of_e = None if sigma_e is None or u_e is None or v_e is None else (sigma_e, u_e, v_e)
    serve = native if backend.serves_natively(h) else reference
    found = serve.projection_logits_backward(grad, h, w, (sigma_w, u_w, v_w), y, e, of_e)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want and gradient is not None]


def _fake_projection_backward(_grad: Tensor, h: Tensor, w: Tensor, *rest: Any) -> list[Tensor]:
    e, wanted = rest[4], rest[-1]
    shapes = (h, w, w[:, 0], e)
    return [torch.empty_like(t) for t, want in zip(shapes, wanted, strict=True) if want]


_SPECTRA = "Tensor sigma_w, Tensor u_w, Tensor v_w, Tensor? y, Tensor? e, Tensor? sigma_e, Tensor? u_e, Tensor? v_e"
define(
    "projection_logits",
    f"Tensor h, Tensor w, Tensor? bias, {_SPECTRA}",
    "Tensor",
    _projection_logits,
    lambda h, *_: h.new_empty(h.shape[0]),
    autograd.projection_logits,
)
define(
    "projection_logits_backward",
    f"Tensor grad, Tensor h, Tensor w, {_SPECTRA}, bool[4] wanted",
    "Tensor[]",
    _projection_logits_backward,
    _fake_projection_backward,
)
