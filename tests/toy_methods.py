"""Methods that strain the seam: one steps the weights inside its attack, one is given each batch several times and
remembers, one is a wrapper that steps at perturbed weights, one asks for no labels. Each is its class alone, as anybody
would write it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from afd.attacks import PGDSettings
from afd.methods import Natural, Supervised, Wrapper


@dataclass(frozen=True, kw_only=True)
class Replays(Supervised):
    """In the manner of Free (Shafahi et al. 2019): each replay steps the weights and moves δ by one gradient.

    Attributes:
        eps: radius of the Linf ball.
        replays: of each batch.
    """

    eps: float = 0.1
    replays: int = 3

    def losses(self, model, batch):
        return {"task": self.cross_entropy(model(batch.x), batch.y)}

    def update(self, step, batch):
        delta = torch.zeros_like(batch.x)
        for _ in range(self.replays):
            x = (batch.x + delta).clamp(0, 1).requires_grad_()
            losses = step.descend(replace(batch, x=x))
            delta = (delta + self.eps * x.grad.sign()).clamp(-self.eps, self.eps)
        return losses


@dataclass(frozen=True, kw_only=True)
class Remembers(Supervised):
    """As Free itself: each batch is given several times, and δ, by the place in the batch, stays from step to step.

    Attributes:
        eps: radius of the Linf ball.
        replays: of each batch.
    """

    eps: float = 0.1
    replays: int = 3

    @property
    def repeats(self):
        return self.replays

    def losses(self, model, batch):
        return {"task": self.cross_entropy(model(batch.x), batch.y)}

    def update(self, step, batch):
        if "delta" not in step.memory:
            step.memory["delta"] = torch.zeros_like(batch.x)
        delta = step.memory["delta"][: len(batch)]
        x = (batch.x + delta).clamp(0, 1).requires_grad_()
        losses = step.descend(replace(batch, x=x))
        delta.add_(self.eps * x.grad.sign()).clamp_(-self.eps, self.eps)
        return losses


@dataclass(frozen=True)
class Perturbed(Wrapper):
    """In the manner of AWP (Wu et al. 2020): gradient and step are taken at weights that gamma moves uphill.

    Attributes:
        gamma: length of the move, as a share of each weight's norm.
    """

    gamma: float = 0.05

    def descend(self, step, batch):
        with step.attacks.found_once():  # x' of the weights as they are serves both passes
            step.gather(batch)
            moved = [p for p in step.parameters if p.dim() > 1]
            uphill = [self.gamma * p.norm() * p.grad / p.grad.norm() for p in moved]
            step.forget()
            with torch.no_grad():
                torch._foreach_add_(moved, uphill)
            losses = step.gather(batch)
        step.apply()
        with torch.no_grad():
            torch._foreach_sub_(moved, uphill)
        return losses


@dataclass(frozen=True, kw_only=True)
class Clashing(Supervised):
    """Settings by the names of options that are others'; a second attack.

    Attributes:
        alpha: of its own.
        epochs: likewise.
    """

    alpha: float = 0.5
    epochs: int = 3
    attack: PGDSettings = PGDSettings(eps=0.05, steps=1)
    second: PGDSettings = PGDSettings(eps=0.1, steps=2)

    def losses(self, model, batch):
        moved = model(self.attack(model, batch)) + model(self.second(model, batch))
        return {"task": self.alpha * self.cross_entropy(moved, batch.y)}


@dataclass(frozen=True, kw_only=True)
class Strong(Natural):
    """With a weight decay of its own, and steps of a quarter of its radius."""

    weight_decay: float = 3.5e-3
    attack: PGDSettings = PGDSettings(eps=0.1, alpha=0.025, steps=5)
    validation_attack: str = "pgd-2"


def spread(outputs, target):
    """Squared distance of features from those of the clean images, [N]."""
    return (outputs - target).square().sum(1)


@dataclass(frozen=True, kw_only=True)
class Steady(Supervised):
    """Features of attacked images stay near those of clean ones, and all apart from each other; nobody needs labels."""

    attack: PGDSettings = PGDSettings(eps=0.1, steps=3, loss=spread, outputs="features", init="gaussian")
    labels = False

    def losses(self, model, batch):
        z = model.features(batch.x)
        z_adv = model.features(self.attack(model, batch, target=z.detach()))
        return {"near": (z - z_adv).square().mean(), "apart": -0.1 * (z - z.mean(0)).square().mean().clamp(max=1)}


@dataclass(frozen=True, kw_only=True)
class Bursting(Natural):
    """Its loss is no number in one step as long as the learning rate is above a limit."""

    lr: float = 0.5
    limit: float = 0.3
    at: int = 6

    def descend(self, step, batch):
        losses = super().descend(step, batch)
        bursts = step.steps == self.at and step.optimizers["task"].param_groups[0]["lr"] > self.limit
        return {name: one * float("nan") if bursts else one for name, one in losses.items()}
