"""Adversarial Feature Desensitization: the three-player game of Bashivan et al. (NeurIPS 2021).

Players: features F_θ, classifier C_φ, discriminator D_ψ. With x' an attacked copy of x, one round does

    (θ, φ) ← (θ, φ) - α ∇L_C        ψ ← ψ - β ∇L_D        θ ← θ - γ ∇L_F

where L_C is the cross-entropy on x alone and L_D, L_F come from `afd.methods.losses`. Two schedules exist, and they are
different algorithms: `SimultaneousRound` is the paper's Algorithm 1, `AlternatingRound` the authors' released code.

In both, the discriminator sees natural and attacked features as ONE batch, so its spectral norms take one power
iteration an update; its other passes use the norms as they stand. (The released code passes one after the other.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from afd.errors import at_least, one_of
from afd.methods.losses import game_loss, gradient_penalty
from afd.nn import FeatureClassifier, ProjectionDiscriminator

SCHEDULES = ("simultaneous", "alternating")


@dataclass(frozen=True)
class AFD:
    """Settings of the game; the defaults are the paper's.

    Attributes:
        loss: "dcgan", "wgan" or "hinge".
        schedule: "simultaneous" (Algorithm 1) or "alternating" (released code).
        lr: α, of features and classifier on the cross-entropy.
        lr_discriminator: β.
        lr_features: γ, of the features on L_F.
        momentum: of all SGD optimizers.
        weight_decay: on θ and φ.
        discriminator_rounds: the features answer the discriminator in every so many rounds (1: each).
        penalty: weight λ of the gradient penalty in L_D; 0 leaves it out.
        hidden: width of the discriminator; by default that of the features.

    Raises:
        InputError: unknown loss or schedule, or a number out of range.
    """

    loss: str = "wgan"
    schedule: str = "simultaneous"
    lr: float = 0.1
    lr_discriminator: float = 0.1
    lr_features: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    discriminator_rounds: int = 1
    penalty: float = 0.0
    hidden: int | None = None
    uses_attack: ClassVar[bool] = True

    def __post_init__(self) -> None:
        game_loss(self.loss)
        one_of("schedule", self.schedule, SCHEDULES)
        at_least("lr", self.lr, 1e-12)
        for name in ("lr_discriminator", "lr_features", "momentum", "weight_decay", "penalty"):
            at_least(name, getattr(self, name), 0.0)
        at_least("discriminator_rounds", self.discriminator_rounds, 1)

    def build(self, model: FeatureClassifier) -> Game:
        """A round that trains `model` against a fresh discriminator."""
        device = next(model.parameters()).device
        discriminator = ProjectionDiscriminator(model.num_features, model.num_classes, self.hidden).to(device)
        rounds = {"simultaneous": SimultaneousRound, "alternating": AlternatingRound}
        return rounds[self.schedule](model, discriminator, self)


class Game(ABC):
    """What both schedules share: the players, their losses and the optimizers of (θ, φ) and ψ."""

    def __init__(self, model: FeatureClassifier, discriminator: nn.Module, settings: AFD) -> None:
        self.model, self.discriminator, self.settings = model, discriminator, settings
        self.players: dict[str, nn.Module] = {"discriminator": discriminator}
        self.loss = game_loss(settings.loss)
        momentum = settings.momentum
        self.optimizers: dict[str, Optimizer] = {
            "task": SGD(model.parameters(), settings.lr, momentum, weight_decay=settings.weight_decay),
            "discriminator": SGD(discriminator.parameters(), settings.lr_discriminator, momentum),
        }
        self.rounds = 0

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """One round.

        Args:
            x: images [N, C, H, W] in [0, 1].
            y: labels [N] int64.
            x_adv: attacked copies of x.

        Returns:
            L_C, L_D and L_F as "task", "discriminator" and "features", detached.
        """
        self.rounds += 1
        task, discriminator, features = self.play(x, y, x_adv)
        return {"task": task.detach(), "discriminator": discriminator.detach(), "features": features.detach()}

    @abstractmethod
    def play(self, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The updates of one round; returns L_C, L_D, L_F."""

    def features_answer(self) -> bool:
        """Whether θ moves on L_F in this round."""
        return self.rounds % self.settings.discriminator_rounds == 0

    def judge(self, z: Tensor, z_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of natural and attacked features, in the one pass of the round that takes a power iteration."""
        self.discriminator.train()
        natural, attacked = self.discriminator(torch.cat([z, z_adv]), y.repeat(2)).chunk(2)
        self.discriminator.eval()
        return natural, attacked

    def discriminator_loss(self, natural: Tensor, attacked: Tensor, z: Tensor, z_adv: Tensor) -> Tensor:
        """L_D of the scores, with the penalty where one is asked for."""
        loss = self.loss.discriminator(natural, attacked)
        if self.settings.penalty:
            loss = loss + self.settings.penalty * gradient_penalty(self.discriminator, z.detach(), z_adv.detach())
        return loss

    def update(self, name: str, *losses: Tensor, weights: list[Tensor | None] | None = None) -> None:
        """One step of optimizer `name` on the losses; gradients reach that optimizer's parameters only."""
        optimizer = self.optimizers[name]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.zero_grad()
        torch.autograd.backward(losses, weights, inputs=parameters)
        optimizer.step()


class SimultaneousRound(Game):
    """Algorithm 1: all three losses at the same (θ, φ, ψ), then the three updates.

    With SGD of one momentum the two updates of θ equal a single optimizer on L_C + (γ/α)·L_F, which is how they are
    done: one forward of x, one of x', one backward through both. The discriminator runs on detached features; what L_F
    asks of θ reaches it as the gradient at F(x').
    """

    def play(self, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Game.play`."""
        z, z_adv = self.model.features(x), self.model.features(x_adv)
        task = F.cross_entropy(self.model.classifier(z), y)
        seen, seen_adv = z.detach(), z_adv.detach().requires_grad_()
        natural, attacked = self.judge(seen, seen_adv, y)
        discriminator = self.discriminator_loss(natural, attacked, seen, seen_adv)
        features = self.loss.features(attacked)
        (pull,) = torch.autograd.grad(features, seen_adv, retain_graph=True)
        self.update("discriminator", discriminator)
        if self.features_answer():
            share = self.settings.lr_features / self.settings.lr
            self.update("task", task, z_adv, weights=[None, share * pull])
        else:
            self.update("task", task)
        return task, discriminator, features


class AlternatingRound(Game):
    """The released code: (θ, φ) on L_C, then ψ on L_D at the new θ, then θ on L_F at the new ψ; three optimizers.

    Three forwards and two backwards of F: the discriminator's step needs no gradient of θ, and both it and the
    features' step see the same F(x').
    """

    def __init__(self, model: FeatureClassifier, discriminator: nn.Module, settings: AFD) -> None:
        super().__init__(model, discriminator, settings)
        self.optimizers["features"] = SGD(model.encoder.parameters(), settings.lr_features, settings.momentum)

    def play(self, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Game.play`."""
        task = F.cross_entropy(self.model(x), y)
        self.update("task", task)
        with torch.no_grad():
            z = self.model.features(x)
        z_adv = self.model.features(x_adv)
        discriminator = self.discriminator_loss(*self.judge(z, z_adv.detach(), y), z, z_adv)
        self.update("discriminator", discriminator)
        features = self.loss.features(self.discriminator(z_adv, y))
        if self.features_answer():
            self.update("features", features)
        return task, discriminator, features
