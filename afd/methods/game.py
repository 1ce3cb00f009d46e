"""The game of AFD: the step that both schedules share, and the two schedules.

The discriminator sees natural and attacked features as ONE batch, so its spectral norms take one power iteration an
update; its other passes use the norms as they stand. (The released code passes one after the other.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import InputError, ModelError
from afd.execution import Execution, alone, unsynchronised
from afd.methods.base import Batch, Part, Step, of_each, parts
from afd.methods.optimizers import Gradients, reaching, take_step, trainable
from afd.methods.supervised import Optimized
from afd.nn import Split
from afd.nn.modes import statistics_kept

# --- The step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GameLoss:
    """discriminator(natural, attacked) -> L_D and features(attacked) -> L_F."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


def gradient_penalty(discriminator: nn.Module, natural: Tensor, attacked: Tensor) -> Tensor:
    """mean (‖∇_z D(z)‖₂ - 1)² at random points z between natural and attacked features (Gulrajani et al. 2017).

    As in the paper's code the discriminator is asked without a label.

    Args:
        discriminator: (z) -> scores [N].
        natural: features F(x) [N, num_features], detached.
        attacked: features F(x') [N, num_features], detached; of several copies of each image, [N * copies, ...].
    """
    natural = of_each(natural, attacked)
    share = torch.rand(natural.shape[0], 1, dtype=natural.dtype, device=natural.device)
    between = torch.lerp(natural, attacked, share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    penalty: Tensor = (slope.norm(dim=1) - 1).square().mean()
    return penalty


class GameSettings(Optimized):
    """What a step of the game reads of its settings: `afd.methods.AFD` declares them as fields."""

    lr_features: float
    adversarial_weight: float
    divergence_weight: float
    discriminator_steps: int
    penalty: float

    @property
    @abstractmethod
    def game(self) -> GameLoss:
        """The losses of discriminator and features."""


class AFDStep(Step):
    """One step of the three players: the losses L_C, L_D, L_F and the optimizers of (θ, φ) and ψ.

    Args:
        settings: of the game.
        network: F and C.
        execution: of their passes.
        passes: x -> (features, logits), or x, False -> (features,); its parameters are θ and φ.
        discriminator: (features, labels) -> scores [N].
    """

    def __init__(
        self, settings: GameSettings, network: Split, execution: Execution, passes: nn.Module, discriminator: nn.Module
    ) -> None:
        super().__init__(settings, network, execution)
        self.passes, self.discriminator, self.settings = passes, discriminator, settings
        self.players = {"discriminator": alone(discriminator)}
        self.loss = settings.game
        self.theta_phi, self.psi = trainable(passes), trainable(discriminator)
        self.optimizers = {
            "task": settings.optimizer_of("task", passes),
            "discriminator": settings.optimizer_of("discriminator", discriminator),
        }
        self.features_learn = True  # whether a parameter of F is trainable, as the pass of L_C has found

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Attacks the batch and moves the three players once.

        Returns:
            L_C, L_D and L_F as "task", "discriminator" and "features", detached.
        """
        if batch.y is None or batch.y.dim() != 1:
            told = "None" if batch.y is None else f"soft labels {list(batch.y.shape)}"
            raise InputError(f"y is {told}; the discriminator is conditioned on classes [N]")
        x_adv = self.attacks(self.method.attack, batch)
        names = ("task", "discriminator", "features")
        return dict(zip(names, self.run(list(parts(batch, self.settings.micro_batches, x_adv))), strict=True))

    def adopt(self, method: GameSettings) -> None:
        """See `Step.adopt`."""
        self.method = self.settings = method

    def kind(self) -> bool:
        """Whether θ will move on L_F in the next step."""
        return (self.steps + 1) % self.settings.discriminator_steps == 0

    @abstractmethod
    def run(self, batch: Sequence[Part]) -> Tensor:
        """The updates of one step; returns L_C, L_D, L_F of the batch as one tensor [3], detached."""

    @property
    def features_answer(self) -> bool:
        """Whether θ moves on L_F in this step."""
        return self.steps % self.settings.discriminator_steps == 0

    def task_loss(self, logits: Tensor, part: Part) -> Tensor:
        """L_C as far as it is of x."""
        return reaching(self.settings.cross_entropy(logits, part.y))

    @property
    def task_asks_for_attacked(self) -> bool:
        """Whether L_C is of x', too."""
        return asked(self.settings.adversarial_weight) or asked(self.settings.divergence_weight)

    def gather_task(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds the gradients of L_C; returns detached features of x, the loss, and those of x', if L_C is of it too."""
        if not self.task_asks_for_attacked:
            with self.gathering(self.passes, part):
                z, _, task = self._task(part)
            return z, task, None
        with unsynchronised(self.passes):  # the backward through x' averages both
            z, logits, task = self._task(part)
        with self.gathering(self.passes, part):
            z_adv, attacked = self.passes(part.attacked)
            task = task + self.attacked_loss(logits, attacked, part)
            self.backward(task, part, self.theta_phi)
        return z, task.detach(), z_adv.detach()

    def _task(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Features of x, detached, logits, and L_C as far as it is of x.

        With their graphs, where a term is of x and x'; else the gradients are added here, and both come detached.
        """
        z, logits = self.passes(part.x)
        task, self.features_learn = self.task_loss(logits, part), z.requires_grad
        if asked(self.settings.divergence_weight):
            return z.detach(), logits, task
        self.backward(task, part, self.theta_phi)
        return z.detach(), logits.detach(), task.detach()

    def attacked_loss(self, logits: Tensor, attacked: Tensor, part: Part) -> Tensor:
        """What L_C has beside the cross-entropy of x: λ CE of the logits of x', and μ KL(p(x) ‖ p(x')) of both."""
        found = attacked.new_zeros(())
        if asked(self.settings.adversarial_weight):
            classes = of_each(part.classes, attacked)
            found = found + self.settings.adversarial_weight * self.settings.cross_entropy(attacked, classes)
        if asked(self.settings.divergence_weight):
            log_p = of_each(logits.log_softmax(1), attacked)
            apart = F.kl_div(attacked.log_softmax(1), log_p, reduction="batchmean", log_target=True)
            found = found + self.settings.divergence_weight * apart
        return found

    def judge(self, z: Tensor, z_adv: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Scores of natural and attacked features, in the pass of the discriminator that its update rests on.

        Only the first part of a batch takes a power iteration: one a step, and all parts see the same norms.
        """
        self.discriminator.train(part.first)
        classes = torch.cat([part.classes, of_each(part.classes, z_adv)])
        natural, attacked = self.discriminator(torch.cat([z, z_adv]), classes).split([len(z), len(z_adv)])
        self.discriminator.eval()
        return natural, attacked

    def score(self, z: Tensor, part: Part) -> Tensor:
        """Scores in a pass that neither updates the discriminator nor its norms."""
        scores: Tensor = alone(self.discriminator)(z, of_each(part.classes, z))
        return scores

    def discriminator_loss(self, natural: Tensor, attacked: Tensor, z: Tensor, z_adv: Tensor) -> Tensor:
        """L_D of the scores, with the penalty where one is asked for."""
        loss = self.loss.discriminator(natural, attacked)
        if asked(self.settings.penalty):
            loss = loss + self.settings.penalty * gradient_penalty(
                alone(self.discriminator), z.detach(), z_adv.detach()
            )
        return loss

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """Features without a graph."""
        z: Tensor = alone(self.passes)(x, False)[0]
        return z

    def backward_features(self, z_adv: Tensor, grad_features: Tensor, logits: Tensor | None = None) -> None:
        """Adds the gradients of L_F, whose gradient at F(x') is `grad_features`: none where all of F is frozen.

        Args:
            z_adv: F(x').
            grad_features: like z_adv.
            logits: of the same pass, where processes wait for a backward of it to average what was gathered before.
        """
        if z_adv.requires_grad:
            torch.autograd.backward(z_adv, grad_features, inputs=self.theta_phi)
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


def asked(weight: float | Tensor) -> bool:
    """Whether a term counts: one whose weight is live does, as asking for its value would wait for the device."""
    return isinstance(weight, Tensor) or weight > 0


def weighted(part: Part, losses: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """A part's losses as what they add to the batch's, in one detached tensor."""
    return part.share * torch.stack([loss.detach() for loss in losses])


# --- The simultaneous schedule --------------------------------------------------------------------------------------


class SimultaneousStep(AFDStep):
    """Any optimizers: the gradients of θ from L_C and from L_F are gathered apart, and each player steps on its own."""

    def __init__(self, settings: GameSettings, *parts: Any) -> None:
        super().__init__(settings, *parts)
        self.own_optimizer()

    def own_optimizer(self) -> None:
        """What the features need besides what every game has."""
        self.optimizers["features"] = self.settings.optimizer_of("features", self.passes)
        self.gradients = Gradients(self.theta_phi)

    def run(self, batch: Sequence[Part]) -> Tensor:
        """See `AFDStep.run`."""
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
        z, task, z_adv = self.gather_task(part)
        if self.features_answer and self.features_learn:
            # a pass of its own, as its gradient is averaged by itself; running statistics have met x' already
            once = nullcontext() if z_adv is None else statistics_kept(self.passes)
            with self.gathering(self.passes, part), once:
                (z_adv,) = self.passes(part.attacked, False)
                grad_features, *game = self.gather_discriminator(z, z_adv.detach(), part)
                self.gradients.swap()
                self.backward_features(z_adv, grad_features)
                self.gradients.swap()
        else:
            _, *game = self.gather_discriminator(z, self.look(part.attacked) if z_adv is None else z_adv, part)
        return weighted(part, [task, *game])

    def gather_discriminator(self, z: Tensor, z_adv: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The part of L_D: returns the weighted gradient of L_F at F(x'), L_D and L_F."""
        with self.gathering(self.discriminator, part):
            z_adv.requires_grad_()
            natural, attacked = self.judge(z, z_adv, part)
            discriminator = self.discriminator_loss(natural, attacked, z, z_adv)
            features = self.loss.features(attacked)
            (grad_features,) = torch.autograd.grad(features, z_adv, retain_graph=True)
            self.backward(discriminator, part, self.psi)
        return part.share * grad_features, discriminator, features


class JointStep(SimultaneousStep):
    """One optimizer of (θ, φ) on L_C + (γ/α)·L_F, beside that of ψ: the schedule "joint".

    With SGD of one momentum it equals the simultaneous updates, and is how those are done. The schedules scale α and γ
    alike, so their ratio stays.
    """

    def own_optimizer(self) -> None:
        """Nothing: θ has one optimizer."""

    def run(self, batch: Sequence[Part]) -> Tensor:
        """See `AFDStep.run`."""
        losses = torch.stack([self.gather(part) for part in batch]).sum(0)
        self.take_step("discriminator")
        self.take_step("task")
        return losses

    def gather(self, part: Part) -> Tensor:
        """See `SimultaneousStep.gather`; the gradients of L_F join those of L_C."""
        if not self.features_answer:
            return super().gather(part)
        with unsynchronised(self.passes):  # the backward through x' averages both
            z, clean, task = self._task(part)
        with self.gathering(self.passes, part):
            # the logits come along, so that the classifier, whose gradient was gathered above, does not count as unused
            z_adv, logits = self.passes(part.attacked)
            grad_features, *game = self.gather_discriminator(z, z_adv.detach(), part)
            share = self.settings.lr_features / self.settings.lr
            if self.task_asks_for_attacked:
                task = task + self.attacked_loss(clean, logits, part)
                self.backward_both(z_adv, share * grad_features, task, part)
            else:
                self.backward_features(z_adv, share * grad_features, logits)
        return weighted(part, [task, *game])

    def backward_both(self, z_adv: Tensor, grad_features: Tensor, loss: Tensor, part: Part) -> None:
        """Adds the gradients of L_F and of a loss, both of x', in one pass."""
        roots, gradients = [loss], [torch.full_like(loss, part.share)]
        if z_adv.requires_grad:
            roots, gradients = [*roots, z_adv], [*gradients, grad_features]
        torch.autograd.backward(roots, gradients, inputs=self.theta_phi)


# --- The alternating schedule ---------------------------------------------------------------------------------------


class AlternatingStep(AFDStep):
    """The three steps of the released code; in micro-batches, F(x') is computed once more instead of kept."""

    def __init__(self, settings: GameSettings, *parts: Any) -> None:
        super().__init__(settings, *parts)
        self.optimizers["features"] = settings.optimizer_of("features", self.passes)

    def run(self, batch: Sequence[Part]) -> Tensor:
        """See `AFDStep.run`."""
        task = torch.stack([weighted(part, [self.gather_task(part)[1]]) for part in batch]).sum(0)
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

    def gather_discriminator(self, part: Part, kept: Tensor | None) -> Tensor:
        """Adds the gradients of L_D, at features without a graph."""
        z = self.look(part.x)
        z_adv = self.look(part.attacked) if kept is None else kept.detach()
        with self.gathering(self.discriminator, part):
            loss = self.discriminator_loss(*self.judge(z, z_adv, part), z, z_adv)
            self.backward(loss, part, self.psi)
        return weighted(part, [loss])

    def gather_features(self, part: Part, kept: Tensor | None) -> Tensor:
        """Adds the gradients of L_F where the features answer in this step."""
        with self.gathering(self.passes, part):
            z_adv = self.features(part.attacked) if kept is None else kept
            features = self.loss.features(self.score(z_adv, part))
            if self.features_answer and self.features_learn:
                self.backward(features, part, self.theta_phi)
        return weighted(part, [features])
