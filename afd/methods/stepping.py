"""Methods that take their steps in another way: Free replays each batch, AWP takes another method's step uphill."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from afd.attacks.ball import Ball, Norm, ball_of_norm
from afd.attacks.inputs import per_image
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, number, one_of, whole
from afd.methods.adversarial import TRADES
from afd.methods.base import Batch, Run
from afd.methods.supervised import Supervised, SupervisedStep, Wrapper
from afd.nn.modes import Buffers, statistics_kept

# --- Free adversarial training --------------------------------------------------------------------------------------


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


# --- Adversarial weight perturbation --------------------------------------------------------------------------------


DECAYS = ("perturbed", "original")
TINY = 1e-20


@dataclass(frozen=True)
class AWP(Wrapper):
    """Adversarial weight perturbation (Wu et al. 2020, Algorithm 1): a step taken at weights w + v, then v taken back.

    v moves every weight tensor w of two or more dimensions uphill in the loss of the method inside, by γ ‖w‖ along its
    gradient g: v = γ ‖w‖ g / ‖g‖. x' is found at w. Gradient and step of the optimizer are those at w + v. The first of
    its two passes leaves running statistics alone, as the authors' proxy network does. They add v and subtract it, by
    which weights drift; here a copy is kept.

    Attributes:
        gamma: length γ of the move, as a share of each tensor's norm. Default: the authors', 0.005 around TRADES and
            0.01 around others.
        start_epoch: the first in which weights are moved, counted from 1; the authors have 10 with TRADES.
        weight_decay_at: the weights that decay: "perturbed", w + v as released, or "original", w.

    Raises:
        InputError: a number out of range, or a method inside that takes its steps in a way of its own, where w decays.
    """

    gamma: float | None = None
    start_epoch: int = 1
    weight_decay_at: Literal["perturbed", "original"] = "perturbed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is None:
            object.__setattr__(self, "gamma", 0.005 if isinstance(self.core, TRADES) else 0.01)
        number("gamma", self.gamma, 0.0)
        whole("start_epoch", self.start_epoch, 1)
        one_of("weight_decay_at", self.weight_decay_at, DECAYS)
        if self.weight_decay_at == "original" and not _steps_plainly(self.method):
            raise InputError(
                "weight_decay_at is 'original', but the method inside takes its steps in a way of its own, at the "
                "weights that it finds; allowed around it is 'perturbed'"
            )

    def moves(self, step: SupervisedStep) -> bool:
        """Whether the next step moves the weights."""
        return step.epoch >= self.start_epoch

    def kind(self, step: SupervisedStep) -> Hashable:
        """See `Wrapper`."""
        return self.moves(step), super().kind(step)

    def descend(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer at perturbed weights, as the method inside takes it; returns the losses there."""
        if not self.moves(step):
            return super().descend(step, batch)
        with step.attacks.found_once():
            passes = step.model.passes
            others = Buffers([layer for layer in passes.modules() if not isinstance(layer, _BatchNorm)])
            with statistics_kept(passes):  # but for what the attack does to them
                step.gather(batch)
            others.put_back()
            weights: list[Any] = [one for one in step.parameters if one.dim() > 1 and one.grad is not None]
            original = [weight.detach().clone() for weight in weights]
            self._move_uphill(weights)
            step.forget()
            try:
                return self._at_perturbed(step, batch, weights, original)
            except BaseException:
                _set(weights, original)
                raise

    def _at_perturbed(
        self, step: SupervisedStep, batch: Batch, weights: list[Any], original: list[Tensor]
    ) -> dict[str, Tensor]:
        """The step of the optimizer, after which v is taken back."""
        if self.weight_decay_at == "original":
            losses = step.gather(batch)
            _set(weights, original)
            step.apply()
            return losses
        moved = [weight.detach().clone() for weight in weights]
        losses = super().descend(step, batch)
        with torch.no_grad():  # w + what the step has done: exactly w where it has done nothing
            for weight, before, w in zip(weights, moved, original, strict=True):
                weight.sub_(before).add_(w)
        return losses

    @torch.no_grad()
    def _move_uphill(self, weights: list[Any]) -> None:
        """Adds v to each weight, by the gradient that was gathered."""
        if not weights:
            return
        gradients, gamma = [weight.grad for weight in weights], cast(Any, self.gamma)
        long, steep = torch._foreach_norm(weights), torch._foreach_norm(gradients)
        for weight, gradient, one, other in zip(weights, gradients, long, steep, strict=True):
            weight.add_(gradient * (gamma * one / (other + TINY)))


def _steps_plainly(method: Any) -> bool:
    """Whether a method, and all inside of it, gather gradients and step on them, and nothing else."""
    plain = type(method).descend in (Wrapper.descend, Supervised.descend)
    return plain and (not isinstance(method, Wrapper) or _steps_plainly(method.method))


@torch.no_grad()
def _set(weights: list[Any], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
