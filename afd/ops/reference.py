"""Every op as its formula in plain PyTorch: what the kernels are tested against, and what serves where none runs.

The functions take arguments that `afd.ops.checks` has already accepted. They work on any device and floating dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.ops.library import Written

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
RANDOM_START_STREAM, RANDOM_START_EXTRA_STREAM = 0, 1
_MASK = 0xFFFFFFFF


def project(
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
) -> Tensor:
    """The nearest point to x_adv in the ball around x and in the box; u = x_adv - x.

    Linf: clamp(clamp(x_adv, x - ε, x + ε), low, high).
    L2: clamp(x + u·min(1, ε/‖u‖₂), low, high).
    L1: x + sign(u)·min(max(|u| - λ, 0), room), λ the root of Σ = ε.
    """
    radius = _per_sample(eps, epsilons, x)
    if norm == "Linf":
        return torch.minimum(torch.maximum(x_adv, x - radius), x + radius).clamp_(low, high)
    x64, u = x.double(), x_adv.double() - x.double()
    radius = torch.as_tensor(radius, dtype=torch.float64, device=x.device)
    if norm == "L2":
        length = _sum(u.square()).sqrt()
        kept, inside = u * (radius / length), length <= radius
    else:
        room = torch.where(u > 0, high - x64, x64 - low)
        threshold = _l1_threshold(u.abs(), room, radius.expand_as(_sum(u)))
        kept, inside = torch.minimum((u.abs() - threshold).clamp_min(0.0), room) * u.sign(), threshold == 0
    out = torch.where(inside, x_adv, plus_towards(x, kept)).clamp_(low, high)
    return torch.where(_sum(u).isfinite() & (radius >= 0), out, torch.nan)


def project_plane(
    x: Tensor, w: Tensor, b: Tensor, at: Tensor | None, low: float, high: float, norm: str
) -> tuple[Tensor, Tensor]:
    """The nearest point to x of {⟨w, z - at⟩ + b = 0} and of the box, and its distance.

    Moves m with Σ |wᵢ|mᵢ = |⟨w, x - at⟩ + b|. Linf: min(t, room). L2: min(t|w|, room). L1: room, in the order of |w|.
    """
    places, planes = _rows(x), _rows(w)
    inside, copies = places.clamp(low, high), len(x) // max(len(w), 1)
    centre = torch.zeros_like(planes) if at is None else _rows(at)
    planes, centre, offset = (t.repeat(copies, 1) for t in (planes, centre, b.double()[:, None]))
    value = offset + (planes * (inside - centre)).sum(1, keepdim=True)
    size, need, down = planes.abs(), value.abs(), (planes > 0) == (value > 0)
    room = torch.where(down, inside - low, high - inside).minimum(need / size)  # none has to go further
    room = torch.where(size > 0, room, 0.0)
    if norm == "L1":
        moves = _steepest_moves(size, room, need)
    else:
        moves = _even_moves(size, room, need, size if norm == "L2" else torch.ones_like(size))
    moved = torch.where(down, inside - moves, inside + moves).to(x.dtype).clamp(low, high)
    finite = (places - places).sum(1, keepdim=True).isfinite() & value.isfinite()
    out = torch.where(finite, moved, torch.nan)
    length = (out.double() - inside).abs()
    if norm == "Linf":
        distance = length.amax(1) if length.shape[1] else length.sum(1)
    else:
        distance = length.square().sum(1).sqrt() if norm == "L2" else length.sum(1)
    return out.view(x.shape), distance.to(x.dtype)


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
    norm: str = "Linf",
    sparsity: float = 0.05,
    sparsities: Tensor | None = None,
) -> Tensor:
    """project(x_adv + α·direction), the direction sign(g), g/‖g‖₂, or sign(g)/k on the k largest |g|."""
    if norm == "Linf":
        direction = grad.sign()
    elif norm == "L2":
        direction = _l2_direction(grad)
    else:
        direction = _l1_direction(grad, sparsity, sparsities)
    stepped = x_adv + _per_sample(alpha, alphas, x) * direction.to(x.dtype)
    return project(stepped, x, eps, low, high, epsilons, norm)


def random_start(
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int = 0,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
    key: Tensor | None = None,
) -> Tensor:
    """clamp(x + ε·v, low, high), v uniform in the unit ball from Philox(seed; sample, element)."""
    samples, elements = x.shape[0], x[:1].numel()
    blocks = torch.arange((elements + 3) // 4, device=x.device)
    rows = torch.arange(samples, device=x.device) + first_sample  # wraps at 2**64 as the kernels do
    chosen = seed if key is None else key
    bits = philox(chosen, rows[:, None], blocks[None, :], RANDOM_START_STREAM)
    extra = philox(chosen, rows, torch.zeros_like(rows), RANDOM_START_EXTRA_STREAM)
    if norm == "Linf":
        unit = symmetric_uniform(bits).flatten(1)[:, :elements]
    elif norm == "L2":
        draws = normals(bits).flatten(1)[:, :elements]
        unit = draws / (draws.square().sum(1) + normals(extra)[:, :2].square().sum(1)).sqrt()[:, None]
    else:
        sizes = exponentials(bits).flatten(1)[:, :elements]
        signs = 1 - 2 * (bits & 1).flatten(1)[:, :elements]
        unit = signs * sizes / (sizes.sum(1) + exponentials(extra)[:, 0])[:, None]
    return (x + _per_sample(eps, epsilons, x) * unit.reshape(x.shape).to(x.dtype)).clamp_(low, high)


# --- Per sample -----------------------------------------------------------------------------------------------------


def _per_sample(value: float, values: Tensor | None, x: Tensor) -> float | Tensor:
    """A setting in a shape that broadcasts against `x`."""
    return value if values is None else values.view(-1, *([1] * (x.dim() - 1)))


def _sum(x: Tensor) -> Tensor:
    """Each sample's sum, in a shape that broadcasts against `x`."""
    return x.flatten(1).sum(1).view(-1, *([1] * (x.dim() - 1))) if x.dim() > 1 else x


def _rows(x: Tensor) -> Tensor:
    """Each sample's elements in float64, [N, elements]."""
    return x.double().flatten(1) if x.dim() > 1 else x.double()[:, None]


def plus_towards(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in x's dtype, rounded towards x where it would end further from x than delta."""
    moved = (x.double() + delta).to(x.dtype)
    overshot = (moved.double() - x.double()).abs() > delta.abs()
    return torch.where(overshot, torch.nextafter(moved, x), moved)


def _l1_threshold(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The λ >= 0 with Σ min(max(size - λ, 0), room) = eps, or 0 if the sum is below eps there already.

    The sum bends where λ meets a size or a size - room: the bends are sorted, bisected, and the root interpolated.
    """
    if not size.numel():
        return torch.zeros_like(eps)
    shape = eps.shape
    size, room, eps = (t.reshape(t.shape[0], -1) for t in (size, room, eps))

    def kept(threshold: Tensor) -> Tensor:
        return torch.minimum((size - threshold).clamp_min(0.0), room).sum(1, keepdim=True)

    bends = torch.cat([torch.zeros_like(eps), size, (size - room).clamp_min(0.0)], dim=1).sort(dim=1).values
    first = torch.zeros_like(eps, dtype=torch.int64)  # the sum is more than eps at the first, at most eps at the last
    last = torch.full_like(first, bends.shape[1] - 1)
    for _ in range(bends.shape[1].bit_length()):
        middle = (first + last) // 2
        more = kept(bends.gather(1, middle)) > eps
        first, last = torch.where(more, middle, first), torch.where(more, last, middle)
    left, right = bends.gather(1, first), bends.gather(1, last)
    above, below = kept(left), kept(right)
    root = right - (right - left) * (eps - below) / (above - below)
    return torch.where(kept(torch.zeros_like(eps)) > eps, root, 0.0).view(shape)


def _even_moves(size: Tensor, room: Tensor, need: Tensor, pace: Tensor) -> Tensor:
    """min(t·pace, room) with Σ size·moves = need, or room: the bends are sorted, and the sum at each compared."""
    if not size.numel():
        return room
    bends, order = torch.where(size > 0, room / pace, 0.0).sort(dim=1)
    taken, slope = (size * room).gather(1, order), (size * pace).gather(1, order)
    before = taken.cumsum(1) - taken
    behind = slope.flip(1).cumsum(1).flip(1)
    enough = (before + bends * behind >= need) & (need > 0)
    first = enough.int().argmax(1, keepdim=True)
    t = (need - before.gather(1, first)) / behind.gather(1, first)
    return torch.where(enough.any(1, keepdim=True), torch.minimum(t * pace, room), room)


def _steepest_moves(size: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """room where size is above a cut, and where it ties with it as large a share as makes Σ size·moves = need."""
    if not size.numel():
        return room
    sizes, order = size.sort(dim=1, descending=True)
    enough = ((sizes * room.gather(1, order)).cumsum(1) >= need) & (need > 0)
    cut = sizes.gather(1, enough.int().argmax(1, keepdim=True))
    together = (need - torch.where(size > cut, size * room, 0.0).sum(1, keepdim=True)) / cut
    tied = torch.where(size == cut, torch.minimum(room, together), 0.0)
    moves = torch.where(size > cut, room, tied * (together / tied.sum(1, keepdim=True)).clamp(max=1.0))
    return torch.where(enough.any(1, keepdim=True), moves, room)


# --- Directions -----------------------------------------------------------------------------------------------------


def _l2_direction(grad: Tensor) -> Tensor:
    """g/‖g‖₂ in float64, divided by the largest |g| first; NaN counts as 0 and infinity as the largest number."""
    finite = (grad if grad.dtype == torch.float64 else grad.float()).nan_to_num().double()
    if not grad.numel():
        return finite
    largest = finite.abs().reshape(grad.shape[0], -1).amax(1).view(-1, *([1] * (grad.dim() - 1)))
    scaled = finite / torch.where(largest > 0, largest, 1.0)
    return scaled / _sum(scaled.square()).sqrt().clamp_min(1.0)


def _l1_direction(grad: Tensor, sparsity: float, sparsities: Tensor | None) -> Tensor:
    """sign(g)/moved in float64 where |g| is among the k = max(1, round(sparsity·elements)) largest, else 0."""
    if not grad.numel():
        return grad.double()
    size = grad.abs().nan_to_num(nan=0.0, posinf=torch.inf).reshape(grad.shape[0], -1)
    elements = size.shape[1]
    shares = torch.full_like(size[:, 0], sparsity, dtype=torch.float64) if sparsities is None else sparsities.double()
    rank = (shares * elements).nan_to_num().round().clamp(1, elements).long() - 1
    last = size.sort(dim=1, descending=True).values.gather(1, rank[:, None])
    moves = (size >= last) & (size > 0)
    direction = moves / moves.sum(1, keepdim=True).clamp_min(1).double()
    return torch.where(moves, direction * grad.sign().reshape(size.shape).double(), 0.0).view(grad.shape)


# --- Draws ----------------------------------------------------------------------------------------------------------


def philox(seed: int | Tensor, sample: Tensor, block: Tensor, stream: int | Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) in int64 arithmetic.

    Args:
        seed: 0 <= seed < 2**63, the 64-bit key; a number or an int64 tensor [].
        sample: int64 sample indices, broadcast against `block`.
        block: int64 block indices below 2**32; block b serves elements 4b ... 4b + 3.
        stream: separates uses that share a seed; a number, or int64, broadcast with the others.

    Returns:
        int64 [..., 4] of unsigned 32-bit values.
    """
    sample, block, use = torch.broadcast_tensors(sample, block, torch.as_tensor(stream, device=block.device))
    c0, c1, c2, c3 = block & _MASK, use & _MASK, sample & _MASK, (sample >> 32) & _MASK
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


def exponentials(bits: Tensor) -> Tensor:
    """-log(u), float64, u uniform on the odd multiples of 2^-24 in (0, 1)."""
    return -((2 * (bits >> 9) + 1).double() / (1 << 24)).log()


def normals(bits: Tensor) -> Tensor:
    """Standard normals, float64, like `bits` [..., 4]: two pairs by Box and Muller (1958)."""
    radius = (2 * exponentials(bits[..., ::2])).sqrt()
    turn = torch.pi * symmetric_uniform(bits[..., 1::2]).double()
    return torch.stack([radius * turn.cos(), radius * turn.sin()], dim=-1).flatten(-2)


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
    stepped = x_adv + _per_sample(step, steps, x) * grad.sign().to(x.dtype)
    z = project(stepped, x, eps, low, high, epsilons)
    return project(momentum_point(x_adv, x_adv_old, z, a), x, eps, low, high, epsilons)


def momentum_point(x_adv: Tensor, x_adv_old: Tensor, z: Tensor, a: float) -> Tensor:
    """x_adv + a·(z - x_adv) + (1 - a)·(x_adv - x_adv_old)."""
    return x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old)


def apgd_update(
    x_adv: Written,
    grad: Written,
    loss: Tensor,
    fooled: Tensor,
    x_best: Written,
    grad_best: Written,
    x_best_adv: Written,
    loss_best: Written,
    loss_last: Written,
    loss_at_check: Written,
    step: Written,
    increases: Written,
    reduced: Written,
    broken: Written,
    moves: Written,
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


# --- Loading a batch ------------------------------------------------------------------------------------------------


def load_batch(
    pixels: Tensor,
    index: Tensor,
    draws: Tensor | None,
    scale: float,
    padding: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    """pixels[index], cropped and mirrored as draws[index] say, over scale; NaN where the index names no image."""
    named = (index >= 0) & (index < len(pixels))
    index = torch.where(named, index, 0)
    # index_select copies whole images; plain indexing would go pixel by pixel, twenty times slower on a CPU.
    chosen = pixels.index_select(0, index) if len(pixels) else pixels.new_zeros(len(index), *pixels.shape[1:])
    if draws is not None and len(draws):
        chosen = crop_and_flip(chosen, draws.index_select(0, index), padding, flip)
    # CUDA would turn a Python number as divisor into a multiplication by its rounded reciprocal, unlike the CPU.
    x = chosen.to(torch.float32).div_(torch.full((), scale, dtype=torch.float32, device=pixels.device))
    x = torch.where(named.view(-1, 1, 1, 1), x, torch.nan)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def crop_and_flip(x: Tensor, draws: Tensor, padding: int, flip: bool = True) -> Tensor:
    """One of the (2·padding + 1)² windows of each zero-padded image [B, C, H, W], mirrored half of the time.

    With d = draw mod 2·(2·padding + 1)², d // 2 numbers the window row by row, and an odd d mirrors it.
    """
    _, channels, height, width = x.shape
    draws = draws.unsqueeze(1) % (2 * (2 * padding + 1) ** 2)
    window, mirrored = draws // 2, draws % 2 == 1
    top, left = window // (2 * padding + 1), window % (2 * padding + 1)
    across = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.where(mirrored & flip, across.flip(0), across)
    # Where each output pixel lies in its padded plane: crop and flip become one gather, the same for all channels.
    position = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    planes = F.pad(x, (padding,) * 4).flatten(2)
    return planes.gather(2, position.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(x.shape)
