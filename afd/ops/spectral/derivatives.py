"""Derivatives of any order from a formula, each pass of them as undisturbed by ambient modes as the formula itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from afd.ops.ambient import unaffected

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
