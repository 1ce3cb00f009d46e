"""The spectral ops as they are called: dispatched by torch, or as formulas where a transform of torch.func follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd.ops.ambient import plain, transformed, unaffected
from afd.ops.library import call
from afd.ops.spectral import checks, reference, schema


def spectral_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, eps: float, first: str, names: list[str]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """See `afd.ops.spectral_norm`."""
    arguments = (weights, us, vs, n_iter, eps, first, names)
    found: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]
    if plain(*weights, *us, *vs) and not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        found = schema.spectral_norm(*arguments)
    elif transformed() and _tensors(*weights, *us, *vs):
        checks.group(names, weights, us, vs, n_iter, eps, first)
        found = _norm_formula(weights, us, vs, n_iter, eps, first)
    else:
        found = call(torch.ops.afd.spectral_norm.default, *arguments)
    return found


def spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, slope: float
) -> Tensor:
    """See `afd.ops.spectral_linear`."""
    arguments = (x, weight, bias, sigma, u, v, slope)
    out: Tensor
    if transformed() and _tensors(*arguments[:-1]):
        checks.linear(*arguments)
        out = _linear_formula(*arguments)
    else:
        out = call(torch.ops.afd.spectral_linear.default, *arguments)
    return out


def projection_logits(*arguments: Tensor | None) -> Tensor:
    """See `afd.ops.projection_logits`; arguments as its schema has them."""
    score: Tensor
    if transformed() and _tensors(*arguments):
        checks.head(*arguments)  # type: ignore[arg-type]
        score = _head_formula(*arguments)
    else:
        score = call(torch.ops.afd.projection_logits.default, *arguments)
    return score


# --- Formulas -------------------------------------------------------------------------------------------------------


def _tensors(*given: Any) -> bool:
    return all(one is None or isinstance(one, Tensor) for one in given)


@unaffected
def _norm_formula(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    fixed, u, v = ([tensor.detach() for tensor in tensors] for tensors in (weights, us, vs))
    sigma, new_us, new_vs = reference.spectral_norm(fixed, u, v, *settings)
    followed = map(reference.along, sigma.unbind(), weights, new_us, new_vs)
    return torch.stack(list(followed)), new_us, new_vs


@unaffected
def _linear_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, u: Tensor, v: Tensor, slope: float
) -> Tensor:
    return reference.spectral_linear(x, weight, bias, reference.along(sigma.detach(), weight, u, v), slope)


@unaffected
def _head_formula(
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
    of_w = reference.along(sigma_w.detach(), w, u_w, v_w)
    labelled = y is not None and e is not None and sigma_e is not None and u_e is not None and v_e is not None
    of_e = reference.along(sigma_e.detach(), e, u_e, v_e) if labelled else None  # type: ignore[union-attr, arg-type]
    return reference.projection_logits(h, w, bias, of_w, y, e, of_e)
