"""Where definitions agree, so do the points: PGD and FGSM beside torchattacks and foolbox, from the same start.

Both peers average the loss over the batch, or sum it; neither matters to the direction. In L1 foolbox steps along
g / |g|_1 and rescales radially, so there is nothing to compare (see "Details where libraries differ" in `PGD`).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afd.attacks import FGSM, PGD


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 10)).double()
    x = torch.rand(16, 1, 8, 8, dtype=torch.float64)
    return model.eval(), x, torch.arange(16) % 10


def torchattacks():
    return pytest.importorskip("torchattacks", reason="torchattacks is not installed: nothing to compare with")


def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is not installed: nothing to compare with")


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_fgsm_like_torchattacks(setting):
    model, x, y = setting
    same(FGSM(model, eps=0.1)(x, y), torchattacks().FGSM(model, eps=0.1)(x, y))


def test_pgd_linf_like_torchattacks(setting):
    model, x, y = setting
    theirs = torchattacks().PGD(model, eps=0.1, alpha=0.03, steps=8, random_start=False)
    same(PGD(model, eps=0.1, alpha=0.03, steps=8, random_start=False)(x, y), theirs(x, y))


def test_pgd_l2_like_torchattacks(setting):
    model, x, y = setting
    theirs = torchattacks().PGDL2(model, eps=0.8, alpha=0.2, steps=8, random_start=False, eps_for_division=0)
    ours = PGD(model, norm="L2", eps=0.8, alpha=0.2, steps=8, random_start=False)
    same(ours(x, y), theirs(x, y))


@pytest.mark.parametrize(("norm", "eps", "alpha"), [("Linf", 0.1, 0.03), ("L2", 0.8, 0.2)])
def test_pgd_like_foolbox(setting, norm, eps, alpha):
    model, x, y = setting
    attacks = foolbox().attacks
    kind = {"Linf": attacks.LinfPGD, "L2": attacks.L2PGD}[norm]
    wrapped = foolbox().PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = kind(abs_stepsize=alpha, steps=8, random_start=False)(wrapped, x, y, epsilons=eps)[1]
    same(PGD(model, norm=norm, eps=eps, alpha=alpha, steps=8, random_start=False)(x, y), theirs)
