"""What an attack counts about the model on its way, without waiting for the device, and says when it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.attacks.inputs import Chunk
from afd.errors import ModelError, ModelWarning, warn_caller

# the rows of the counters
ROWS = range(8)
FIRST_NAN, SEEN, FLAT, NAN_GRADIENT, BAD_GRADIENT, BAD_LOSS, BAD_LOGITS, PROBABILITIES = ROWS
NAMED = 8  # samples that a message lists by number
COULD_NOT_AIM = "it could not aim"


@dataclass(frozen=True)
class Report:
    """What an attack saw of the model: counts for each sample, all [N] int32.

    Attributes:
        evaluations: gradients that were computed.
        zero_gradients: how many of them were exactly zero.
        nan_gradients: how many of them held NaN.
        nonfinite_gradients: how many of them held NaN or infinity.
        nonfinite_losses: at how many of them the loss was NaN or infinite.
        nonfinite_logits: at how many of them a logit was (infinite: NaN is an error).
    """

    evaluations: Tensor
    zero_gradients: Tensor
    nan_gradients: Tensor
    nonfinite_gradients: Tensor
    nonfinite_losses: Tensor
    nonfinite_logits: Tensor

    @property
    def blind(self) -> Tensor:
        """Samples for which each gradient was zero or held NaN, so that the attack could not aim, [N] bool."""
        return (self.zero_gradients + self.nan_gradients == self.evaluations) & (self.evaluations > 0)

    @property
    def nonfinite(self) -> Tensor:
        """Samples for which a logit, a loss or a gradient was not finite at least once, [N] bool."""
        return (self.nonfinite_gradients + self.nonfinite_losses + self.nonfinite_logits) > 0


def new_counters(samples: int, device: torch.device) -> Tensor:
    """Nothing noted yet: [8, samples] int32."""
    return torch.zeros(len(ROWS), samples, dtype=torch.int32, device=device)


def note_nan(chunk: Chunk, step: int, logits: Tensor) -> None:
    """Adds NaN among the logits of a chunk to its counters, if it has some; those of clean images are of step 0."""
    if chunk.counters is not None:
        first = chunk.counters[FIRST_NAN]
        known = first[chunk.rows]
        first[chunk.rows] = torch.where((known == 0) & logits.isnan().any(1), step + 1, known)


def note(chunk: Chunk, step: int, logits: Tensor, losses: Tensor, grad: Tensor, are_logits: bool = True) -> None:
    """Adds one evaluation of the model on a chunk to its counters, if it has some; features serve as well as logits."""
    if chunk.counters is None:
        return
    known = chunk.counters[:, chunk.rows]  # of a slice, the counters themselves
    # few launches: NaN and infinity reach the largest size, which so tells of both, and of zero
    largest = torch.linalg.vector_norm(grad, math.inf, tuple(range(1, grad.dim())))
    logit = torch.linalg.vector_norm(logits, math.inf, 1)
    happened = torch.ones(PROBABILITIES - SEEN, len(largest), dtype=torch.bool, device=largest.device)
    torch.eq(largest, 0, out=happened[FLAT - SEEN])
    torch.ne(largest, largest, out=happened[NAN_GRADIENT - SEEN])
    torch.ne(torch.stack([largest, losses, logit]).mul_(0), 0, out=happened[BAD_GRADIENT - SEEN :])  # 0 * inf is NaN
    known[SEEN:PROBABILITIES] += happened
    known[FIRST_NAN].masked_fill_((known[FIRST_NAN] == 0) & (logit != logit), step + 1)
    if are_logits and not step:
        known[PROBABILITIES] = _like_probabilities(logits)
    if not isinstance(chunk.rows, slice):
        chunk.counters[:, chunk.rows] = known


def summarize(counters: Tensor) -> Report:
    """Reads counters: the one wait for the device after the last step.

    Raises:
        ModelError: NaN among the logits.
    """
    first, *counts, likely = counters.cpu().unbind()
    if first.any():
        bad = first.nonzero().squeeze(1)
        step = int(first[bad].min()) - 1
        raise ModelError(
            f"the model returned NaN logits, first seen in step {step}, for {len(bad)} of {len(first)} samples: "
            f"{_listed(first > 0)}"
        )
    report = Report(*counts)
    if report.blind.any():
        warn_caller(
            f"for {_of(report.blind)} the gradient of the loss was exactly zero{_or_nan(report)} wherever the attack "
            f"looked, so {COULD_NOT_AIM}: that they withstand it shows no robustness (try loss='dlr', or float64); "
            f"these are {_listed(report.blind)}",
            ModelWarning,
        )
    if report.nonfinite.any():
        warn_caller(
            f"for {_of(report.nonfinite)} values were not finite ({_share(report)}): that they withstand it may show "
            f"no robustness; these are {_listed(report.nonfinite)}",
            ModelWarning,
        )
    if len(likely) and likely.all() and report.evaluations.any():
        warn_caller(
            "the model's outputs lie in [0, 1] and sum to 1 as probabilities do; attacks need logits, for softmax "
            "flattens their gradients",
            ModelWarning,
        )
    return report


def _of(samples: Tensor) -> str:
    return f"{int(samples.sum())} of {len(samples)} samples"


def _listed(samples: Tensor) -> str:
    numbers = samples.nonzero().squeeze(1)
    return ", ".join(map(str, numbers[:NAMED].tolist())) + (", ..." if len(numbers) > NAMED else "")


def _or_nan(report: Report) -> str:
    return " or NaN" if (report.blind & (report.nan_gradients > 0)).any() else ""


def _share(report: Report) -> str:
    kinds = {
        "gradients": report.nonfinite_gradients,
        "losses": report.nonfinite_losses,
        "logits": report.nonfinite_logits,
    }
    total = int(report.evaluations[report.nonfinite].sum())
    return ", ".join(f"{int(count.sum())} of {total} {kind}" for kind, count in kinds.items() if count.any())


def _like_probabilities(logits: Tensor) -> Tensor:
    lowest, highest = torch.aminmax(logits, dim=1)
    whole = (logits.sum(1, dtype=torch.float32) - 1).abs() < 1e-3
    return ((lowest >= 0) & (highest <= 1) & whole).int()
