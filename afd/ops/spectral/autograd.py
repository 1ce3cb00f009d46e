"""Gradients of the spectral ops.

Each op is registered under torch's Autograd key as a `torch.autograd.Function` that calls the op again below it: what
`torch.library.register_autograd` does, at less than half of its cost per call, which short layers feel.

The first backward is an op of its own. Where the backward is itself differentiated (gradient penalties), autograd
derives it from the reference formulas instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from afd.ops.ambient import unaffected
from afd.ops.spectral import reference
from afd.ops.spectral.derivatives import derive

Context = Any


def _below(name: str, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.afd, name).default(*arguments)


def _spread(found: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """The gradients found, each in the place where it was wanted."""
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]


# --- spectral_norm --------------------------------------------------------------------------------------------------


class _SpectralNorm(Function):
    @staticmethod
    def forward(ctx: Context, rest: tuple[Any, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        sigma, us, vs = _below("spectral_norm", list(weights), *rest)
        ctx.shapes = [weight.shape for weight in weights]
        ctx.save_for_backward(*us, *vs)
        ctx.mark_non_differentiable(*us, *vs)
        return sigma, *us, *vs

    @staticmethod
    @unaffected
    def backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.shapes)
        terms = zip(grad.unbind(), saved[:count], saved[count:], ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.outer(g * u, v).view(shape) if needed else None for g, u, v, shape, needed in terms)


def spectral_norm(weights: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`torch.ops.afd.spectral_norm` with dσ = uᵀ dW v."""
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        found: tuple[Tensor, list[Tensor], list[Tensor]] = _below("spectral_norm", weights, *rest)
        return found
    sigma, *vectors = _SpectralNorm.apply(rest, *weights)  # type: ignore[no-untyped-call]
    return sigma, vectors[: len(weights)], vectors[len(weights) :]


# --- spectral_linear ------------------------------------------------------------------------------------------------


class _SpectralLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        slope: float,
    ) -> Tensor:
        out: Tensor = _below("spectral_linear", x, weight, bias, sigma, u, v, slope)
        ctx.save_for_backward(x, weight, bias, out, sigma, u, v)
        ctx.slope = slope
        return out

    @staticmethod
    @unaffected
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, out, sigma, u, v = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                following = reference.along(sigma.detach(), weight, u, v)
                return reference.spectral_linear(x, weight, bias, following, ctx.slope)

            return *derive(formula, grad, [x, weight, bias]), None, None, None, None
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.afd.spectral_linear_backward.default(
            grad, x, weight, bias, out, sigma, u, v, ctx.slope, wanted
        )
        return *_spread(found, wanted), None, None, None, None


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """`torch.ops.afd.spectral_linear` with gradients of x, weight and bias; weight's goes through σ too."""
    needed = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    out: Tensor
    if torch.is_grad_enabled() and needed:
        out = _SpectralLinear.apply(x, weight, bias, *rest)  # type: ignore[no-untyped-call]
    else:
        out = _below("spectral_linear", x, weight, bias, *rest)
    return out


# --- projection_logits ----------------------------------------------------------------------------------------------


class _ProjectionLogits(Function):
    @staticmethod
    def forward(ctx: Context, *arguments: Tensor | None) -> Tensor:
        score: Tensor = _below("projection_logits", *arguments)
        ctx.save_for_backward(*arguments)
        return score

    @staticmethod
    @unaffected
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, w, bias, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(h: Tensor, w: Tensor, bias: Tensor | None, e: Tensor | None) -> Tensor:
                of_w = reference.along(sigma_w.detach(), w, u_w, v_w)
                of_e = None if e is None else reference.along(sigma_e.detach(), e, u_e, v_e)
                return reference.projection_logits(h, w, bias, of_w, y, e, of_e)

            dh, dw, db, de = derive(formula, grad, [h, w, bias, e if y is not None else None])
        else:
            needs = ctx.needs_input_grad
            wanted = [needs[0], needs[1], needs[2], needs[7] and y is not None]
            found = torch.ops.afd.projection_logits_backward.default(
                grad, h, w, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e, wanted
            )
            dh, dw, db, de = _spread(found, wanted)
        return dh, dw, db, None, None, None, None, de, None, None, None


def projection_logits(*arguments: Tensor | None) -> Tensor:
    """`torch.ops.afd.projection_logits` with gradients of h, w, bias and e; w's and e's go through their σ too."""
    h, w, bias, *_, e, _sigma, _u, _v = arguments
    score: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h, w, bias, e)):
        score = _ProjectionLogits.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        score = _below("projection_logits", *arguments)
    return score
