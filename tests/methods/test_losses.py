"""The game's losses against numbers worked out by hand, and the gradient penalty against a critic of known slope."""

import math

import pytest
import torch
from torch import nn

from afd.errors import InputError
from afd.methods.afd import game_loss
from afd.methods.game import gradient_penalty

NATURAL, ATTACKED = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([0.0, -0.5, 4.0])


def softplus(t):
    return math.log1p(math.exp(t))


@pytest.mark.parametrize(
    ("name", "discriminator", "features"),
    [
        (
            "dcgan",
            (2 * softplus(0) + softplus(-2) + softplus(3) + softplus(-0.5) + softplus(4)) / 3,
            (softplus(0) + softplus(0.5) + softplus(-4)) / 3,
        ),
        ("wgan", 3.5 / 3 + 1 / 3, -3.5 / 3),
        ("hinge", (1 + 0 + 4) / 3 + (1 + 0.5 + 5) / 3, -3.5 / 3),
    ],
)
def test_values(name, discriminator, features):
    loss = game_loss(name)
    assert loss.discriminator(NATURAL, ATTACKED).item() == pytest.approx(discriminator)
    assert loss.features(ATTACKED).item() == pytest.approx(features)


@pytest.mark.parametrize("name", ["dcgan", "wgan", "hinge"])
def test_the_players_want_opposite_things_of_attacked_features(name):
    loss = game_loss(name)
    attacked = torch.tensor([0.1, -0.2], requires_grad=True)
    (discriminator,) = torch.autograd.grad(loss.discriminator(torch.zeros(2), attacked), attacked)
    (features,) = torch.autograd.grad(loss.features(attacked), attacked)
    assert (discriminator > 0).all()
    assert (features < 0).all()


def test_dcgan_stays_finite_for_extreme_scores():
    scores = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(game_loss("dcgan").discriminator(scores, scores))


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(slope):
    critic = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[slope, 0, 0, 0]]))
    penalty = gradient_penalty(lambda z: critic(z).squeeze(1), torch.rand(5, 4), torch.rand(5, 4))
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-6)
    (grad,) = torch.autograd.grad(penalty, critic.weight)
    assert grad[0, 0].item() == pytest.approx(2 * (slope - 1), abs=1e-6)


def test_gradient_penalty_looks_between_the_features():
    seen = []
    gradient_penalty(lambda z: (seen.append(z.detach()), z.sum(1))[1], torch.zeros(200, 3), torch.ones(200, 3))
    share = seen[0][:, 0]
    assert torch.equal(seen[0], share[:, None].expand(-1, 3))
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.std() > 0.2


def test_unknown_loss_is_named():
    with pytest.raises(InputError, match="loss is 'gan'; allowed are dcgan, wgan, hinge"):
        game_loss("gan")
