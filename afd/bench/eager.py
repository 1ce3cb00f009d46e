"""Ops as a careful user of PyTorch would write them: float32, in place, no sort where none is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import ops


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """`afd.ops.project`; in L1 with a fixed number of Newton passes, since asking whether to go on would wait."""
    if norm == "Linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp_(low, high)
    u = (x_adv - x).flatten(1)
    if norm == "L2":
        u *= (eps / torch.linalg.vector_norm(u, dim=1, keepdim=True)).clamp_(max=1.0)
        return u.view_as(x).add_(x).clamp_(low, high)
    size, flat = u.abs(), x.flatten(1)
    room = torch.where(u > 0, high - flat, flat - low)
    threshold = torch.zeros_like(u[:, :1])
    for _ in range(8):  # as many as a random CIFAR-sized image needs
        excess = size - threshold
        sloping = torch.count_nonzero((excess > 0) & (excess < room), dim=1).unsqueeze_(1)
        off = torch.minimum(excess.clamp_(min=0.0), room).sum(1, keepdim=True).sub_(eps)
        threshold = (threshold + off / sloping.clamp_(min=1)).clamp_(min=0.0)
    kept = torch.minimum((size - threshold).clamp_(min=0.0), room)
    return kept.copysign_(u).view_as(x).add_(x).clamp_(low, high)


def project_plane(x: Tensor, w: Tensor, b: Tensor, at: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """`afd.ops.project_plane` in the box [0, 1]; in Linf and L2 with a fixed number of Newton passes."""
    flat, w = x.flatten(1), w.flatten(1).float()
    value = b[:, None] + (w * (flat - at.flatten(1))).sum(1, keepdim=True)
    fall, need = w * value.sign(), value.abs()
    size, room = fall.abs(), torch.where(fall > 0, flat, 1 - flat)
    if norm == "L1":
        order = size.argsort(dim=1, descending=True)
        taken = (size * room).gather(1, order).cumsum(1)
        most = (need - (taken - (size * room).gather(1, order))).clamp_(min=0.0) / size.gather(1, order).clamp(
            min=1e-30
        )
        moves = torch.zeros_like(size).scatter_(1, order, most).minimum(room)
    else:
        pace = size if norm == "L2" else torch.ones_like(size)
        t = torch.zeros_like(need)
        for _ in range(6):  # as many as a random image needs
            reach = t * pace
            slope = (size * pace * (reach < room)).sum(1, keepdim=True)
            t = t + (need - (size * reach.minimum(room)).sum(1, keepdim=True)) / slope.clamp_(min=1e-30)
        moves = (t * pace).minimum(room)
    moved = torch.where(size > 0, flat - fall.sign() * moves, flat)
    return moved.view_as(x), torch.linalg.vector_norm(moved - flat, {"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)


def pgd_step(x_adv: Tensor, x: Tensor, grad: Tensor, alpha: float, eps: float, norm: str) -> Tensor:
    """`afd.ops.pgd_step` for float32 images; the gradient may be shorter."""
    if norm == "Linf":
        return project(torch.add(x_adv, grad.sign(), alpha=alpha), x, eps, norm)
    flat = grad.flatten(1).float()
    if norm == "L2":
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        step = flat * (alpha / length.clamp_(min=1e-12))
    else:
        size = flat.abs()
        last = size.topk(max(1, round(0.05 * flat.shape[1])), dim=1, sorted=False).values.amin(1, keepdim=True)
        step = flat.sign() * (size >= last)
        step *= alpha / torch.count_nonzero(step, dim=1).unsqueeze_(1)
    return project(step.view_as(x).add_(x_adv), x, eps, norm)


def spectral_norms(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """`afd.ops.spectral_norm`'s sigmas, as torch.nn.utils.parametrizations.spectral_norm makes them."""
    sigmas = []
    for weight, u, v in zip(weights, us, vs, strict=True):
        u = F.normalize(torch.mv(weight, v), dim=0)
        sigmas.append(torch.dot(u, torch.mv(weight, F.normalize(torch.mv(weight.T, u), dim=0))))
    return sigmas


def normalised(weight: Tensor, spectrum: ops.Spectrum) -> Tensor:
    """As torch's parametrisation: sigma is recomputed, so that the gradient goes through it."""
    return weight / torch.dot(spectrum.u, torch.mv(weight, spectrum.v))
