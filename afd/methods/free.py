"""Free adversarial training: one backward pass moves the weights and the perturbation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from afd.attacks.ball import Ball, Norm, ball_of_norm
from afd.attacks.inputs import per_image
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, number, one_of, whole
from afd.methods.base import Batch, Run
from afd.methods.supervised import Supervised, SupervisedStep

KEYS = ("position", "index")
DELTA = "delta"  # in `Step.memory`
BOUNDS = -1.0, 1.0  # of a difference of images


@dataclass(frozen=True, kw_only=True)
class Free(Supervised):
    """Free adversarial training (Shafahi et al. 2019, Algorithm 1): batches are replayed; δ stays from step to step.

    One step is one replay: of one pass at clamp(x + δ), the gradient of the weights takes a step of the optimizer, and
    that of the images moves δ by a step of steepest ascent in the ball, in Linf δ ← clamp(δ + alpha sign(g), -eps, eps)
    as released. A trainer takes `replays` steps on each batch, and
    all that counts steps (schedules, averages, checkpoints) counts each; as the images are passed that often, the
    authors have so many times fewer epochs. The defaults are those of their PyTorch code, with CIFAR-10's radius.

    δ lies in ``step.memory["delta"]``, of each process its own, and in checkpoints. By position, several processes
    train as one does for as long as batches are of one size.

    Attributes:
        weight_decay: on the model's weights; 5e-4 as for AT (the authors' is 2e-4 on CIFAR-10).
        norm: of the ball: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image.
        alpha: length of a step of δ; by default eps.
        replays: steps on each batch, m.
        keyed: whose δ an image is given: "position", that which the image at its place in the batch before has left (as
            released), or "index", its own, by its index in the data set: as much memory as the data set in float32, in
            checkpoints too, and a wait for the device in each step.

    Raises:
        InputError: a number out of range, or as `Supervised`.
    """

    weight_decay: float = 5e-4
    norm: Norm = "Linf"
    eps: float = 8 / 255
    alpha: float | None = None
    replays: int = 4
    keyed: Literal["position", "index"] = "position"
    validation_attack: AttackSettings | str | None = "pgd-20"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball_of_norm(self.norm)
        number("eps", self.eps, 0.0)
        if self.alpha is not None:
            number("alpha", self.alpha, 0.0)
        whole("replays", self.replays, 1)
        one_of("keyed", self.keyed, KEYS)

    @property
    def repeats(self) -> int:
        """The replays."""
        return self.replays

    def check_run(self, run: Run) -> None:
        """See `Method`: δ by index is in one process's memory, and grows with the largest index that is met."""
        super().check_run(run)
        if self.keyed == "index" and (run.processes > 1 or run.recorded):
            told = f"{run.processes} processes, which meet" if run.processes > 1 else "recorded steps, which do not see"
            ends = "other images in each epoch" if run.processes > 1 else "which images are new"
            raise InputError(f"keyed is 'index' with {told} {ends}; allowed there is 'position'")

    def losses(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy of the images as they are moved, as "task"."""
        return {"task": self.cross_entropy(model(batch.x), batch.y)}

    def update(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One replay."""
        rows = self._rows(batch)
        table = self._table(step, batch, rows)
        delta = table[rows]
        moved = batch.x + delta
        x = moved.clamp(0, 1).requires_grad_()
        losses = step.descend(replace(batch, x=x))
        assert x.grad is not None
        with torch.no_grad():
            inside = (moved >= 0) & (moved <= 1)  # elsewhere the clamp lets no gradient through
            eps, alpha = (per_image(one, x) for one in (self.eps, self.eps if self.alpha is None else self.alpha))
            ball = Ball(self.norm, eps, BOUNDS)
            table[rows] = ball.step_(delta.clone(), torch.zeros_like(delta), x.grad * inside, alpha)
        return losses

    def _rows(self, batch: Batch) -> slice | Tensor:
        if self.keyed == "position":
            return slice(0, len(batch))
        if batch.index is None:
            raise InputError(
                "keyed is 'index', but the batch has none; a loader yields it as (images, labels, index), and a step "
                "is given index="
            )
        return batch.index

    @staticmethod
    def _table(step: SupervisedStep, batch: Batch, rows: slice | Tensor) -> Tensor:
        """δ of all that it is kept for: what is new begins with 0."""
        count = len(batch)
        if isinstance(rows, Tensor):
            low, high = rows.aminmax()
            if low < 0:
                raise InputError(f"index holds {int(low)}; the index of an image in its data set is at least 0")
            count = int(high) + 1
        known = step.memory.get(DELTA)
        if known is not None and known.shape[1:] != batch.x.shape[1:]:  # images of another size
            known = None
        if known is None or len(known) < count:
            length = count if known is None else max(count, len(known) + len(known) // 8)
            table = batch.x.new_zeros((length, *batch.x.shape[1:]))
            if known is not None:
                table[: len(known)] = known
            step.memory[DELTA] = table
        return step.memory[DELTA]
