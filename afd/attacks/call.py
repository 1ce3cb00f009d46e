"""What one call of an attack is given: checked, and cut into pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from afd.attacks import inputs
from afd.attacks.losses import Loss
from afd.attacks.piece import Piece
from afd.errors import InputError
from afd.ops import checks


@dataclass(frozen=True)
class Call:
    """The arguments of `afd.attacks.PGD.__call__`."""

    x: Tensor
    y: Tensor | None
    target: Tensor | None
    start: Tensor | None
    seed: int | Tensor
    first_sample: int

    def check(self, loss: Loss, *, starts: bool) -> None:
        """Checks what can be known without a look at the values.

        Args:
            loss: of the attack.
            starts: whether the attack has a start of its own that is not x.

        Raises:
            InputTypeError, InputError: an argument is not as described there, or the loss lacks one, or takes none.
        """
        x, y, judged_by = self.x, self.y, loss.judged_by
        beside = {"y": y, "target": self.target, "start": self.start}
        inputs.check_images(x, **{name: tensor for name, tensor in beside.items() if tensor is not None})
        inputs.counter("first_sample", self.first_sample)
        if y is not None:
            if y.is_floating_point() and y.dim() == 2 and y.shape[1] and judged_by != "classes":
                inputs.check_rows("y", y, x)
            else:
                inputs.check_classes(x, y)
        elif judged_by in ("classes", "labels"):
            raise InputError("y is None; the loss needs labels, [N] of torch.int64")
        elif judged_by == "target" and self.target is None:
            raise InputError("y and target are None; a loss of your own is called with target, or else with y")
        if self.target is not None:
            self._check_target(self.target, judged_by)
        if self.start is not None:
            checks.iterate("start", self.start, x)
        elif judged_by == "prediction" and not starts:
            raise InputError(
                "loss is 'kl', whose gradient at the image itself is 0; it needs a random start, or start="
            )

    def _check_target(self, target: Tensor, judged_by: str) -> None:
        inputs.check_rows("target", target, self.x)
        if judged_by in ("classes", "labels"):
            raise InputError("target is given; the loss is judged by y alone (only 'kl' and functions take a target)")
        if judged_by == "prediction" and (target.dim() != 2 or not target.is_floating_point()):
            raise InputError(
                f"target is {target.dtype} of shape {list(target.shape)}; with 'kl' it must be the clean logits [N, K]"
            )

    def outside_inference(self) -> Call:
        """The same, of tensors that autograd can work with, and has nothing to do with yet."""
        y, target, start = (
            None if one is None else inputs.outside_inference(one).detach() for one in (self.y, self.target, self.start)
        )
        return replace(self, x=inputs.outside_inference(self.x), y=y, target=target, start=start)

    def piece(
        self, rows: slice, laid_out: Callable[[Tensor], Tensor], largest_label: int, trace: Tensor | None
    ) -> Piece:
        """Some of its rows.

        Args:
            rows: which.
            laid_out: puts images into the layout in which the model is shown them.
            largest_label: as in `Piece`.
            trace: likewise.
        """
        y, target = (None if one is None else one[rows] for one in (self.y, self.target))
        start = None if self.start is None else laid_out(self.start[rows]).clone()
        whole = rows.start == 0 and rows.stop == len(self.x)
        return Piece(
            laid_out(self.x[rows]), y, rows, whole, self.seed, self.first_sample + rows.start, largest_label, trace,
            target=target, start=start,
        )  # fmt: skip
