"""The alternating schedule, the authors' released code: each player steps before the next one looks.

(θ, φ) on L_C, then ψ on L_D at the new θ, then θ on L_F at the new ψ; three optimizers. Three forwards and two
backwards of F: the discriminator's step needs no gradient of θ, and both it and the features' step see the same F(x').
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afd.errors import InputError, ModelError
from afd.methods.base import Part
from afd.methods.game import Game, weighted

if TYPE_CHECKING:
    from afd.methods.afd import AFD


class AlternatingRound(Game):
    """The three steps of the released code; in micro-batches, F(x') is computed once more instead of kept."""

    def __init__(self, settings: AFD, *parts: Any) -> None:
        super().__init__(settings, *parts)
        self.optimizers["features"] = settings.optimizer_of("features", self.theta_phi)

    def play(self, batch: Sequence[Part]) -> Tensor:
        """See `Game.play`."""
        task = torch.stack([self.gather_task(part) for part in batch]).sum(0)
        self.take_step("task")
        try:
            return self.answer(batch, task)
        except InputError as error:  # about weights that this very step may have spoilt
            if not task.isfinite().all():
                raise ModelError(
                    f"the loss 'task' became {task.item()}: the logits are not finite, or the learning rate is too "
                    "large"
                ) from error
            raise

    def answer(self, batch: Sequence[Part], task: Tensor) -> Tensor:
        """The steps of the discriminator and of the features, after that on L_C."""
        kept = self.features(batch[0].attacked) if len(batch) == 1 else None
        discriminator = torch.stack([self.gather_discriminator(part, kept) for part in batch]).sum(0)
        self.take_step("discriminator")
        features = torch.stack([self.gather_features(part, kept) for part in batch]).sum(0)
        if self.features_answer:
            self.take_step("features")
        return torch.cat([task, discriminator, features])

    def features(self, x: Tensor) -> Tensor:
        """F(x), with a graph where it has a trainable parameter."""
        z: Tensor = self.passes(x, False)[0] if self.features_learn else self.look(x)
        return z

    def gather_task(self, part: Part) -> Tensor:
        """Adds the gradients of L_C; returns the part's share of it."""
        with self.gathering(self.passes, part):
            z, logits = self.passes(part.x)
            task, self.features_learn = self.task_loss(logits, part), z.requires_grad
            self.backward(task, part, self.theta_phi)
        return weighted(part, [task])

    def gather_discriminator(self, part: Part, kept: Tensor | None) -> Tensor:
        """Adds the gradients of L_D, at features without a graph."""
        z = self.look(part.x)
        z_adv = self.look(part.attacked) if kept is None else kept.detach()
        with self.gathering(self.discriminator, part):
            loss = self.discriminator_loss(*self.judge(z, z_adv, part), z, z_adv)
            self.backward(loss, part, self.psi)
        return weighted(part, [loss])

    def gather_features(self, part: Part, kept: Tensor | None) -> Tensor:
        """Adds the gradients of L_F where the features answer in this round."""
        with self.gathering(self.passes, part):
            z_adv = self.features(part.attacked) if kept is None else kept
            features = self.loss.features(self.score(z_adv, part))
            if self.features_answer and self.features_learn:
                self.backward(features, part, self.theta_phi)
        return weighted(part, [features])
