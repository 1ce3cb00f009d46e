"""What an attack notes about the model on its way, without waiting for the device, and says when it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.attacks.piece import Piece
from afd.errors import ModelError, ModelWarning, warn_caller

FIRST_NAN, FLAT, SEEN, PROBABILITIES = range(4)  # the rows of a trace
NAMED = 8  # samples that an error lists by number


@dataclass(frozen=True)
class Report:
    """What an attack saw of the model.

    Attributes:
        evaluations: gradients that were computed, [N] int32.
        zero_gradients: how many of them were exactly zero, [N] int32.
    """

    evaluations: Tensor
    zero_gradients: Tensor


def new_trace(samples: int, device: torch.device) -> Tensor:
    """Nothing noted yet: [4, samples] int32."""
    return torch.zeros(4, samples, dtype=torch.int32, device=device)


def note(piece: Piece, step: int, logits: Tensor, grad: Tensor) -> None:
    """Adds one evaluation of the model on a piece to its trace, if it has one."""
    if piece.trace is None:
        return
    known = piece.trace[:, piece.rows]
    first = torch.where((known[FIRST_NAN] == 0) & logits.isnan().any(1), step + 1, known[FIRST_NAN])
    flat = torch.linalg.vector_norm(grad, float("inf"), dim=tuple(range(1, grad.dim()))) == 0
    likely = known[PROBABILITIES] if step else _like_probabilities(logits)
    piece.trace[:, piece.rows] = torch.stack([first, known[FLAT] + flat, known[SEEN] + 1, likely])


def settle(trace: Tensor) -> Report:
    """Reads a trace: the one wait for the device after the last step.

    Raises:
        ModelError: NaN among the logits.
    """
    first, flat, seen, likely = trace.cpu().unbind()
    if first.any():
        bad = first.nonzero().squeeze(1)
        listed = ", ".join(map(str, bad[:NAMED].tolist())) + (", ..." if len(bad) > NAMED else "")
        step = int(first[bad].min()) - 1
        raise ModelError(
            f"the model returned NaN logits, first in step {step}, for {len(bad)} of {len(first)} samples: {listed}"
        )
    stuck = int(((flat == seen) & (seen > 0)).sum())
    if stuck:
        warn_caller(
            f"for {stuck} of {len(flat)} samples the gradient of the loss was exactly zero wherever the attack looked, "
            "so it could not aim: that they withstand it shows no robustness (try loss='dlr', or float64)",
            ModelWarning,
        )
    if len(likely) and likely.all() and seen.any():
        warn_caller(
            "the model's outputs lie in [0, 1] and sum to 1 as probabilities do; attacks need logits, for softmax "
            "flattens their gradients",
            ModelWarning,
        )
    return Report(seen, flat)


def _like_probabilities(logits: Tensor) -> Tensor:
    lowest, highest = torch.aminmax(logits, dim=1)
    whole = (logits.sum(1, dtype=torch.float32) - 1).abs() < 1e-3
    return ((lowest >= 0) & (highest <= 1) & whole).int()
