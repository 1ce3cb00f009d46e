"""Every op as its formula in plain PyTorch: what the kernels are tested against, and what serves where none runs.

The functions take arguments that `afd.ops.checks` has already accepted. They work on any device and floating dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
RANDOM_START_STREAM = 0
_MASK = 0xFFFFFFFF


def _per_sample(value: float, values: Tensor | None, x: Tensor) -> float | Tensor:
    """A setting in a shape that broadcasts against `x`."""
    return value if values is None else values.view(-1, *([1] * (x.dim() - 1)))


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> Tensor:
    """clamp(clamp(x_adv + α·sign(grad), x - ε, x + ε), low, high)."""
    step = _per_sample(alpha, alphas, x) * grad.sign().to(x.dtype)
    radius = _per_sample(eps, epsilons, x)
    return torch.minimum(torch.maximum(x_adv + step, x - radius), x + radius).clamp_(low, high)


def random_start(
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int = 0,
    epsilons: Tensor | None = None,
) -> Tensor:
    """clamp(x + ε·u, low, high), u uniform in (-1, 1) from Philox(seed; sample, element)."""
    samples, elements = x.shape[0], x[:1].numel()
    blocks = torch.arange((elements + 3) // 4, device=x.device)
    rows = torch.arange(samples, device=x.device) + first_sample  # wraps at 2**64 as the kernels do
    bits = philox(seed, rows[:, None], blocks[None, :], RANDOM_START_STREAM)
    uniform = symmetric_uniform(bits).flatten(1)[:, :elements].reshape(x.shape).to(x.dtype)
    return (x + _per_sample(eps, epsilons, x) * uniform).clamp_(low, high)


def philox(seed: int, sample: Tensor, block: Tensor, stream: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) in int64 arithmetic.

    Args:
        seed: 0 <= seed < 2**63, the 64-bit key.
        sample: int64 sample indices, broadcast against `block`.
        block: int64 block indices below 2**32; block b serves elements 4b ... 4b + 3.
        stream: separates uses that share a seed.

    Returns:
        int64 [..., 4] of unsigned 32-bit values.
    """
    sample, block = torch.broadcast_tensors(sample, block)
    c0, c1, c2, c3 = block & _MASK, torch.full_like(block, stream), sample & _MASK, (sample >> 32) & _MASK
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2  # wraps at 2**64: the low 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _MASK, (k1 + PHILOX_WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def symmetric_uniform(bits: Tensor) -> Tensor:
    """Maps 32 random bits to the odd multiples of 2^-23 in (-1, 1), exact in float32."""
    odd = 2 * (bits >> 9) + 1 - (1 << 23)
    return odd.to(torch.float32) * (1.0 / (1 << 23))


# --- Auto-PGD -------------------------------------------------------------------------------------------------------


def apgd_step(
    x_adv: Tensor,
    x_adv_old: Tensor,
    x: Tensor,
    grad: Tensor,
    step: float,
    eps: float,
    a: float,
    low: float,
    high: float,
    steps: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> Tensor:
    """P(momentum_point(x_adv, x_adv_old, z, a)), z = P(x_adv + step·sign(grad)), P onto the L∞ ball and the bounds."""
    z = pgd_step(x_adv, x, grad, step, eps, low, high, steps, epsilons)
    radius = _per_sample(eps, epsilons, x)
    mixed = momentum_point(x_adv, x_adv_old, z, a)
    return torch.minimum(torch.maximum(mixed, x - radius), x + radius).clamp_(low, high)


def momentum_point(x_adv: Tensor, x_adv_old: Tensor, z: Tensor, a: float) -> Tensor:
    """x_adv + a·(z - x_adv) + (1 - a)·(x_adv - x_adv_old)."""
    return x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old)


def apgd_update(
    x_adv: Tensor,
    grad: Tensor,
    loss: Tensor,
    fooled: Tensor,
    x_best: Tensor,
    grad_best: Tensor,
    x_best_adv: Tensor,
    loss_best: Tensor,
    loss_last: Tensor,
    loss_at_check: Tensor,
    step: Tensor,
    increases: Tensor,
    reduced: Tensor,
    broken: Tensor,
    moves: Tensor,
    interval: int,
    rho: float,
) -> None:
    """Auto-PGD's bookkeeping (Croce & Hein 2020, Algorithm 1), every tensor but loss and fooled updated in place."""

    def set_where(mask: Tensor, target: Tensor, value: Tensor) -> None:
        rows = mask.view(-1, *([1] * (target.dim() - 1)))
        target.copy_(torch.where(rows, value, target))

    improved, halved = loss > loss_best, torch.zeros_like(fooled)
    set_where(improved, x_best, x_adv)
    set_where(improved, grad_best, grad)
    set_where(improved, loss_best, loss)
    set_where(fooled, x_best_adv, x_adv)
    broken |= fooled
    increases += loss > loss_last
    loss_last.copy_(loss)
    if interval:
        oscillates = increases <= math.floor(rho * interval)
        halved = oscillates | (~reduced & (loss_at_check >= loss_best))
        set_where(halved, step, step / 2)
        set_where(halved, x_adv, x_best)
        set_where(halved, grad, grad_best)
        reduced.copy_(halved)
        loss_at_check.copy_(loss_best)
        increases.zero_()
    moves.copy_(improved + 2 * fooled + 4 * halved)
