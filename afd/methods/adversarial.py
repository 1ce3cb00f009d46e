"""Natural and adversarial training: AT, FGSM-RS, TRADES, MART, ALP, and a penalty on the distance of features.

Each spends the fewest passes that its updates need (its authors' code spends more): attacks compute no gradients of
weights, and what two passes would compute alike is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.attacks import PGDSettings
from afd.attacks.settings import AttackSettings
from afd.errors import number, one_of
from afd.methods.base import Batch, of_each
from afd.methods.supervised import Supervised, TrainedModel
from afd.nn.modes import Statistics


@dataclass(frozen=True, kw_only=True)
class Natural(Supervised):
    """Natural training, the paper's NT: SGD on L_C = CE(C(F(x)), y)."""

    validation_attack: AttackSettings | str | None = None

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """L_C as "task"."""
        return {"task": self.cross_entropy(model(batch.x), batch.y)}


@dataclass(frozen=True, kw_only=True)
class AT(Supervised):
    """Adversarial training (Madry et al. 2018): SGD on CE(C(F(x')), y), x' found by PGD; defaults for CIFAR-10.

    Of a union of balls it takes all points of an image, too: the mean of their losses (Tramèr & Boneh 2019).

    Attributes:
        weight_decay: on the model's weights; 5e-4 as in Rice et al. (2020): it decides much of the robust accuracy.
    """

    weight_decay: float = 5e-4
    attack: AttackSettings = PGDSettings()
    validation_attack: AttackSettings | str | None = "pgd-20"
    takes_copies: ClassVar[bool] = True

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy of attacked images as "task"."""
        x_adv = self.attack(model, batch)
        y = None if batch.y is None else of_each(batch.y, x_adv)
        return {"task": self.cross_entropy(model(x_adv), y)}


@dataclass(frozen=True, kw_only=True)
class FGSMRS(AT):
    """FGSM with a random start, or fast adversarial training (Wong et al. 2020): AT against one step of 1.25 eps.

    The defaults are those of the authors' code for CIFAR-10: BatchNorm is in training mode during the attack; their
    schedule is triangular (`one-cycle`, 15 epochs). It may overfit to its one step, so that robust accuracy falls to 0
    from one epoch to the next; validation shows it.

    Attributes:
        lr: learning rate of the model, the schedule's largest.
    """

    lr: float = 0.2
    attack: AttackSettings = PGDSettings(steps=1, alpha=10 / 255, batchnorm="train")
    takes_copies: ClassVar[bool] = False


SHARING = "batch", "kl", None  # BatchNorm, loss and precision of an attack whose clean pass is that of the loss


@dataclass(frozen=True, kw_only=True)
class TRADES(Supervised):
    """TRADES (Zhang et al. 2019, Eq. 5): CE(f(x), y) + β KL(p(x) ‖ p(x')), x' maximising the same divergence.

    The gradient flows into both sides of the divergence. The defaults are those of the authors' code for CIFAR-10; for
    MNIST it has β = 1, eps 0.3 in 40 steps of 0.01 and a learning rate of 0.01. It passes x twice in each step, which
    changes running statistics of BatchNorm only: that is done here without the pass. (Dropout would draw twice there.)
    Where the attack has the batch's statistics (``batchnorm="batch"``), the clean pass of the loss is that of the
    attack, dropout included. Of a union of balls it takes all points of an image, too: the mean of their divergences.

    Attributes:
        weight_decay: on the model's weights; later work has 5e-4 (Pang et al. 2021), the default on CIFAR here.
        beta: weight β of the divergence, 1/λ in the paper.

    Raises:
        InputError: beta is negative, or as `Supervised`.
    """

    weight_decay: float = 2e-4
    beta: float = 6.0
    attack: AttackSettings = PGDSettings(eps=0.031, alpha=0.007, loss="kl", init="gaussian")
    validation_attack: AttackSettings | str | None = "pgd-20"
    takes_copies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, 0.0)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of clean images as "task", the weighted divergence as "robust"."""
        attack = self.attack
        if isinstance(attack, AttackSettings) and (attack.batchnorm, attack.loss, attack.precision) == SHARING:
            # the clean pass of the attack is this very one (Gowal et al. 2020)
            clean, statistics = self._clean(model, batch)
            x_adv = attack(model, batch, target=clean.detach())
        else:
            x_adv = attack(model, batch)
            clean, statistics = self._clean(model, batch)
        attacked = model(x_adv)
        statistics.replay()
        log_p = of_each(clean.log_softmax(1), attacked)
        robust = F.kl_div(attacked.log_softmax(1), log_p, reduction="batchmean", log_target=True)
        return {"task": self.cross_entropy(clean, batch.y), "robust": self.beta * robust}

    @staticmethod
    def _clean(model: TrainedModel, batch: Batch) -> tuple[Tensor, Statistics]:
        with model.statistics() as statistics:
            logits = model(batch.x)
        return logits, statistics


@dataclass(frozen=True, kw_only=True)
class MART(Supervised):
    """MART (Wang et al. 2020, Eq. 9): BCE(f(x'), y) + β KL(p(x) ‖ p(x')) (1 - p_y(x)), x' found by PGD.

    BCE is the cross-entropy less log(1 - the largest wrong probability). Nothing is detached. The defaults are those
    of the authors' code for ResNet-18 on CIFAR-10; with WideResNet-34-10 it has a learning rate of 0.1 and a weight
    decay of 7e-4. Label smoothing is of the cross-entropy alone.

    Attributes:
        lr: learning rate of the model.
        weight_decay: on the model's weights.
        beta: weight β of the divergence (λ in the paper).

    Raises:
        InputError: beta is negative, or as `Supervised`.
    """

    lr: float = 0.01
    weight_decay: float = 3.5e-3
    beta: float = 5.0
    attack: AttackSettings = PGDSettings(eps=0.031, alpha=0.007, init="gaussian")
    validation_attack: AttackSettings | str | None = "pgd-20"
    soft_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, 0.0)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of x' as "task", its largest wrong class as "margin", the weighted divergence as "robust"."""
        x_adv = self.attack(model, batch)
        clean, attacked = model(batch.x).log_softmax(1), model(x_adv)
        own, log_p = self.classes_of(batch)[:, None], attacked.log_softmax(1)
        wrong = log_p.exp().scatter(1, own, -1.0).max(1).values
        # log(p + 1e-12), as the authors have it, where p may be too small for a number
        floored = torch.logaddexp(log_p, torch.full_like(log_p[:1, :1], math.log(1e-12)))
        divergence = (clean.exp() * (clean - floored)).sum(1)
        unsure = 1.0000001 - clean.exp().gather(1, own).squeeze(1)
        return {
            "task": self.cross_entropy(attacked, batch.y),
            "margin": -(1.0001 - wrong + 1e-12).log().mean(),
            "robust": self.beta * (divergence * unsure).mean(),
        }


@dataclass(frozen=True, kw_only=True)
class ALP(Supervised):
    """Adversarial logit pairing (Kannan et al. 2018): CE over natural and attacked images, + λ mean (f(x) - f(x'))².

    Both are one batch, of one pass. x' aims at the class that is least likely for x. The attack and the smoothing are
    those of the authors' code for ImageNet (which has RMSProp at 0.045, falling by 0.94 in every second epoch, and an
    average of the weights with a decay of 0.9999). What it gains may be masked gradients (Engstrom et al. 2018, Mosbach
    et al. 2018): measure it by many restarts.

    Attributes:
        label_smoothing: share of the label that is spread over all classes.
        weight: λ, of the squared distance of logits, a mean over images and classes.

    Raises:
        InputError: weight is negative, or as `Supervised`.
    """

    label_smoothing: float = 0.1
    weight: float = 0.5
    attack: AttackSettings = PGDSettings(eps=16 / 255, alpha=2 / 255, targeted=True)
    validation_attack: AttackSettings | str | None = "pgd-20"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight", self.weight, 0.0)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of both as "task", the weighted distance as "pairing"."""
        aimed = batch
        if getattr(self.attack, "targeted", False):
            aimed = replace(batch, y=model.eval_logits(batch).argmin(1))
        x_adv = self.attack(model, aimed)
        logits = model(torch.cat([batch.x, x_adv]))
        clean, attacked = logits.chunk(2)
        y = None if batch.y is None else torch.cat([batch.y, batch.y])
        return {"task": self.cross_entropy(logits, y), "pairing": self.weight * F.mse_loss(clean, attacked)}


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "L1": lambda difference: difference.abs().sum(1),
    "L2": lambda difference: torch.linalg.vector_norm(difference, dim=1),
    "squared-L2": lambda difference: difference.square().sum(1),
}


@dataclass(frozen=True, kw_only=True)
class NormPenalty(Supervised):
    """The norm ablation of AFD (Bashivan et al. 2021): CE(C(F(x)), y) + λ mean ‖F(x) - F(x')‖, without a discriminator.

    The gradient flows into both features. Which norm and which λ the paper has is not published; with λ = 1 and L2, our
    digits stay at chance, where all features are one, and with 0.2 they learn. Features are those that the classifier
    is shown, of length 1 where the model scales them.

    Attributes:
        weight_decay: on the model's weights; 5e-4 as for AT.
        weight: λ, of the distance of features.
        distance: of features: "L1", "L2" or "squared-L2".

    Raises:
        InputError: weight is negative, an unknown distance, or as `Supervised`.
    """

    weight_decay: float = 5e-4
    weight: float = 0.2
    distance: Literal["L1", "L2", "squared-L2"] = "L2"
    attack: AttackSettings = PGDSettings()
    validation_attack: AttackSettings | str | None = "pgd-20"
    uses_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight", self.weight, 0.0)
        one_of("distance", self.distance, DISTANCES)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of clean images as "task", the weighted distance as "distance"."""
        x_adv = self.attack(model, batch)
        z, logits = model.features_and_logits(batch.x)
        apart = DISTANCES[self.distance](z - model.features(x_adv)).mean()
        return {"task": self.cross_entropy(logits, batch.y), "distance": self.weight * apart}
