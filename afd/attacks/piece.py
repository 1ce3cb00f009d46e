"""The rows of a batch that an attack works on together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from afd.errors import InputError


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that are attacked together.

    Attributes:
        x: images [n, ...] of these rows.
        y: labels [n], soft labels [n, K], or None.
        rows: which rows of the batch they are, a slice or indices [n].
        whole: whether these are all rows of the batch.
        seed: of random starts; a tensor [] on the device where a recorded graph is to follow it.
        first_sample: index of the first row in the whole data set.
        largest_label: max(y) or more, known to the host; -1 if nobody looked.
        trace: what `afd.attacks.watch` notes of the whole batch; None if nobody looks.
        target: what the call was given for the loss, [n, ...], if anything.
        start: where to begin, like x, if the call said so.
        aim: what the loss is judged by, [n, ...]: y, for most.
        first_outputs: those of the first evaluation of the model, once there was one.
    """

    x: Tensor
    y: Tensor | None
    rows: slice | Tensor
    whole: bool
    seed: int | Tensor
    first_sample: int
    largest_label: int
    trace: Tensor | None
    target: Tensor | None = None
    start: Tensor | None = None
    aim: Tensor | None = None
    first_outputs: list[Tensor] = field(default_factory=list)

    def of(self, setting: float | Tensor, factor: float = 1.0) -> float | Tensor:
        """A setting of the batch for these rows, times a factor: one number, or one per row.

        A live number, a tensor [] on the images' device, is read there, and rounded once, as a number is.
        """
        if isinstance(setting, Tensor) and not setting.dim():
            if setting.device != self.x.device:
                return factor * float(setting)
            return (factor * setting.double()).to(self.x.dtype).repeat(len(self.x))
        return factor * (setting[self.rows] if isinstance(setting, Tensor) else setting)

    def take(self, kept: Tensor) -> Piece:
        """Those of the rows that the indices `kept` name."""
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=kept.device)
        y, aim = (None if one is None else one[kept] for one in (self.y, self.aim))
        return replace(self, x=take(self.x, kept), y=y, aim=aim, rows=rows[kept], whole=False)

    def tensors(self) -> tuple[Tensor, ...]:
        """What climbs read of it."""
        return tuple(one for one in (self.x, self.y, self.aim, self.trace) if one is not None)

    def cloned(self) -> Piece:
        """The same on memory of its own, nothing evaluated yet."""
        y, aim, trace = (None if one is None else one.clone() for one in (self.y, self.aim, self.trace))
        return replace(self, x=self.x.clone(), y=y, aim=aim, trace=trace, first_outputs=[])

    def check_classes(self, logits: Tensor) -> None:
        """Raises InputError unless logits [n, K] have a class for each label; there is one for -1."""
        classes = logits.shape[1]
        if self.largest_label >= classes:
            raise InputError(f"y holds the label {self.largest_label}; the model has classes 0 ... {classes - 1}")
        if self.y is not None and self.y.dim() == 2 and self.y.shape[1] != classes:
            raise InputError(f"y is soft labels of {self.y.shape[1]} classes; the model has {classes}")


def take(x: Tensor, kept: Tensor) -> Tensor:
    """x[kept], its rows laid out as those of x are."""
    out = torch.empty_strided((len(kept), *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
    return torch.index_select(x, 0, kept, out=out)


def rows_of(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, [N], in a shape that broadcasts against x."""
    return values.view(-1, *([1] * (x.dim() - 1)))
