"""Where an attack begins: random points around the images, drawn by sample and element, equal for any split."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from afd import ops
from afd.attacks import inputs
from afd.attacks.piece import Piece, rows_of
from afd.errors import InputError, one_of

KINDS = ("uniform", "gaussian", "coin-flip")
GAUSSIAN_SCALE = 0.001  # of TRADES (Zhang et al. 2019) and MART (Wang et al. 2020)


def check_start(kind: str, scale: float | None, random_start: bool) -> float | None:
    """The scale; raises InputError or InputTypeError unless such a start can be made."""
    one_of("init", kind, KINDS)
    if kind != "uniform" and not random_start:
        raise InputError(f"init is {kind!r} and random_start is False; without a random start, init is 'uniform'")
    if scale is None:
        return None
    if kind == "uniform":
        raise InputError(f"start_scale is {scale}; init 'uniform' takes none, it fills the ball of radius eps")
    return inputs.number("start_scale", scale, 0.0)


def drawn(kind: str, scale: float | None, piece: Piece, ball: dict[str, Any]) -> Tensor:
    """A random start of one of the `KINDS`.

    Args:
        kind: "uniform" in the ball, clamped to the bounds; "gaussian", x + scale * N(0, 1) as it comes; or "coin-flip",
            x ± scale, projected onto ball and bounds.
        scale: of the last two; None is 0.001, and the radius.
        piece: the images, the seed, and their place in the batch.
        ball: in the words of the ops.

    Returns:
        [n, ...] like piece.x.
    """
    x = piece.x
    draw: dict[str, Any] = {"seed": piece.seed, "first_sample": piece.first_sample}
    if kind == "uniform":
        return ops.random_start(x, **draw, **ball)
    unit = ops.random_start(torch.zeros_like(x), eps=1.0, bounds=(-1.0, 1.0), norm="Linf", **draw)  # never 0, nor ±1
    if kind == "gaussian":
        # in float64: rounded to float32, it does not show how many elements a loop takes at a time
        normal: Tensor = torch.special.erfinv(unit.double()).mul_(math.sqrt(2.0)).to(x.dtype)
        return x + (GAUSSIAN_SCALE if scale is None else scale) * normal
    length = ball["eps"] if scale is None else scale
    moved = x + unit.sign() * (rows_of(length, x) if isinstance(length, Tensor) else length)
    return ops.project_(moved, x, **ball)
