"""The rows of a batch that an attack works on together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that are attacked together.

    Attributes:
        x: images [n, ...] of these rows.
        y: labels [n].
        aim: what the loss is judged by, [n, ...]: y, for most.
        rows: which rows of the batch they are, a slice or indices [n].
        seed: of random starts; a tensor [] on the device where a recorded graph is to follow it.
        first_sample: index of the first row in the whole data set.
        largest_label: max(y) or more, known to the host; -1 if nobody looked.
        trace: what `afd.attacks.watch` notes of the whole batch; None if nobody looks.
        first_logits: those of the first evaluation of the model, once there was one.
    """

    x: Tensor
    y: Tensor
    aim: Tensor
    rows: slice | Tensor
    seed: int | Tensor
    first_sample: int
    largest_label: int
    trace: Tensor | None
    first_logits: list[Tensor] = field(default_factory=list)

    def of(self, setting: float | Tensor) -> float | Tensor:
        """A setting of the batch for these rows: one number, or theirs of one per sample."""
        return setting[self.rows] if isinstance(setting, Tensor) else setting

    def take(self, kept: Tensor) -> Piece:
        """Those of the rows that the indices `kept` name."""
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=kept.device)
        return replace(self, x=take(self.x, kept), y=self.y[kept], aim=self.aim[kept], rows=rows[kept])


def take(x: Tensor, kept: Tensor) -> Tensor:
    """x[kept], its rows laid out as those of x are."""
    out = torch.empty_strided((len(kept), *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
    return torch.index_select(x, 0, kept, out=out)
