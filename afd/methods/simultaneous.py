"""The simultaneous schedule, the paper's Algorithm 1: all three losses at the same (θ, φ, ψ), then the three updates.

One forward of x and one of x', one backward through each. The discriminator runs on detached features; what L_F asks of
θ reaches it as the gradient at F(x').
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afd.methods.base import Part
from afd.methods.execution import unsynchronised
from afd.methods.game import Game, Gradients, weighted

if TYPE_CHECKING:
    from afd.methods.afd import AFD


class SimultaneousRound(Game):
    """Any optimizers: the gradients of θ from L_C and from L_F are gathered apart, and each player steps on its own."""

    def __init__(self, settings: AFD, *parts: Any) -> None:
        super().__init__(settings, *parts)
        self.own_optimizer()

    def own_optimizer(self) -> None:
        """What the features need besides what every game has."""
        self.optimizers["features"] = self.settings.optimizer_of("features", self.theta_phi)
        self.gradients = Gradients(self.theta_phi)

    def play(self, batch: Sequence[Part]) -> Tensor:
        """See `Game.play`."""
        self.gradients.forget()
        losses = torch.stack([self.gather(part) for part in batch]).sum(0)
        self.take_step("discriminator")
        self.take_step("task")
        if self.features_answer:
            self.gradients.swap()
            self.take_step("features")
        return losses

    def gather(self, part: Part) -> Tensor:
        """Adds the gradients of a part; returns its share of the losses."""
        z, task = self.gather_task(part)
        if self.features_answer and self.features_learn:
            with self.gathering(self.passes, part):
                (z_adv,) = self.passes(part.attacked, False)
                pull, *game = self.gather_discriminator(z, z_adv.detach(), part)
                self.gradients.swap()
                self.backward_features(z_adv, pull)
                self.gradients.swap()
        else:
            _, *game = self.gather_discriminator(z, self.look(part.attacked), part)
        return weighted(part, [task, *game])

    def gather_task(self, part: Part) -> tuple[Tensor, Tensor]:
        """The part of L_C: returns detached features of x, and the loss."""
        with self.gathering(self.passes, part):
            return self._task(part)

    def _task(self, part: Part) -> tuple[Tensor, Tensor]:
        z, logits = self.passes(part.x)
        task, self.features_learn = self.task_loss(logits, part), z.requires_grad
        self.backward(task, part, self.theta_phi)
        return z.detach(), task

    def gather_discriminator(self, z: Tensor, z_adv: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The part of L_D: returns the weighted gradient of L_F at F(x'), L_D and L_F."""
        with self.gathering(self.discriminator, part):
            z_adv.requires_grad_()
            natural, attacked = self.judge(z, z_adv, part)
            discriminator = self.discriminator_loss(natural, attacked, z, z_adv)
            features = self.loss.features(attacked)
            (pull,) = torch.autograd.grad(features, z_adv, retain_graph=True)
            self.backward(discriminator, part, self.psi)
        return part.share * pull, discriminator, features


class JointRound(SimultaneousRound):
    """SGD of one momentum: the two updates of θ equal one optimizer on L_C + (γ/α)·L_F, which is how they are done.

    The schedules scale α and γ alike, so their ratio stays.
    """

    def own_optimizer(self) -> None:
        """Nothing: θ has one optimizer."""

    def play(self, batch: Sequence[Part]) -> Tensor:
        """See `Game.play`."""
        losses = torch.stack([self.gather(part) for part in batch]).sum(0)
        self.take_step("discriminator")
        self.take_step("task")
        return losses

    def gather(self, part: Part) -> Tensor:
        """See `SimultaneousRound.gather`; the gradients of L_F join those of L_C."""
        if not self.features_answer:
            return super().gather(part)
        with unsynchronised(self.passes):  # the backward through x' averages both
            z, task = self._task(part)
        with self.gathering(self.passes, part):
            # the logits come along, so that the classifier, whose gradient was gathered above, does not count as unused
            z_adv, logits = self.passes(part.attacked)
            pull, *game = self.gather_discriminator(z, z_adv.detach(), part)
            share = self.settings.lr_features / self.settings.lr
            self.backward_features(z_adv, share * pull, logits)
        return weighted(part, [task, *game])
