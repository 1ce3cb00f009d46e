"""Adversarial weight perturbation, around any supervised method."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from afd.errors import InputError, number, one_of, whole
from afd.methods.adversarial import TRADES
from afd.methods.base import Batch
from afd.methods.supervised import Supervised, SupervisedStep, Wrapper
from afd.nn.modes import Buffers, statistics_kept

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
