"""The spectral ops as their formulas in plain PyTorch, on any device; arguments arrive checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, eps: float, first: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """σ [len(weights)], and u and v after n_iter power iterations, computed in float64.

    With W = weight.flatten(1), an iteration is u = Wv/‖Wv‖, v = Wᵀu/‖Wᵀu‖ (in the other order if first is "v").
    A vector whose successor is no longer than eps stays as it is. σ = uᵀWv, or eps if |uᵀWv| is not above it.
    """
    sigmas, new_us, new_vs = [], [], []
    for weight, u, v in zip(weights, us, vs, strict=True):
        matrix, left, right = weight.flatten(1).double(), u.double(), v.double()
        for _ in range(n_iter):
            if first == "u":
                left = _unit(matrix @ right, left, eps)
            right = _unit(matrix.T @ left, right, eps)
            if first == "v":
                left = _unit(matrix @ right, left, eps)
        sigma = left @ (matrix @ right)
        sigmas.append(torch.where(sigma.abs() <= eps, eps, sigma))
        new_us.append(left.to(u.dtype, copy=True))
        new_vs.append(right.to(v.dtype, copy=True))
    return torch.stack(sigmas).to(weights[0].dtype), new_us, new_vs


def _unit(vector: Tensor, before: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(vector)
    return torch.where(length > eps, vector / length, before)


def along(sigma: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Sigma with the derivative of uᵀWv, u and v held fixed."""
    estimate = u @ (weight.flatten(1) @ v)
    return sigma + (estimate - estimate.detach())


# --- spectral_linear ------------------------------------------------------------------------------------------------


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, slope: float) -> Tensor:
    """act(x Wᵀ/σ + b), act(t) = t where t > 0 and slope·t elsewhere."""
    scaled = x @ weight.T / sigma
    return F.leaky_relu(scaled if bias is None else scaled + bias, slope)


def spectral_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, W and b, from the layer's output `out`.

    With d the gradient before the activation and s = x Wᵀ/σ: dx = dW/σ, db = Σ d, dW = (dᵀx - <d, s>·uvᵀ)/σ.
    """
    positive = out > 0
    d = torch.where(positive, grad, slope * grad)
    before = torch.where(positive, out, out / slope)
    scaled = before if bias is None else before - bias
    return d @ weight / sigma, (d.T @ x - (d * scaled).sum() * torch.outer(u, v)) / sigma, d.sum(0)


# --- projection_logits ----------------------------------------------------------------------------------------------


def projection_logits(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    sigma_w: Tensor,
    y: Tensor | None,
    e: Tensor | None,
    sigma_e: Tensor | None,
) -> Tensor:
    """h·w/σ_w + b + <h, e_y>/σ_e; a label that names no row of e gives NaN."""
    score = (h @ w.T).squeeze(1) / sigma_w
    if bias is not None:
        score = score + bias
    if y is None or e is None or sigma_e is None:
        return score
    return score + torch.where(_valid(y, e), (h * e[y.clamp(0, e.shape[0] - 1)]).sum(1) / sigma_e, torch.nan)


def projection_logits_backward(
    grad: Tensor,
    h: Tensor,
    w: Tensor,
    spectrum_w: tuple[Tensor, Tensor, Tensor],
    y: Tensor | None,
    e: Tensor | None,
    spectrum_e: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of h, w, b and e; a label that names no row of e moves no row of it.

    With G the gradient of the scaled matrix W/σ, that of W is (G - <G, W>/σ·uvᵀ)/σ.
    """
    dw = _through_sigma((grad @ h).unsqueeze(0), w, *spectrum_w)
    dh = torch.outer(grad, w[0] / spectrum_w[0])
    if y is None or e is None or spectrum_e is None:
        return dh, dw, grad.sum().unsqueeze(0), None
    valid, rows = _valid(y, e), y.clamp(0, e.shape[0] - 1)
    dh = dh + torch.where(valid, grad, torch.nan).unsqueeze(1) * e[rows] / spectrum_e[0]
    scattered = torch.zeros_like(e).index_add_(0, rows, torch.where(valid, grad, 0.0).unsqueeze(1) * h)
    return dh, dw, grad.sum().unsqueeze(0), _through_sigma(scattered, e, *spectrum_e)


def _through_sigma(grad: Tensor, matrix: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (grad - (grad * matrix).sum() / sigma * torch.outer(u, v)) / sigma


def _valid(y: Tensor, e: Tensor) -> Tensor:
    return (y >= 0) & (y < e.shape[0])
