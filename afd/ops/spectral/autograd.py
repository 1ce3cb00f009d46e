"""Gradients of the spectral ops, of any order.

Each op is registered under torch's Autograd key as a `torch.autograd.Function` that calls the op again below it: what
`torch.library.register_autograd` does, at less than half of its cost per call, which short layers feel.

The first backward is an op of its own. Where the backward is itself differentiated (gradient penalties), autograd
derives it from the formula instead, each pass of it as undisturbed by ambient modes as the formula itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from afd.ops.library import unaffected
from afd.ops.spectral import reference

Context = Any
Found = tuple[Tensor | None, ...]


def derive(formula: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None]) -> Found:
    """Gradients of formula(*inputs), differentiable if that is recorded; None where an input is None or needs none."""

    def gradients(grad: Tensor, *inputs: Tensor | None) -> Found:
        return _gradients(lambda *given: (formula(*given),), (grad,), inputs, recorded)

    recorded = torch.is_grad_enabled()
    if not recorded:
        return gradients(grad, *inputs)
    found: Found = _Differentiable.apply(gradients, grad, *inputs)  # type: ignore[no-untyped-call]
    return found


def _gradients(
    formula: Callable[..., Found],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    recorded: bool = True,
) -> Found:
    with torch.enable_grad():
        # Aliases: an input may depend on another, and each gradient is the partial one.
        fresh = [None if t is None else t.view_as(t) for t in inputs]
        return _back_through(formula(*fresh), grads, fresh, create_graph=recorded)


def _back_through(
    outputs: Found, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], **settings: bool
) -> Found:
    ends = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not (ends and wanted):
        return tuple(None for _ in inputs)
    heads, tails = ([o for o, _ in ends], [g for _, g in ends])
    found = iter(torch.autograd.grad(heads, wanted, tails, allow_unused=True, **settings))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


class _Differentiable(Function):
    """formula(*inputs), recorded in a graph of its own, which its backward runs through."""

    @staticmethod
    def forward(ctx: Context, formula: Callable[..., Found], *inputs: Tensor | None) -> Found:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
            outputs = formula(*leaves)
        ctx.save_for_backward(*inputs)
        ctx.formula, ctx.leaves, ctx.outputs = formula, leaves, outputs
        return tuple(None if t is None else t.detach() for t in outputs)

    @staticmethod
    @unaffected
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # looked at even where not used: torch notices here if they have been written over
        if not torch.is_grad_enabled():
            return None, *_back_through(ctx.outputs, grads, ctx.leaves, retain_graph=True)

        def gradients(*given: Tensor | None) -> Found:
            return _gradients(ctx.formula, given[: len(grads)], given[len(grads) :])

        found: Found = _Differentiable.apply(gradients, *grads, *inputs)  # type: ignore[no-untyped-call]
        return None, *found


def _below(name: str, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.afd, name).default(*arguments)


def _spread(found: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """The gradients found, each in the place where it was wanted."""
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]


# --- Formulas -------------------------------------------------------------------------------------------------------


@unaffected
def norm_formula(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`spectral_norm` as autograd and transforms can follow it: dσ = uᵀ dW v."""
    fixed, u, v = ([tensor.detach() for tensor in tensors] for tensors in (weights, us, vs))
    sigma, new_us, new_vs = reference.spectral_norm(fixed, u, v, *settings)
    followed = map(reference.along, sigma.unbind(), weights, new_us, new_vs)
    return torch.stack(list(followed)), new_us, new_vs


@unaffected
def linear_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, slope: float
) -> Tensor:
    """`spectral_linear` likewise, through σ too."""
    return reference.spectral_linear(x, weight, bias, reference.along(sigma.detach(), weight, u, v), slope)


@unaffected
def head_formula(
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
    """`projection_logits` likewise, through both σ too."""
    of_w = reference.along(sigma_w.detach(), w, u_w, v_w)
    labelled = y is not None and e is not None and sigma_e is not None and u_e is not None and v_e is not None
    of_e = reference.along(sigma_e.detach(), e, u_e, v_e) if labelled else None  # type: ignore[union-attr, arg-type]
    return reference.projection_logits(h, w, bias, of_w, y, e, of_e)


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
                return linear_formula(x, weight, bias, sigma, u, v, ctx.slope)

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
                return head_formula(h, w, bias, sigma_w, u_w, v_w, y, e, sigma_e, u_e, v_e)

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
