"""One round of the paper's released code, transcribed: the flow that `afd.bench.rounds` measures afd against.

The released program needs a library that no longer imports, so its flow is written down here, with its five forwards
and four backwards of F, the gradients it computes and throws away, PyTorch's eager spectral norm, a score read by the
host in each step, and Auto-PGD by pyautoattack. (Its own wrapper around Auto-PGD, which passes the model a few times
more, is left out; so are its histograms.)
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.optim import SGD

from afd.attacks.engine import evaluating
from afd.bench.request import Run
from afd.nn import FeatureClassifier


class ReleasedDiscriminator(nn.Module):
    """Encoder and discriminator in one module, as released; the encoder's parameters are not its own."""

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older spectral norm is what was released
            self.linear1, self.linear2 = (spectral_norm(nn.Linear(num_features, num_features)) for _ in range(2))
            self.l7 = spectral_norm(nn.Linear(num_features, 1))
            self.l_y = spectral_norm(nn.Embedding(num_classes, num_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores [N, 1] of images."""
        h = F.leaky_relu(self.linear1(self.encoder(x)), 0.2)
        h = F.leaky_relu(self.linear2(h), 0.2)
        score: Tensor = self.l7(h) + torch.sum(self.l_y(y) * h, dim=1, keepdim=True)
        return score


class _Encoder(nn.Module):
    """The features of a classifier as a module."""

    def __init__(self, model: FeatureClassifier) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(x))


class ReleasedRound:
    """The three updates of AFD-WGAN with SGD, rates as given.

    Args:
        model: F and C.
        lr: of all three optimizers.
    """

    def __init__(self, model: FeatureClassifier, lr: float) -> None:
        self.whole = model
        self.encoder = _Encoder(model)
        self.judge = ReleasedDiscriminator(self.encoder, model.num_features, model.num_classes)
        own = [parameter for name, parameter in self.judge.named_parameters() if "encoder" not in name]
        self.task = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        self.discriminator = SGD(own, lr, momentum=0.9)
        self.features = SGD(self.encoder.parameters(), lr, momentum=0.9)

    def attacked(self, attack: Run, x: Tensor, y: Tensor) -> Tensor:
        """x', found in evaluation mode with frozen parameters."""
        with evaluating(self.whole):
            return attack(x, y).detach()

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> None:
        """What comes after the attack."""
        self.whole.train()
        self.judge.train()
        self.task.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.whole(x), y))
        self.task.step()

        self.discriminator.zero_grad()
        natural, adversarial = self.judge(x, y), self.judge(x_adv, y)
        natural.mean().item()
        adversarial.mean().item()
        # goes back through F as well, where nobody uses what it brings
        torch.autograd.backward(adversarial.mean() - natural.mean())
        self.discriminator.step()

        self.features.zero_grad()
        adversarial = self.judge(x_adv, y)
        with torch.no_grad():
            guessed = self.whole(x_adv).argmax(1)
        (guessed == y).sum().item()
        torch.autograd.backward(-adversarial.mean())
        self.features.step()
