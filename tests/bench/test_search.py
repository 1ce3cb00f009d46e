"""The prototypes of the search for a better AFD: with nothing added they are the game, and each setting counts."""

from dataclasses import replace

import pytest
import torch
from search.game import Game, GameAWP
from torch import nn

from afd.attacks import PGDSettings
from afd.methods import AFD
from afd.nn import FeatureClassifier

X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
ATTACK = PGDSettings(eps=0.1, alpha=0.05, steps=2)
GAME = Game(lr=0.05, lr_discriminator=0.1, game_weight=0.4, hidden=4, attack=ATTACK)


def trained(method, steps=3):
    torch.manual_seed(0)
    model = FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 5)), 5, 3)
    torch.manual_seed(1)
    step = method.build(model)
    for number in range(steps):
        step(X, Y, seed=number)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["wgan", "dcgan", "hinge"])
@pytest.mark.parametrize(("adversarial", "divergence"), [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0)])
def test_without_what_the_library_lacks_it_is_afd(loss, adversarial, divergence):
    ours = replace(GAME, loss=loss, adversarial_weight=adversarial, beta=divergence, weight_decay=1e-4)
    afd = AFD(
        loss=loss, lr=0.05, lr_features=0.02, lr_discriminator=0.1, hidden=4, adversarial_weight=adversarial,
        divergence_weight=divergence, attack=ATTACK,
    )  # fmt: skip
    torch.testing.assert_close(trained(ours), trained(afd), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"conditional": False}, {"penalty": 1.0}, {"depth": 2}, {"power_iterations": 3}, {"attack_on": "mixed"},
        {"optimizer": "adam", "lr": 1e-3},
    ],
)  # fmt: skip
def test_each_setting_changes_what_is_learnt(change):
    moving = replace(GAME, lr_discriminator=1.0)  # far enough for norms to lag behind
    assert (trained(replace(moving, **change), 6) - trained(moving, 6)).abs().max() > 1e-6


def test_awp_goes_around_it():
    awp = GameAWP(GAME, gamma=0.05)
    assert (trained(awp) - trained(GAME)).abs().max() > 1e-5
