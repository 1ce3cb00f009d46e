"""Adversarial Feature Desensitization: the settings of the three-player game of Bashivan et al. (NeurIPS 2021).

Players: features F_θ, classifier C_φ, discriminator D_ψ. With x' an attacked copy of x, one step does

    (θ, φ) ← (θ, φ) - α ∇L_C        ψ ← ψ - β ∇L_D        θ ← θ - γ ∇L_F

where L_C is the cross-entropy on x (and, if so weighted, on x', and the divergence of both); the steps are in
`afd.methods.game`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.attacks import PGDSettings
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, number, one_of, whole
from afd.execution import Execution, Wrap, as_torch_starts, feature_dtype
from afd.methods.base import unwrapped
from afd.methods.game import AFDStep, AlternatingStep, GameLoss, GameSettings, JointStep, SimultaneousStep
from afd.methods.inputs import as_split
from afd.methods.optimizers import optimizer_for
from afd.methods.supervised import Optimized
from afd.nn import ProjectionDiscriminator, Split

SCHEDULES = ("simultaneous", "alternating", "joint")


def _dcgan_discriminator(natural: Tensor, attacked: Tensor) -> Tensor:
    return F.softplus(-natural).mean() + F.softplus(attacked).mean()


def _dcgan_features(attacked: Tensor) -> Tensor:
    return F.softplus(-attacked).mean()


def _wgan_discriminator(natural: Tensor, attacked: Tensor) -> Tensor:
    return attacked.mean() - natural.mean()


def _hinge_discriminator(natural: Tensor, attacked: Tensor) -> Tensor:
    return F.relu(1 - natural).mean() + F.relu(1 + attacked).mean()


def _critic_features(attacked: Tensor) -> Tensor:
    return -attacked.mean()


GAME_LOSSES = {
    "dcgan": GameLoss(_dcgan_discriminator, _dcgan_features),
    "wgan": GameLoss(_wgan_discriminator, _critic_features),
    "hinge": GameLoss(_hinge_discriminator, _critic_features),
}


def game_loss(name: str) -> GameLoss:
    """The pair of losses called "dcgan", "wgan" or "hinge".

    Raises:
        InputError: unknown name.
    """
    one_of("loss", name, GAME_LOSSES)
    return GAME_LOSSES[name]


@dataclass(frozen=True)
class AFD(GameSettings):
    """Settings of the game; the defaults are the paper's. `AFD.adam` has those of its Adam variant.

    Of a union of balls it takes all points of an image, too: L_D and L_F are means over all of x and over all of x'.

    Attributes:
        loss: of the game between discriminator and features: "dcgan", "wgan" or "hinge".
        schedule: "simultaneous" (the paper's Algorithm 1), "alternating" (the authors' released code), or "joint": one
            optimizer of θ and φ on L_C + (γ/α) L_F. With SGD that is the simultaneous one; with Adam it is not.
        lr: learning rate α, of features and classifier on the cross-entropy.
        lr_discriminator: learning rate β, of the discriminator.
        lr_features: learning rate γ, of the features against the discriminator.
        weight_decay: on θ and φ.
        optimizers: as in `Optimized`; the players are "task" (θ, φ on L_C), "discriminator" and "features" (θ on L_F).
        label_smoothing: of L_C.
        adversarial_weight: λ, of a cross-entropy on x' in L_C = CE(x) + λ CE(x'); 0, as in the paper, leaves it out.
        divergence_weight: μ, of TRADES' divergence in L_C = CE(x) + μ KL(p(x) ‖ p(x')), whose gradient flows into both
            sides (Zhang et al. 2019); 0, as in the paper, leaves it out.
        discriminator_steps: the features answer the discriminator in every so many steps (1: each).
        penalty: weight λ of the gradient penalty in L_D; 0 leaves it out.
        hidden: width of the discriminator; by default that of the features.
        attack: that makes x'.

    Raises:
        InputError: unknown loss, schedule or optimizer, or a number out of range.
    """

    loss: Literal["dcgan", "wgan", "hinge"] = "wgan"
    schedule: Literal["simultaneous", "alternating", "joint"] = "simultaneous"
    lr_discriminator: float = 0.1
    lr_features: float = 0.5
    adversarial_weight: float = 0.0
    divergence_weight: float = 0.0
    discriminator_steps: int = 1
    penalty: float = 0.0
    hidden: int | None = None
    attack: AttackSettings = PGDSettings()
    validation_attack: AttackSettings | str | None = "pgd-20"

    soft_labels: ClassVar[bool] = False  # the discriminator is conditioned on classes
    takes_copies: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    of_optimizers: ClassVar[frozenset[str]] = Optimized.of_optimizers | {"lr_discriminator", "lr_features"}
    players: ClassVar[tuple[str, ...]] = ("task", "discriminator", "features")
    rates: ClassVar[Mapping[str, Mapping[str, float]]] = {
        name: {"lr": 1e-4, "lr_discriminator": 1e-3, "lr_features": 1e-4, "weight_decay": 0.0}
        for name in ("adam", "adamw")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        game_loss(self.loss)
        one_of("schedule", self.schedule, SCHEDULES)
        for name in ("lr_discriminator", "lr_features", "adversarial_weight", "divergence_weight", "penalty"):
            number(name, getattr(self, name), 0.0)
        whole("discriminator_steps", self.discriminator_steps, 1)
        if self.schedule == "joint" and "features" in self.optimizers:
            raise InputError(
                "optimizers has the key 'features', but schedule is 'joint', where θ has one optimizer, that of 'task'"
            )

    @property
    def game(self) -> GameLoss:
        """The losses of discriminator and features."""
        return game_loss(self.loss)

    @classmethod
    def adam(cls, **settings: Any) -> AFD:
        """The Adam variant: rates 1e-4 for (θ, φ) and θ, 1e-3 for ψ, no weight decay; `settings` override."""
        return cls(**{"optimizer": "adam", **cls.rates["adam"], **settings})

    def build(
        self,
        model: nn.Module | Split,
        execution: Execution = Execution(),
        wrap: Wrap = unwrapped,
    ) -> AFDStep:
        """A step that trains `model` against a fresh discriminator, which is on the model's device.

        Raises:
            InputError: no parameter of the model is trainable.
        """
        model = as_split(model)
        passes = execution.passes(model)
        weight = next(passes.parameters())
        with as_torch_starts():  # drawn alike on whatever device, and in float32 whatever the default is
            discriminator = ProjectionDiscriminator(model.num_features, model.num_classes, self.hidden)
        discriminator.to(weight.device, feature_dtype(model))
        kind: type[AFDStep] = AlternatingStep
        if self.schedule == "simultaneous":
            own = {"task", "features"} & self.optimizers.keys()
            one_rule = self.optimizer == "sgd" and self.clip is None and not own
            kind = JointStep if one_rule else SimultaneousStep
        elif self.schedule == "joint":
            kind = JointStep
        return kind(self, model, execution, wrap(passes), wrap(discriminator))

    def optimizer_of(self, player: str, module: nn.Module) -> Optimizer:
        """The optimizer that the trainable parameters of a player's module are moved by."""
        rates = {"task": self.lr, "discriminator": self.lr_discriminator, "features": self.lr_features}
        return optimizer_for(
            self,
            player,
            module,
            lr=rates[player],
            weight_decay=self.weight_decay if player == "task" else 0.0,
            betas=(0.0, 0.9) if self.loss == "wgan" else (0.5, 0.999),
        )
