"""Methods that regularise how the model answers near an image: LLR, GAT, NuAT.

None has a cross-entropy of attacked images: LLR asks that the loss be linear around an image, the others that the
answer stay what it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afd.attacks import PGDSettings, engine
from afd.attacks.ball import Ball, Norm, ball_of_norm
from afd.attacks.batchnorm import CleanBatch, check_clean, taking_part
from afd.attacks.inputs import per_image
from afd.attacks.losses import wide
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, number, one_of, whole
from afd.execution import AttackExecution, Execution
from afd.methods.base import Batch
from afd.methods.inputs import check_twice_differentiable
from afd.methods.supervised import Supervised, SupervisedStep, TrainedModel

# --- Local linearity --------------------------------------------------------------------------------------------------


ASCENTS = ("loss", "gap")
BETAS, TINY = (0.9, 0.999), 1e-9  # of the search's Adam


@dataclass(frozen=True, kw_only=True)
class LLR(Supervised):
    """Local linearity regularisation (Qin et al. 2019): CE(f(x), y), its departure from a linear function, its slope.

    The loss is ``task_weight`` mean ℓ(x) + ``linearity`` mean |ℓ(x + δ) - ℓ(x) - δ·∇ℓ(x)| + ``slope`` mean |δ·∇ℓ(x)|,
    ℓ being the cross-entropy; the gradient goes through ∇ℓ. δ is sought in the ball as where the first of the two
    departs furthest: steps of Adam from a uniform start, projected. x + δ is passed with the BatchNorm statistics of
    the clean pass, to which gradients flow as well; only that pass updates running statistics. In evaluation mode,
    with those statistics, δ is sought.

    The defaults are those of the authors' code for CIFAR-10 (WideResNet-28-8 with softplus, batches of 64, 100,000
    steps, the rate falling tenfold after 80, 88 and 96 thousand; eps grows over 500 steps, which is `--eps-warmup`). In
    the words of the paper (Eq. 8), with ``task_weight=1``, λ is `linearity` and μ is `slope`.

    δ is sought in the precision of the run, and the passes of the loss are in float32 in any. It differentiates twice,
    which `Execution(compile=True)` cannot. The second derivative of a ReLU is zero almost
    everywhere, so that the regulariser does not see what bends the loss: it is for softplus or silu (`--activation`).

    Attributes:
        weight_decay: on the model's weights; the authors' is on convolutions and linear layers only (`decay_norms`).
        decay_norms: weight decay also on the parameters of fewer than two dimensions: those of norms, and biases.
        norm: of the ball: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image.
        task_weight: of the cross-entropy of clean images.
        linearity: weight of the departure from a linear loss, λ where task_weight is 1.
        slope: weight of the loss's slope along δ, μ where task_weight is 1.
        search_steps: of Adam, for δ.
        search_rate: of Adam, in units of the image.
        ascent: what δ ascends: "loss", the loss at x + δ in the direction that widens the gap (as released, where the
            linear part counts as a constant), or "gap", the gap itself, as the paper says.

    Raises:
        InputError: a number out of range, an unknown norm or ascent, or as `Supervised`.
    """

    weight_decay: float = 2e-4
    decay_norms: bool = False
    norm: Norm = "Linf"
    eps: float = 8 / 255
    task_weight: float = 2.0
    linearity: float = 4.0
    slope: float = 1.2
    search_steps: int = 10
    search_rate: float = 0.1
    ascent: Literal["loss", "gap"] = "loss"
    validation_attack: AttackSettings | str | None = "pgd-20"

    of_host: ClassVar[frozenset[str]] = Supervised.of_host | {"search_rate"}

    def __post_init__(self) -> None:
        super().__post_init__()
        ball_of_norm(self.norm)
        for name in ("eps", "task_weight", "linearity", "slope", "search_rate"):
            number(name, getattr(self, name), 0.0)
        whole("search_steps", self.search_steps, 0)
        one_of("ascent", self.ascent, ASCENTS)

    def running(self, network: Any, execution: Execution) -> Execution:
        """See `Method`: in float32, whatever is chosen for the search.

        What departs from a linear function is a difference of numbers that are nearly equal, of which bfloat16 has no
        digits left: gradients of the weights are then others.

        Raises:
            InputError: the passes are compiled, or statistics of the clean batch cannot be given to BatchNorm layers.

        Warns:
            UserWarning: the model is piecewise linear.
        """
        check_twice_differentiable("LLR", network, execution)
        check_clean(network, taking_part(network), "LLR passes images with the clean batch's statistics")
        return replace(execution, precision="fp32")

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy of clean images as "task", the departure as "linearity", the slope as "slope"; weighted."""
        x, clean = batch.x.detach().requires_grad_(), CleanBatch(model.passes)
        with clean.noted():
            logits = model(x)
        losses = self._cross_entropies(logits, batch)
        (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        x_adv = model.attacks.once(lambda: self._search(model, batch, clean, losses.detach(), gradient.detach()))
        along = ((x_adv - batch.x) * gradient).flatten(1).sum(1)
        with clean.passing():
            attacked = model(x_adv)
        gap = self._cross_entropies(attacked, batch) - losses - along
        return {
            "task": self.task_weight * losses.mean(),
            "linearity": self.linearity * gap.abs().mean(),
            "slope": self.slope * along.abs().mean(),
        }

    def _cross_entropies(self, logits: Tensor, batch: Batch) -> Tensor:
        """That of each image, [N]."""
        if batch.y is None:
            raise InputError("y is None; the loss needs labels")
        return F.cross_entropy(logits, batch.y, reduction="none", label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def _search(self, model: TrainedModel, batch: Batch, clean: CleanBatch, losses: Tensor, gradient: Tensor) -> Tensor:
        """The images x + δ, [N, ...], from the losses [N] and their gradients at the clean ones."""
        x, network, execution = batch.x, model.attacks.network, AttackExecution(model.attacks.precision)
        ball = Ball(self.norm, per_image(self.eps, x))
        x_adv = ball.start(x, seed=batch.seed, first_sample=batch.first_sample)
        adam, share = _Adam(x_adv, self.search_rate), getattr(batch, "share", 1.0)  # the whole batch's mean
        with clean.evaluating(network) as begin_pass:
            for _ in range(self.search_steps):
                with torch.enable_grad():
                    point = x_adv.detach().requires_grad_()
                    begin_pass()
                    with execution.autocast(x.device):
                        logits = wide(engine.logits(network, execution.laid_out(point, network))[0])
                    moved = point - x
                    along = ((moved if self.ascent == "gap" else moved.detach()) * gradient).flatten(1).sum(1)
                    gap = self._cross_entropies(logits, batch) - losses - along
                    (steepest,) = torch.autograd.grad(share * gap.abs().mean(), point)
                adam.ascend_(x_adv, steepest)
                ball.project_(x_adv, x)
        return x_adv


class _Adam:
    """Adam's ascent (Kingma & Ba 2015) of one tensor, in one launch a step, without a look at values.

    Args:
        like: what is moved.
        rate: of learning.
    """

    def __init__(self, like: Tensor, rate: float) -> None:
        self.rate = rate
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.steps = torch.zeros((), device=like.device)

    def ascend_(self, x: Tensor, gradient: Tensor) -> None:
        """One step of x, in place."""
        self.steps += 1
        torch._fused_adam_(
            [x], [gradient], [self.mean], [self.square], [], [self.steps], lr=self.rate, beta1=BETAS[0],
            beta2=BETAS[1], weight_decay=0.0, eps=TINY, amsgrad=False, maximize=True,
        )  # fmt: skip


# --- Answers that stay ------------------------------------------------------------------------------------------------


_guided = WeakIdKeyDictionary()  # settings of attacks as methods guide them, by those that they are made of


@dataclass(frozen=True, kw_only=True)
class Guided(Supervised):
    """Base of one-step methods that keep the logits of x' near those of x, by which every second attack is guided.

    The loss is CE(f(x), y) + `weight` times a distance of f(x) and f(x'). In the first step of a run, and in every
    second from there, x' ascends the cross-entropy; in the others, the loss itself, f(x) being that of the training
    pass. (The authors' code begins anew with each epoch, which is the same where an epoch has an even number of
    batches.) It passes x twice in each step, which changes running statistics of BatchNorm only: that is done here
    without the pass. An attack with a loss of your own, or given as a function, attacks by that alone.

    Attributes:
        weight: λ, of the distance.

    Raises:
        InputError: weight is negative, the attack's loss has another name than "ce" or is targeted, or as `Supervised`.
    """

    weight: float
    validation_attack: AttackSettings | str | None = "pgd-20"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight", self.weight, 0.0)
        attack = self.attack
        if not isinstance(attack, AttackSettings) or callable(attack.loss):
            return
        if attack.loss != "ce" or attack.targeted:
            told = f"loss is {attack.loss!r}" if attack.loss != "ce" else "targeted is True"
            raise InputError(
                f"the attack's {told}; {type(self).__name__} attacks the cross-entropy, with its own distance in every "
                "second step: allowed are the untargeted loss 'ce', and a function"
            )

    @staticmethod
    @abstractmethod
    def guide(outputs: Tensor, target: Tensor) -> Tensor:
        """The attack's loss, for `AttackSettings`; target [N, 2 K + 1]: soft labels, clean logits, weight."""

    @abstractmethod
    def distance(self, clean: Tensor, attacked: Tensor) -> Tensor:
        """That of logits [N, K], []."""

    def weight_in(self, batch: Batch) -> Any:  # noqa: ARG002
        """The weight of the distance in a step."""
        return self.weight

    def kind(self, step: SupervisedStep) -> Hashable:
        """Whether the next attack is guided."""
        return step.steps % 2 == 1

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy of clean images as "task", the weighted distance as "distance"."""
        weight = self.weight_in(batch)
        with model.statistics() as statistics:
            clean = model(batch.x)
        task = self.cross_entropy(clean, batch.y)
        attacked = model(self._attacked(model, batch, clean.detach(), weight))
        statistics.replay()
        return {"task": task, "distance": weight * self.distance(clean, attacked)}

    def _attacked(self, model: TrainedModel, batch: Batch, clean: Tensor, weight: Any) -> Tensor:
        attack = self.attack
        if not isinstance(attack, AttackSettings) or callable(attack.loss):
            return attack(model, batch)  # type: ignore[no-any-return]
        known: dict[Callable[..., Tensor], AttackSettings] = _guided.setdefault(attack, {})
        if self.guide not in known:
            known[self.guide] = replace(attack, loss=self.guide)
        model.attacks.of(known[self.guide])  # built in the first step, after which nothing is new to a recorded one
        if batch.steps % 2 == 0:
            return attack(model, batch)
        y: Any = batch.y
        labels = y if y.is_floating_point() else torch.zeros_like(clean).scatter_(1, y[:, None], 1.0)
        target = torch.cat([labels.to(clean.dtype), clean, weight * torch.ones_like(clean[:, :1])], 1)
        return known[self.guide](model, batch, target=target)


def _taken_apart(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropies [N], the clean logits [N, K] and the weights [N] of `Guided.guide`."""
    classes = outputs.shape[1]
    labels, clean, weight = target.split([classes, classes, 1], 1)
    return F.cross_entropy(outputs, labels, reduction="none"), clean, weight.squeeze(1)


ONE_STEP = PGDSettings(steps=1, alpha=8 / 255, init="coin-flip", start_scale=4 / 255)


@dataclass(frozen=True, kw_only=True)
class GAT(Guided):
    """Guided adversarial training (Sriramanan et al. 2020): CE(f(x), y) + λ mean ‖p(x) - p(x')‖², x' after one step.

    The attack starts at corners of the ball of half the radius, drawn by a fair coin, and takes one step of length eps
    in evaluation mode. The defaults are those of the authors' code for ResNet-18 on CIFAR-10: 100 epochs in batches of
    64, the rate divided by 10 after 71 and 86 of them, the weight multiplied after 86. Their MNIST has 50 epochs, a
    rate of 0.01, a start of the whole radius, λ = 15 (growing threefold after 13, 26 and 38) and a guided attack in
    every step.

    Attributes:
        weight_decay: on the model's weights.
        weight: λ, of the squared distance of probabilities, a mean over images.
        growth: what the weight is multiplied by late in the run.
        growth_epoch: the first in which it is, counted from 1.
    """

    weight_decay: float = 5e-4
    weight: float = 10.0
    growth: float = 4.0
    growth_epoch: int = 87
    attack: AttackSettings = ONE_STEP

    def __post_init__(self) -> None:
        super().__post_init__()
        number("growth", self.growth, 0.0)
        whole("growth_epoch", self.growth_epoch, 1)

    def weight_in(self, batch: Batch) -> Any:
        """See `Guided`."""
        return self.weight * self.growth if batch.epoch >= self.growth_epoch else self.weight

    def kind(self, step: SupervisedStep) -> Hashable:
        """Whether the next attack is guided, and the weight has grown."""
        return super().kind(step), step.epoch >= self.growth_epoch

    @staticmethod
    def guide(outputs: Tensor, target: Tensor) -> Tensor:
        """CE + λ ‖p(x) - p(x')‖², [N]."""
        losses, clean, weight = _taken_apart(outputs, target)
        return losses + weight * (clean.softmax(1) - outputs.softmax(1)).square().sum(1)

    def distance(self, clean: Tensor, attacked: Tensor) -> Tensor:
        """mean ‖p(x) - p(x')‖²."""
        return (clean.softmax(1) - attacked.softmax(1)).square().sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class NuAT(Guided):
    """Nuclear norm adversarial training (Sriramanan et al. 2021): CE(f(x), y) + λ ‖f(x) - f(x')‖_* / N, in one step.

    f are logits. The nuclear norm is one of the whole batch, so that there are no micro-batches, and several processes
    have the mean of the norms of their shares, each divided by its own N. The attack is that of `GAT`, guided by the
    nuclear norm. The defaults are those of the authors' code for ResNet-18 on CIFAR-10: 100 epochs in batches of 64, λ
    growing from 0 to 4.5 in the first 90 (``--ramps weight=0:90``; theirs grows after each epoch), the rate rising to
    0.1 in 40 and falling in 50; NuAT-WA has λ = 4 and an average of the weights with a decay of 0.9998.

    Attributes:
        weight_decay: on the model's weights.
        weight: λ, of the nuclear norm, divided by the images of a batch.
    """

    weight_decay: float = 5e-4
    weight: float = 4.5
    attack: AttackSettings = ONE_STEP

    coupled: ClassVar[bool] = True

    @staticmethod
    def guide(outputs: Tensor, target: Tensor) -> Tensor:
        """CE + λ ‖f(x) - f(x')‖_* / N, []."""
        losses, clean, weight = _taken_apart(outputs, target)
        return losses.mean() + weight.mean() * nuclear_norm(clean - outputs) / len(outputs)

    def distance(self, clean: Tensor, attacked: Tensor) -> Tensor:
        """‖f(x) - f(x')‖_* / N."""
        return nuclear_norm(clean - attacked) / len(clean)


GROWTH, GROWING = (3.4445, -4.775, 2.0315), 16  # each step multiplies small singular values by 3.4
SETTLING, SETTLED = (15 / 8, -10 / 8, 3 / 8), 6  # convergence of third order to 1


def nuclear_norm(m: Tensor) -> Tensor:
    """The sum of singular values, [], of a matrix [N, K], differentiable once, and on CUDA without a wait for the host.

    That is <M, Q>, Q being the orthogonal factor of M's polar decomposition, which is the gradient as well. Q is found
    in float64 by odd polynomials of M / ‖M‖, a fixed number of products of matrices, as by Newton and Schulz: what a
    CUDA graph can record, which it cannot of `torch.linalg.svd`. Equal singular values are no matter, and those below
    1e-8 of the largest add less than all of their part to the gradient; it is 0 where M is.
    """
    return (m * polar_factor(m.detach()).to(m.dtype)).sum()


def polar_factor(m: Tensor) -> Tensor:
    """Q [N, K], float64, of a matrix M = Q H, [N, K], H being positive and Q's singular values 1."""
    if m.shape[0] < m.shape[1]:
        return polar_factor(m.T).T
    q: Tensor = m.double()
    q = q / torch.linalg.vector_norm(q).clamp(min=torch.finfo(torch.float64).tiny)
    for a, b, c in [GROWTH] * GROWING + [SETTLING] * SETTLED:
        gram = q.T @ q
        q = a * q + q @ torch.addmm(gram, gram, gram, beta=b, alpha=c)
    return q
