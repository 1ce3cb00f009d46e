"""What both schedules of the game share: players, losses, and how gradients are gathered and steps taken.

The discriminator sees natural and attacked features as ONE batch, so its spectral norms take one power iteration an
update; its other passes use the norms as they stand. (The released code passes one after the other.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afd.errors import InputError
from afd.methods.base import Batch, Part, Step, parts
from afd.methods.execution import Execution, alone, unsynchronised
from afd.methods.losses import game_loss, gradient_penalty
from afd.methods.optimizers import reaching, take_step, trainable
from afd.nn import Split

if TYPE_CHECKING:
    from afd.methods.afd import AFD


class Game(Step):
    """One round a step: the losses L_C, L_D, L_F and the optimizers of (θ, φ) and ψ.

    Args:
        settings: of the game.
        network: F and C.
        execution: of their passes.
        passes: x -> (features, logits), or x, False -> (features,); its parameters are θ and φ.
        discriminator: (features, labels) -> scores [N].
    """

    def __init__(
        self, settings: AFD, network: Split, execution: Execution, passes: nn.Module, discriminator: nn.Module
    ) -> None:
        super().__init__(settings, network, execution)
        self.passes, self.discriminator, self.settings = passes, discriminator, settings
        self.players = {"discriminator": alone(discriminator)}
        self.loss = game_loss(settings.loss)
        self.theta_phi, self.psi = trainable(passes), trainable(discriminator)
        self.optimizers = {
            "task": settings.optimizer_of("task", self.theta_phi),
            "discriminator": settings.optimizer_of("discriminator", self.psi),
        }
        self.features_learn = True  # whether a parameter of F is trainable, as the pass of L_C has found

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Attacks the batch and plays one round on it.

        Returns:
            L_C, L_D and L_F as "task", "discriminator" and "features", detached.
        """
        if batch.y is None or batch.y.dim() != 1:
            told = "None" if batch.y is None else f"soft labels {list(batch.y.shape)}"
            raise InputError(f"y is {told}; the discriminator is conditioned on classes [N]")
        x_adv = self.attacks(self.method.attack, batch)
        names = ("task", "discriminator", "features")
        return dict(zip(names, self.play(list(parts(batch, self.settings.micro_batches, x_adv))), strict=True))

    def adopt(self, method: AFD) -> None:
        """See `Step.adopt`."""
        self.method = self.settings = method

    def kind(self) -> bool:
        """Whether θ will move on L_F in the next step."""
        return (self.steps + 1) % self.settings.discriminator_rounds == 0

    @abstractmethod
    def play(self, batch: Sequence[Part]) -> Tensor:
        """The updates of one round; returns L_C, L_D, L_F of the batch as one tensor [3], detached."""

    @property
    def features_answer(self) -> bool:
        """Whether θ moves on L_F in this round."""
        return self.steps % self.settings.discriminator_rounds == 0

    def task_loss(self, logits: Tensor, part: Part) -> Tensor:
        """L_C."""
        return reaching(self.settings.cross_entropy(logits, part.y))

    def judge(self, z: Tensor, z_adv: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Scores of natural and attacked features, in the pass of the discriminator that its update rests on.

        Only the first part of a batch takes a power iteration: one a round, and all parts see the same norms.
        """
        self.discriminator.train(part.first)
        natural, attacked = self.discriminator(torch.cat([z, z_adv]), part.classes.repeat(2)).chunk(2)
        self.discriminator.eval()
        return natural, attacked

    def score(self, z: Tensor, part: Part) -> Tensor:
        """Scores in a pass that neither updates the discriminator nor its norms."""
        scores: Tensor = alone(self.discriminator)(z, part.classes)
        return scores

    def discriminator_loss(self, natural: Tensor, attacked: Tensor, z: Tensor, z_adv: Tensor) -> Tensor:
        """L_D of the scores, with the penalty where one is asked for."""
        loss = self.loss.discriminator(natural, attacked)
        if self.settings.penalty:
            loss = loss + self.settings.penalty * gradient_penalty(
                alone(self.discriminator), z.detach(), z_adv.detach()
            )
        return loss

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """Features without a graph."""
        z: Tensor = alone(self.passes)(x, False)[0]
        return z

    def backward_features(self, z_adv: Tensor, pull: Tensor, logits: Tensor | None = None) -> None:
        """Adds the gradients of L_F, whose gradient at F(x') is `pull`: none where all of F is frozen.

        Args:
            z_adv: F(x').
            pull: like z_adv.
            logits: of the same pass, where processes wait for a backward of it to average what was gathered before.
        """
        if z_adv.requires_grad:
            torch.autograd.backward(z_adv, pull, inputs=self.theta_phi)
        elif logits is not None:
            torch.autograd.backward(logits, torch.zeros_like(logits), inputs=self.theta_phi)

    def backward(self, loss: Tensor, part: Part, parameters: Sequence[Tensor]) -> None:
        """Adds the gradients of a part's loss to the `.grad` of `parameters`, and to nothing else."""
        torch.autograd.backward(loss, torch.full_like(loss, part.share), inputs=parameters)

    def take_step(self, player: str) -> None:
        """One step of a player's optimizer on the gradients gathered."""
        take_step(self.optimizers[player], self.settings.clip)

    def gathering(self, module: nn.Module, part: Part) -> AbstractContextManager[Any]:
        """The context for a part's passes and backward: processes average their gradients at the last part."""
        return nullcontext() if part.last else unsynchronised(module)


class Gradients:
    """A second set of `.grad` for some parameters, so that two losses can gather gradients apart."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.others: list[Tensor | None] = [None] * len(parameters)

    def forget(self) -> None:
        """Lets go of the other set, which a round that broke off may have left."""
        self.others = [None] * len(self.parameters)

    def swap(self) -> None:
        """Exchanges the parameters' `.grad` with the other set."""
        for i, parameter in enumerate(self.parameters):
            parameter.grad, self.others[i] = self.others[i], parameter.grad


def weighted(part: Part, losses: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """A part's losses as what they add to the batch's, in one detached tensor."""
    return part.share * torch.stack([loss.detach() for loss in losses])
