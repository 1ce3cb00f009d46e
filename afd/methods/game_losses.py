"""The losses of AFD's game: of the discriminator, of the features, and the gradient penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import one_of


@dataclass(frozen=True)
class GameLoss:
    """discriminator(natural, attacked) -> L_D and features(attacked) -> L_F."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


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


def gradient_penalty(discriminator: nn.Module, natural: Tensor, attacked: Tensor) -> Tensor:
    """mean (‖∇_z D(z)‖₂ - 1)² at random points z between natural and attacked features (Gulrajani et al. 2017).

    As in the paper's code the discriminator is asked without a label.

    Args:
        discriminator: (z) -> scores [N].
        natural: features F(x) [N, num_features], detached.
        attacked: features F(x') [N, num_features], detached.
    """
    share = torch.rand(natural.shape[0], 1, dtype=natural.dtype, device=natural.device)
    between = torch.lerp(natural, attacked, share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    penalty: Tensor = (slope.norm(dim=1) - 1).square().mean()
    return penalty
