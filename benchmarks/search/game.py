"""The game of AFD told by its losses, with every idea of the search as a setting: prototypes that the library lacks.

One optimizer has features and classifier (`afd.methods.AFD(schedule="joint")`); as a supervised method it can stand
inside of AWP, and its attack may climb what the discriminator says. What has helped is in `afd.methods.AFD`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks import PGDSettings
from afd.attacks.settings import AttackSettings
from afd.execution import Execution, Wrap, as_torch_starts
from afd.methods import AWP, Batch
from afd.methods.afd import GAME_LOSSES
from afd.methods.base import unwrapped
from afd.methods.game import gradient_penalty
from afd.methods.supervised import Supervised, SupervisedStep
from afd.nn import ProjectionDiscriminator


@dataclass(frozen=True, kw_only=True)
class Game(Supervised):
    """CE(x) + λ CE(x') + β KL(p(x) ‖ p(x')) + w L_F, against a discriminator with an optimizer of its own.

    Attributes:
        loss: of the game: "wgan", "dcgan" or "hinge".
        game_weight: w.
        lr_discriminator: learning rate of the discriminator.
        adversarial_weight: λ.
        beta: β.
        hidden, depth, power_iterations: of the discriminator.
        penalty: weight of the gradient penalty in L_D.
        conditional: whether the discriminator is told labels.
        attack_on: what the attack climbs: "ce", or "mixed", CE + w L_F.
    """

    loss: str = "wgan"
    game_weight: float = 5.0
    lr_discriminator: float = 0.1
    adversarial_weight: float = 0.0
    beta: float = 0.0
    hidden: int | None = None
    depth: int = 3
    power_iterations: int = 1
    penalty: float = 0.0
    conditional: bool = True
    attack_on: Literal["ce", "mixed"] = "ce"
    attack: AttackSettings = PGDSettings()
    validation_attack: AttackSettings | str | None = "pgd-20"

    uses_features: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = False
    players: ClassVar[tuple[str, ...]] = ("task", "discriminator")

    def build(self, model: Any, execution: Execution = Execution(), wrap: Wrap = unwrapped) -> SupervisedStep:
        return self.equipped(super().build(model, execution, wrap))

    def equipped(self, step: SupervisedStep) -> SupervisedStep:
        """A step with a discriminator, and its optimizer."""
        network: Any = step.network
        with as_torch_starts():
            discriminator = ProjectionDiscriminator(
                network.num_features, network.num_classes, self.hidden, self.depth, self.power_iterations
            )
        step.players = {"discriminator": discriminator}
        step.optimizers["discriminator"] = self.optimizer_of_discriminator(discriminator)
        seen: Any = step.model
        seen.discriminator = [discriminator]  # in a list, it is no part of the model
        if self.attack_on == "mixed":
            climbed = self.climbed(discriminator, network.classifier)
            seen.attack = [replace(self.attack, loss=climbed, outputs="features", precision="fp32")]
        return step

    def optimizer_of_discriminator(self, discriminator: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(discriminator.parameters(), self.lr_discriminator, momentum=self.momentum)
        betas = (0.0, 0.9) if self.loss == "wgan" else (0.5, 0.999)
        return torch.optim.Adam(discriminator.parameters(), self.lr_discriminator, betas=betas)

    def climbed(self, discriminator: nn.Module, head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """What the attack climbs, from features."""

        def loss(z: Tensor, y: Tensor) -> Tensor:
            discriminator.eval()
            score = -discriminator(z, y if self.conditional else None)
            answer = F.softplus(score) if self.loss == "dcgan" else score
            return F.cross_entropy(head(z), y, reduction="none") + self.game_weight * answer

        return loss

    def losses(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        (discriminator,) = model.discriminator
        attack = model.attack[0] if self.attack_on == "mixed" else self.attack
        x_adv = attack(model, batch)
        z, logits = model.features_and_logits(batch.x)
        z_adv, attacked_logits = model.features_and_logits(x_adv)
        natural, attacked = z.detach().float(), z_adv.detach().float().requires_grad_()
        discriminator.train()
        y = torch.cat([batch.y, batch.y]) if self.conditional else None
        scores = discriminator(torch.cat([natural, attacked]), y).split(len(z))
        discriminator.eval()
        game = GAME_LOSSES[self.loss]
        (slope,) = torch.autograd.grad(game.features(scores[1]), attacked, retain_graph=True)
        judged = game.discriminator(*scores)
        if self.penalty:
            judged = judged + self.penalty * gradient_penalty(discriminator, natural, attacked.detach())
        model.grads = torch.autograd.grad(judged, list(discriminator.parameters()), allow_unused=True)
        terms = {
            "task": self.cross_entropy(logits, batch.y), "features": self.game_weight * (z_adv.float() * slope).sum(),
        }  # fmt: skip
        if self.adversarial_weight:
            terms["adversarial"] = self.adversarial_weight * self.cross_entropy(attacked_logits, batch.y)
        if self.beta:
            both = attacked_logits.log_softmax(1), logits.log_softmax(1)
            terms["robust"] = self.beta * F.kl_div(*both, reduction="batchmean", log_target=True)
        return terms

    def update(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        found = step.descend(batch)
        parameters = step.players["discriminator"].parameters()
        for parameter, gradient in zip(parameters, step.model.grads, strict=True):  # type: ignore[arg-type]
            parameter.grad = gradient
        step.optimizers["discriminator"].step()
        return found


class GameAWP(AWP):
    """AWP around the game: θ and φ are moved uphill in its losses, the discriminator is not."""

    def build(self, model: Any, execution: Execution = Execution(), wrap: Wrap = unwrapped) -> SupervisedStep:
        core: Any = self.core
        return core.equipped(super().build(model, execution, wrap))
