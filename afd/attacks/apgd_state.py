"""What a run of Auto-PGD remembers from one iteration to the next, and when it looks back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class APGDState:
    """What `ops.apgd_update_` keeps between iterations, in its words. The tensors change, the object does not."""

    x_best: Tensor
    grad_best: Tensor
    x_best_adv: Tensor
    loss_best: Tensor
    loss_last: Tensor
    loss_at_check: Tensor
    step: Tensor
    increases: Tensor
    reduced: Tensor
    broken: Tensor
    moves: Tensor

    @classmethod
    def before_start(cls, x_adv: Tensor, eps: float | Tensor) -> APGDState:
        """State that the first update, at the start point, makes that of a run whose best point is the start."""
        x_best, grad_best, x_best_adv = (torch.zeros_like(x_adv) for _ in range(3))
        step = 2 * eps if isinstance(eps, Tensor) else x_adv.new_full(x_adv.shape[:1], 2 * eps)
        best, last = torch.full_like(step, -math.inf), torch.full_like(step, math.inf)
        reduced, broken = torch.ones_like(step, dtype=torch.bool), torch.zeros_like(step, dtype=torch.bool)
        increases, moves = (torch.zeros_like(step, dtype=kind) for kind in (torch.int32, torch.uint8))
        return cls(x_best, grad_best, x_best_adv, best, last, best.clone(), step, increases, reduced, broken, moves)


def checkpoint_intervals(steps: int) -> list[int]:
    """For each iteration 1 ... steps, 0, or at a checkpoint the number of iterations since the one before.

    The first interval is 0.22 of the steps; each is 0.03 of them shorter than the last, but at least 0.06 of them.
    """
    interval, decrease, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, since = [], 0
    for _ in range(steps):
        since += 1
        at_checkpoint = since == interval
        marks.append(interval if at_checkpoint else 0)
        if at_checkpoint:
            interval, since = max(interval - decrease, least), 0
    return marks
