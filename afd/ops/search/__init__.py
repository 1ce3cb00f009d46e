"""Steps of attacks that search without gradients: `square_step_` (Square)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, one_of
from afd.ops import backend, checks, native
from afd.ops.checks import Bounds, Setting, detached, integer, split_bounds, split_setting
from afd.ops.library import Written, call, define
from afd.ops.search import reference

BROKEN, STANDING, RESUMED = 0, 1, 2  # csrc/include/afd/square_step.h, SquareState
SQUARE_LOSSES = ("margin", "ce")


def square_step_(
    x_tried: Tensor,
    x_best: Tensor,
    x: Tensor,
    logits: Tensor | None,
    y: Tensor,
    *,
    loss_best: Tensor,
    state: Tensor,
    rows: Tensor,
    query: int,
    side: int,
    last_side: int = 0,
    pattern: Tensor | None = None,
    eps: Setting,
    seed: int | Tensor,
    first_sample: int | Tensor = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
    loss: str = "margin",
) -> None:
    """One query of Square (Andriushchenko et al. 2020; in L1, Croce & Hein, ICML 2021), in place.

    The proposals of the last query, which lie in x_tried, are judged by what the model says of them: where it is fooled
    or its loss is higher, the proposal becomes the best point (query 0 judges the first point, which does in any case).
    Then the proposals of this query are written over them. With C channels and d = x_best - x:

    - Linf: a square window of x_best moves to ``clamp(x + s * eps, *bounds)``, a sign s for each channel. Nothing else
      of x_tried is touched: outside of the last window it must be the best point, as these calls leave it.
    - L2, L1: of two windows of one size, d in the second becomes 0, and in the first, for each channel, ``u / |u|``
      times what the two held and its share of what d lacks of eps, where ``u = d / |d| + s * pattern``. In L2 d is then
      scaled to length eps and x + d clamped; in L1 x + d is projected on ball and box.

    Without logits, the search begins: vertical stripes of ``x -+ eps``, or tiles with a pattern each, are written.
    Draws depend on nothing but (seed, index of the sample, query), and images that are no [N, C, H, W] are one row of
    one channel.

    Args:
        x_tried: what the model was asked about, [R, ...], float32 (float64 is served by the reference).
        x_best: best points so far, [N, ...], of the same dtype.
        x: clean images inside the bounds, like x_best.
        logits: of x_tried, [R, K], in x's dtype, K >= 2; None to begin.
        y: classes to leave, int64 [N]; of one that the model does not have, the loss is NaN.
        loss_best: loss of x_best, [N], in x's dtype.
        state: uint8 [N]: 0 (broken) where x_best fools the model, and nothing happens to the sample; 1 (standing) where
            x_tried is to be judged; 2 (resumed) where x_tried is x_best itself, and is not judged.
        rows: which sample each row of x_tried is, int64 [R], no two the same; one that names none is left alone.
        query: whose proposals are written, counted from 0.
        side: of its windows, or, to begin in L2 and L1, of tiles; at most height and width. 0: nothing is proposed, and
            x_tried becomes the best point.
        last_side: `side` of the query before, in Linf.
        pattern: [side, side], `square_pattern`, in x's dtype; not needed in Linf.
        eps: radius of the ball, a float >= 0 or one per sample [N].
        seed: key of the generator, 0 <= seed < 2**63, or an int64 tensor [] on x's device.
        first_sample: index of x's first row in the whole data set, or that of each row, int64 [N] on x's device.
        bounds: lowest and highest value of an image.
        norm: "Linf", "L2" or "L1".
        loss: "margin", the largest logit of another class minus that of y, or "ce".

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes, devices or layouts that are not as described; shared memory; a number out of its range.
    """
    number, key = (0, detached(seed)) if isinstance(seed, Tensor) else (integer("seed", seed), None)
    first, places = (
        (0, first_sample) if isinstance(first_sample, Tensor) else (integer("first_sample", first_sample), None)
    )
    checks.counter("seed", number)
    checks.counter("first_sample", first)
    radius, radii = split_setting("eps", eps)
    x_tried, x_best, x, logits, loss_best, pattern = map(detached, (x_tried, x_best, x, logits, loss_best, pattern))
    call(
        torch.ops.afd.square_step_.default,
        x_tried, x_best, x, logits, y, loss_best, state, rows, radius, *split_bounds(bounds), number, first,
        integer("query", query), integer("side", side), integer("last_side", last_side), radii, norm, loss, pattern,
        key, places,
    )  # fmt: skip


def _square_step_(
    x_tried: Written,
    x_best: Written,
    x: Tensor,
    logits: Tensor | None,
    y: Tensor,
    loss_best: Written,
    state: Written,
    rows: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int,
    query: int,
    side: int,
    last_side: int,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
    loss: str = "margin",
    pattern: Tensor | None = None,
    key: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    checks.norm(norm)
    one_of("loss", loss, SQUARE_LOSSES)
    checks.images("x", x)
    checks.iterate("x_best", x_best, x)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)
    checks.key("seed", key, x)
    samples, count = x.shape[:1], x_tried.shape[:1]
    read = {"x": x, "y": y, "rows": rows, "logits": logits, "eps": epsilons, "pattern": pattern}
    read["first_sample"] = places
    written = {"x_tried": x_tried, "x_best": x_best, "loss_best": loss_best, "state": state}
    _check_like("x_tried", x_tried, (*count, *x.shape[1:]), x.dtype, x)
    _check_like("rows", rows, count, torch.int64, x)
    _check_like("y", y, samples, torch.int64, x)
    _check_like("loss_best", loss_best, samples, x.dtype, x)
    _check_like("state", state, samples, torch.uint8, x)
    if places is not None:
        _check_like("first_sample", places, samples, torch.int64, x)
    if logits is not None:
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise InputError(f"logits have shape {list(logits.shape)}; they must be [R, K] of at least 2 classes")
        _check_like("logits", logits, (*count, logits.shape[1]), x.dtype, x)
    _check_sides(x, query, side, last_side, logits is None)
    if norm != "Linf" and side:
        if pattern is None:
            raise InputError(f"pattern is None; in {norm} it must be square_pattern(side, norm)")
        _check_like("pattern", pattern, (side, side), x.dtype, x)
    _check_memory(written, read)
    (native if backend.serves_natively(x) else reference).square_step(
        x_tried, x_best, x, logits, y, loss_best, state, rows, eps, low, high, seed, first_sample, query, side,
        last_side, epsilons, norm, loss, pattern, key, places,
    )  # fmt: skip


define(_square_step_, lambda *_: None)


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    if tensor.shape != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.dtype != dtype or tensor.device != x.device:
        raise InputTypeError(f"{name} is {tensor.dtype} on {tensor.device}; it must be {dtype} on {x.device}")


def _check_sides(x: Tensor, query: int, side: int, last_side: int, begins: bool) -> None:
    _, height, width = reference.channels_and_size(x)
    largest = min(height, width)
    if not 0 <= query < 2**31:
        raise InputError(f"query is {query}; it must be in [0, 2**31)")
    for name, value in {"side": side, "last_side": last_side}.items():
        if not 0 <= value <= largest:
            raise InputError(f"{name} is {value}; it must be in [0, {largest}], for the images are {height} x {width}")
    if begins and not side and largest:
        raise InputError("side is 0, and logits are None; to begin, it must be at least 1")


def _check_memory(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Per-sample values are contiguous, and nothing that is written shares memory with anything else."""
    for name in ("loss_best", "state"):
        if not written[name].is_contiguous():
            raise InputError(f"{name} has stride {written[name].stride()}; per-sample values must be contiguous")
    everything = {**read, **written}
    given = [tensor for tensor in everything.values() if tensor is not None]
    if len({tensor.untyped_storage().data_ptr() for tensor in given}) < len(given):
        for name, tensor in written.items():
            checks.apart(name, tensor, **{other: t for other, t in everything.items() if other != name})
    for name, tensor in written.items():
        checks.without_overlap(name, tensor)


def square_pattern(side: int, norm: str) -> Tensor:
    """The pattern of a square in L2 and L1, float64 [side, side] on the CPU, of length 1 in that norm.

    Its upper half is a pyramid and its lower half one upside down: at distance d of the middle, in steps of a king, the
    sum of ``(k + 1) ** -power`` over all k >= d that the square has, with power 2 in L2 and 4 in L1.
    """
    half = side // 2
    halves = [_pyramid(half, side, norm), -_pyramid(side - half, side, norm)]
    return _unit(torch.cat(halves), norm)


def _pyramid(height: int, width: int, norm: str) -> Tensor:
    middle, across = height // 2, width // 2
    down = (torch.arange(height, device="cpu") - middle).abs()
    distance = torch.maximum(down[:, None], (torch.arange(width, device="cpu") - across).abs())
    steps = torch.arange(1, max(middle, across) + 2, dtype=torch.float64, device="cpu") ** (-2 if norm == "L2" else -4)
    return _unit(steps.flip(0).cumsum(0).flip(0)[distance], norm)


def _unit(shape: Tensor, norm: str) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(shape, 2 if norm == "L2" else 1)
    return shape / length.clamp_min(1e-12)
