"""Released training flows of published methods, attack included, transcribed literally and slowly in plain PyTorch.

Each is one class: built on a model that it trains in place, called with a batch, it does what its authors' loop does
with one, also what that computes and throws away: gradients of weights in the attack, passes for a log, a score read
by the host. Those with networks beside the model are in `afd.bench.released_players`. Ours are held to all of them in
float64 (`tests/methods/test_transcriptions.py`), and timed beside them (``afd bench methods``). Every docstring says
where its flow comes from (read there, told in words of our own) and what BatchNorm does during the attack. Left out
are data, schedules, progress bars and apex.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.nn import FeatureClassifier

Start = Callable[[Tensor], Tensor]  # x -> where an attack begins, as the authors draw it, or as a test wants it


class Released(ABC):
    """One method's released flow at work on one model; a call trains on a batch and returns the loss, detached.

    Args:
        model: classifier, images [N, ...] in [0, 1] -> logits [N, K]; in training mode between calls.
        optimizer: of its parameters.
        eps: radius of the L∞ ball.
        alpha: step of the attack.
        steps: of the attack.
        start: x -> the point that the attack begins at; by default as the authors draw it.

    Attributes:
        batchnorm: what BatchNorm does during the attack, in the words of `afd.attacks.AttackSettings`.
    """

    batchnorm: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        eps: float,
        alpha: float = 0.0,
        steps: int = 10,
        start: Start | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.eps, self.alpha, self.steps, self.start = eps, alpha, steps, start or self.drawn

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:
        """Trains on images x [N, ...] of classes y [N] in an epoch, counted from 1."""

    def drawn(self, x: Tensor) -> Tensor:
        """A uniform point of the ball, clamped to the images' range."""
        return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)

    def update(self, loss: Tensor) -> Tensor:
        """One step of the optimizer on a loss."""
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()


def near(x: Tensor) -> Tensor:
    """x + 0.001 N(0, 1), as TRADES and MART draw it."""
    return x + 0.001 * torch.randn_like(x)


def logged(loss: Tensor, logits: Tensor, y: Tensor) -> None:
    """Loss and accuracy, read by the host as a loop does that keeps averages of them."""
    loss.item()
    (logits.argmax(1) == y).sum().item()


# --- Adversarial training -------------------------------------------------------------------------------------------


class RobustnessAT(Released):
    """AT of MadryLab/robustness (attacker.py, attack_steps.py, train.py): random_start=1, use_best=0.

    By default that library trains on the best of the iterates and starts at x; with these two it is Madry's PGD. The
    attack runs in evaluation mode and asks for no gradient of a weight.
    """

    batchnorm = "eval"

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        self.model.eval()
        x_adv = self.start(x)
        for _ in range(self.steps):
            x_adv = x_adv.clone().detach().requires_grad_()
            losses = F.cross_entropy(self.model(x_adv), y, reduction="none")
            (grad,) = torch.autograd.grad(losses.mean(), x_adv)
            with torch.no_grad():
                x_adv = x_adv + self.alpha * grad.sign()
                x_adv = (x + (x_adv - x).clamp(-self.eps, self.eps)).clamp(0, 1)
        x_adv = x_adv.clone().detach()
        self.model.train()
        logits = self.model(x_adv)
        loss = F.cross_entropy(logits, y)
        logged(loss, logits, y)
        return self.update(loss)


class RiceAT(Released):
    """AT of locuslab/robust_overfitting (train_cifar.py), which AWP's and many others go on from.

    The model stays in training mode throughout, so each forward moves BatchNorm's running statistics. A step of the
    attack computes gradients of all weights (they gather, and are cleared before the update). After it, a forward finds
    the loss of the last point, which only restarts would read; after the update, another passes the clean images, for
    the log.
    """

    batchnorm = "train"

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        x_adv = self.attacked(x, y)
        logits = self.model(x_adv)
        loss = F.cross_entropy(logits, y)
        self.update(loss)
        self.log(x, y, loss, logits)
        return loss.detach()

    def attacked(self, x: Tensor, y: Tensor) -> Tensor:
        """The attacked batch."""
        worst, found = torch.zeros(len(y), dtype=x.dtype, device=x.device), torch.zeros_like(x)
        delta = (self.start(x) - x).requires_grad_()
        for _ in range(self.steps):
            torch.autograd.backward(F.cross_entropy(self.model(x + delta), y))
            assert delta.grad is not None
            moved = (delta.detach() + self.alpha * delta.grad.sign()).clamp(-self.eps, self.eps)
            delta.data = torch.maximum(torch.minimum(moved, 1 - x), 0 - x)
            delta.grad.zero_()
        losses = F.cross_entropy(self.model(x + delta), y, reduction="none")
        found[losses >= worst] = delta.detach()[losses >= worst]
        return (x + found).clamp(0, 1)

    def log(self, x: Tensor, y: Tensor, loss: Tensor, logits: Tensor) -> None:
        """What is logged: of attacked images, and of clean ones in a pass of their own."""
        clean = self.model(x)
        logged(loss, logits, y)
        logged(F.cross_entropy(clean, y), clean, y)


class FGSMRS(Released):
    """FGSM from a random start of locuslab/fast_adversarial (CIFAR10/train_fgsm.py), in single precision.

    The model stays in training mode; the attack's one backward computes gradients of all weights.
    """

    batchnorm = "train"

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        delta = (self.start(x) - x).requires_grad_()
        torch.autograd.backward(F.cross_entropy(self.model(x + delta), y))
        assert delta.grad is not None
        delta.data = (delta.detach() + self.alpha * delta.grad.sign()).clamp(-self.eps, self.eps)
        delta.data = torch.maximum(torch.minimum(delta.data, 1 - x), 0 - x)
        logits = self.model(x + delta.detach())
        loss = F.cross_entropy(logits, y)
        self.update(loss)
        logged(loss, logits, y)
        return loss.detach()


class Free(Released):
    """Free adversarial training of mahyarnajibi/FreeAdversarialTraining (main_free.py).

    One tensor of noise lies beside the batches, row by row, and goes on from each to the next; every replay is one
    pass that moves both it, by eps and clamped to eps, and the weights. The noise is not clamped to what the images
    allow, but their sum is, through which the gradient goes. The model stays in training mode; there is no attack.

    Args:
        repeats: of each batch.
    """

    batchnorm = "train"

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, eps: float, repeats: int = 4) -> None:
        super().__init__(model, optimizer, eps=eps)
        self.repeats, self.noise = repeats, torch.empty(0)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`; the first batch is the largest. The loss is that of the last replay."""
        if not self.noise.numel():
            self.noise = torch.zeros_like(x)
        for _ in range(self.repeats):
            noise = self.noise[: len(x)].clone().requires_grad_()
            logits = self.model((x + noise).clamp(0, 1))
            loss = F.cross_entropy(logits, y)
            logged(loss, logits, y)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            assert noise.grad is not None
            self.noise[: len(x)] += self.eps * noise.grad.sign()
            self.noise.clamp_(-self.eps, self.eps)
            self.optimizer.step()
        return loss.detach()


# --- Methods that pair clean and attacked images ----------------------------------------------------------------------


class TRADES(Released):
    """TRADES of yaodongyu/TRADES (trades.py, train_trades_cifar10.py).

    The attack runs in evaluation mode and asks for no gradient of a weight, but passes the clean images anew in each of
    its steps. The loss passes clean, attacked and once more clean images, in training mode.

    Args:
        beta: weight of the divergence.
    """

    batchnorm = "eval"

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, beta: float = 6.0, **settings: Any) -> None:
        super().__init__(model, optimizer, **settings)
        self.beta = beta

    def drawn(self, x: Tensor) -> Tensor:
        """See `near`."""
        return near(x)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        x_adv = self.attacked(x)
        self.model.train()
        natural = F.cross_entropy(self.model(x), y)
        robust = F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(self.model(x), 1), reduction="sum") / len(x)
        return self.update(natural + self.beta * robust)

    def attacked(self, x: Tensor) -> Tensor:
        """The attacked batch."""
        self.model.eval()
        x_adv = self.start(x)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(self.model(x), 1), reduction="sum")
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + self.alpha * grad.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        return x_adv


class MART(Released):
    """MART of YisenWang/MART (mart.py, train_resnet.py).

    The attack runs in evaluation mode and asks for no gradient of a weight; the loss passes clean, then attacked images
    in training mode.

    Args:
        beta: weight of the divergence.
    """

    batchnorm = "eval"

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, beta: float = 5.0, **settings: Any) -> None:
        super().__init__(model, optimizer, **settings)
        self.beta = beta

    def drawn(self, x: Tensor) -> Tensor:
        """See `near`."""
        return near(x)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        self.model.eval()
        x_adv = self.start(x)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self.model(x_adv), y), x_adv)
            x_adv = x_adv.detach() + self.alpha * grad.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        self.model.train()

        clean, attacked = self.model(x), self.model(x_adv)
        p, p_adv = F.softmax(clean, 1), F.softmax(attacked, 1)
        likeliest = p_adv.argsort(1)[:, -2:]
        wrong = torch.where(likeliest[:, 1] == y, likeliest[:, 0], likeliest[:, 1])
        boosted = F.cross_entropy(attacked, y) + F.nll_loss((1.0001 - p_adv + 1e-12).log(), wrong)
        divergence = F.kl_div((p_adv + 1e-12).log(), p, reduction="none").sum(1)
        unsure = 1.0000001 - p.gather(1, y[:, None])[:, 0]
        return self.update(boosted + self.beta * (divergence * unsure).sum() / len(x))


class ALP(Released):
    """Adversarial logit pairing of tensorflow/models (research/adversarial_logit_pairing), from TensorFlow 1.

    As in its train.py and adversarial_attack.py. The attack, towards the class that clean images are least likely of,
    runs in evaluation mode and asks for no gradient of a weight; it passes the clean images twice to know that class.
    One pass in training mode has clean and attacked images together.

    Args:
        weight: of the pairing, a mean over images and classes.
        label_smoothing: of the cross-entropy.
    """

    batchnorm = "eval"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float = 0.5,
        label_smoothing: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.weight, self.label_smoothing = weight, label_smoothing

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        self.model.eval()
        with torch.no_grad():
            classes = self.model(x).shape[1]
            target = F.one_hot(self.model(x).argmin(1), classes).to(x.dtype)
        lowest, highest = (x - self.eps).clamp(min=0), (x + self.eps).clamp(max=1)
        x_adv = self.start(x)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.model(x_adv), target, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = torch.minimum(torch.maximum(x_adv.detach() - self.alpha * grad.sign(), lowest), highest)
        self.model.train()
        logits = self.model(torch.cat([x, x_adv]))
        loss = F.cross_entropy(logits, y.repeat(2), label_smoothing=self.label_smoothing)
        clean, attacked = logits.chunk(2)
        return self.update(loss + self.weight * F.mse_loss(clean, attacked))


class NormPenalty(Released):
    """The ablation of the AFD paper, whose code was not released: CE(C(F(x)), y) + λ mean ‖F(x) - F(x')‖, literally.

    Args:
        model: that has features, too.
        weight: λ.
        distance: "L1", "L2" or "squared-L2".
    """

    batchnorm = "eval"

    def __init__(
        self,
        model: FeatureClassifier,
        optimizer: Optimizer,
        *,
        weight: float = 0.2,
        distance: Literal["L1", "L2", "squared-L2"] = "L2",
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.split, self.weight, self.distance = model, weight, distance

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        self.model.eval()
        x_adv = self.start(x)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self.model(x_adv), y), x_adv)
            x_adv = x_adv.detach() + self.alpha * grad.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        self.model.train()
        z = self.split.features(x)
        apart = z - self.split.features(x_adv)
        squared = apart.square().sum(1)
        lengths = {"L1": apart.abs().sum(1), "L2": squared.sqrt(), "squared-L2": squared}[self.distance]
        return self.update(F.cross_entropy(self.split.classifier(z), y) + self.weight * lengths.mean())
