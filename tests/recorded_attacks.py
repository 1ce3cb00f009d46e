"""What the tests of captured attacks share: models, images, attacks, and the eager steps to compare with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from afd.attacks import APGD, FAB, MIM, PGD, Union


def net(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 5),
    ).to(device)  # fmt: skip


class Scaled(nn.Module):
    """A model whose logits hang on what is set of it."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.scale, self.factors, self.temperature = 1.0, [1.0], None
        self.config = SimpleNamespace(power=1, inner=SimpleNamespace(factor=1.0))
        self.tensor = torch.ones(5)

    def forward(self, x):
        logits = self.inner(x) * self.scale * self.factors[0] / (self.temperature or 1)
        return logits**self.config.power * self.config.inner.factor * self.tensor


def radii(model):
    return torch.linspace(0, 1, 8, device=model[5].weight.device)


ATTACKS = {
    "pgd": lambda model: PGD(model, eps=0.1, alpha=0.03, steps=4),
    "pgd l2 per sample": lambda model: PGD(model, norm="L2", eps=radii(model), alpha=0.2, steps=4),
    "pgd l1 bf16": lambda model: PGD(model, norm="L1", eps=5.0, alpha=1.0, steps=4, precision="bf16"),
    "mim": lambda model: MIM(model, eps=0.1, steps=4),
    "apgd": lambda model: APGD(model, eps=0.1, steps=8, n_restarts=2),
    "apgd l1": lambda model: APGD(model, norm="L1", eps=5.0, steps=10),
    "fab": lambda model: FAB(model, eps=0.1, steps=4, n_restarts=2, early_stop=False),
    "fab-t l2": lambda model: FAB(model, norm="L2", eps=radii(model), steps=4, n_target_classes=2, early_stop=False),
    "kl": lambda model: PGD(model, loss="kl", eps=0.1, steps=3),
    **{
        f"union {choice}": lambda model, choice=choice: Union(
            model, eps=0.1, eps_l2=0.8, eps_l1=5.0, steps=3, choice=choice
        )
        for choice in ("worst", "average", "random", "fooling")
    },
}


def images(device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 3, 8, 8, generator=generator)
    return x.to(device), torch.randint(5, (8,), generator=generator).to(device)


def eagerly(attack):
    attack._graphs.cache.refused = True
    return attack


def held(cache):
    """The graphs that a cache keeps."""
    return [entry.captured for entry in cache._entries.values() if entry.captured is not None]


def replays(tapes):
    return [one.replays for one in tapes]
