"""What is said of the figures that choose the best epoch."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from afd.attacks import ModelWarning, PGDSettings
from afd.methods import Natural
from afd.training import Trainer


class Saturated(nn.Module):
    """So sure of the first four images of a batch that the cross-entropy has no gradient there."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        sure = (torch.arange(len(x)) < 4)[:, None] & (not self.training)
        return torch.where(sure, 1e6 * torch.eye(4)[torch.zeros(len(x), dtype=torch.int64)] + 0 * x.sum(), self.head(x))


def test_images_at_which_the_attack_could_not_aim_are_counted_and_told_once_an_epoch():
    torch.manual_seed(0)
    batches = [(torch.rand(8, 16), torch.zeros(8, dtype=torch.int64)) for _ in range(3)]
    method = Natural(lr=0.01, validation_attack=PGDSettings(eps=0.1, alpha=2 / 255, steps=2))
    trainer = Trainer(Saturated(), method, epochs=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(batches, batches)
    said = [str(one.message) for one in told if issubclass(one.category, ModelWarning)]
    assert len(said) == 1
    assert said[0].startswith("for 12 of 24 images the gradient of the loss was exactly zero or NaN")
    assert told[0].filename == __file__
