"""Torch's own spectral norms around the same discriminator, with the same weights, u and v."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked

from afd.nn import convert_spectral_state

NORMS = {"parametrized": parametrizations.spectral_norm, "hooked": hooked}


class Discriminator(nn.Module):
    """The projection discriminator of nn.Linear and nn.Embedding."""

    def __init__(self, like, norm=lambda layer: layer):
        super().__init__()
        self.layers = nn.ModuleList(norm(nn.Linear(*layer.weight.shape[::-1])) for layer in like.layers)
        self.w = norm(nn.Linear(like.w.weight.shape[1], 1))
        self.e = norm(nn.Embedding(*like.e.weight.shape))

    def forward(self, z, y=None):
        h = z
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        score = self.w(h).squeeze(1)
        return score if y is None else score + (self.e(y) * h).sum(1)


def beside(ours, form):
    """Torch's form of our discriminator, in the same state."""
    theirs = Discriminator(ours, NORMS[form]).to(next(ours.parameters()).dtype)
    theirs.load_state_dict(convert_spectral_state(copy.deepcopy(ours.state_dict()), form))
    return theirs


def in_our_form(module):
    """Weights, biases, u and v of torch's form under our names."""
    return convert_spectral_state(module.state_dict(), "afd")


@pytest.fixture(scope="session")
def torchs():
    """`beside` makes torch's form of a discriminator, `in_our_form` reads its state."""
    return SimpleNamespace(beside=beside, in_our_form=in_our_form)
