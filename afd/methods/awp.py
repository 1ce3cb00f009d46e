"""Adversarial weight perturbation, around any supervised method."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from afd.errors import number, one_of, whole
from afd.methods.adversarial import TRADES
from afd.methods.base import Batch
from afd.methods.supervised import SupervisedStep, Wrapper
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
        start_epoch: epochs in which nothing is moved yet (the authors have 10 with TRADES).
        weight_decay_at: the weights that decay: "perturbed", w + v as released, or "original", w.

    Raises:
        InputError: a number out of range.
    """

    gamma: float | None = None
    start_epoch: int = 0
    weight_decay_at: Literal["perturbed", "original"] = "perturbed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            number("gamma", self.gamma, 0.0)
        whole("start_epoch", self.start_epoch, 0)
        one_of("weight_decay_at", self.weight_decay_at, DECAYS)

    def moves(self, step: SupervisedStep) -> bool:
        """Whether the next step moves the weights."""
        return step.epoch > self.start_epoch

    def kind(self, step: SupervisedStep) -> Hashable:
        """See `Wrapper`."""
        return self.moves(step), super().kind(step)

    def descend(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer at perturbed weights; returns the losses there."""
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
            with torch.no_grad():
                torch._foreach_add_(weights, self._uphill(weights))
            step.forget()
            try:
                losses = step.gather(batch)
            except BaseException:
                self._put_back(weights, original)
                raise
        if self.weight_decay_at == "original":
            self._put_back(weights, original)
            step.apply()
            return losses
        moved = [weight.detach().clone() for weight in weights]
        step.apply()
        with torch.no_grad():  # w + what the step has done: exactly w where it has done nothing
            torch._foreach_sub_(weights, moved)
            torch._foreach_add_(weights, original)
        return losses

    def _uphill(self, weights: list[Tensor]) -> list[Tensor]:
        """v of each weight, from the gradient that was gathered."""
        gamma = (0.005 if isinstance(self.core, TRADES) else 0.01) if self.gamma is None else self.gamma
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        long, steep = torch._foreach_norm(weights), torch._foreach_norm(gradients)
        return [g * (gamma * one / (other + TINY)) for g, one, other in zip(gradients, long, steep, strict=True)]

    @staticmethod
    @torch.no_grad()
    def _put_back(weights: list[Tensor], original: list[Tensor]) -> None:
        torch._foreach_copy_(weights, original)
