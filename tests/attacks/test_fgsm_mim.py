"""FGSM and MIM against their formulas."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import FGSM, MIM, ModelWarning
from afd.errors import InputError


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(100, 5)).eval()
    return model, torch.rand(6, 2, 5, 5), torch.randint(5, (6,))


def gradient(model, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def close_but_for_turned_signs(got, expected):
    assert ((got - expected).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize(("targeted", "sign"), [(False, 1), (True, -1)])
def test_fgsm(setting, targeted, sign):
    model, x, y = setting
    expected = (x + sign * 0.1 * gradient(model, x, y).sign()).clamp(0, 1)
    close_but_for_turned_signs(FGSM(model, eps=0.1, targeted=targeted)(x, y), expected)


def test_fgsm_steps_as_far_as_each_sample_may(setting):
    model, x, y = setting
    eps = torch.linspace(0.0, 0.2, 6)
    moved = (FGSM(model, eps=eps, bounds=(-1.0, 2.0))(x, y) - x).flatten(1).abs().amax(1)
    torch.testing.assert_close(moved, eps)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_mim(setting, decay):
    model, x, y = setting
    x_adv, gathered = x.clone(), torch.zeros_like(x)
    for _ in range(7):
        grad = gradient(model, x_adv, y)
        gathered = decay * gathered + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x_adv = torch.min(torch.max(x_adv + 0.03 * gathered.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    close_but_for_turned_signs(MIM(model, eps=0.1, alpha=0.03, steps=7, decay=decay)(x, y), x_adv)


def test_momentum_carries_over_a_turn():
    """Towards a peak at 0.52 the first step of 0.03 goes too far; without momentum the second one turns back."""

    class Peak(nn.Module):
        def forward(self, x):
            height = -(x - 0.52).square().sum(1)
            return torch.stack([height, -height], 1)

    x, y = torch.full((1, 3), 0.5), torch.tensor([0])
    ends = [MIM(Peak(), eps=0.2, alpha=0.03, steps=2, decay=decay, targeted=True)(x, y) for decay in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], x)
    torch.testing.assert_close(ends[1], x + 0.03)


@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e36])
def test_mim_survives_gradients_of_any_size(scale):
    weight = torch.tensor([[1.0, -2.0], [-1.0, 1.0]])

    class Scaled(nn.Module):
        def forward(self, x):
            return x @ weight.T

    attack = MIM(Scaled(), eps=0.1, alpha=0.05, steps=3)
    value = lambda logits, y: scale * logits.gather(1, y[:, None]).squeeze(1)  # noqa: E731
    attack.loss = replace(attack.loss, value=value)
    with nullcontext() if scale else pytest.warns(ModelWarning, match="for 2 of 2 samples the gradient"):
        x_adv = attack(torch.full((2, 2), 0.5), torch.tensor([0, 1]))
    expected = torch.tensor([[0.6, 0.4], [0.4, 0.6]]) if scale else torch.full((2, 2), 0.5)
    torch.testing.assert_close(x_adv, expected)


def test_wrong_settings_are_named(setting):
    with pytest.raises(InputError, match="decay is -1"):
        MIM(setting[0], decay=-1.0)
    with pytest.raises(InputError, match=r"eps is -0\.5"):
        FGSM(setting[0], eps=-0.5)
