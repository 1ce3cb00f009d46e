"""Defences that cheat, each in its own way, and the check that catches each; honest models pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Defence(nn.Module):
    """A classifier wrapped in something that makes it look robust."""

    def __init__(self, base):
        super().__init__()
        self.base = base


class Saturated(Defence):
    def forward(self, x):
        return 1e4 * self.base(x)


class NaNGradients(Defence):
    """Finite outputs; on the way back, infinity times zero."""

    def forward(self, x):
        nothing = (x - x.detach()).abs().sqrt().flatten(1).sum(1, keepdim=True)
        return self.base(x) + 0 * nothing


class Noisy(Defence):
    def forward(self, x):
        logits = self.base(x)
        return logits + 0.3 * logits.std() * torch.randn_like(logits)


class Quantised(Defence):
    def forward(self, x):
        return self.base((x * 4).round() / 4)


class Probabilities(Defence):
    def forward(self, x):
        return self.base(x).softmax(1)


class Reversed(Defence):
    """Right answers, gradients that point the wrong way."""

    def forward(self, x):
        logits = self.base(x)
        return 2 * logits.detach() - logits


class ReversedOffGrid(Defence):
    """Honest on the sixteen grey levels of clean digits, reversed elsewhere: FGSM gets through, PGD does not."""

    def forward(self, x):
        clean = ((x * 16).round() / 16 - x).abs().flatten(1).amax(1) < 1e-6
        logits = self.base(x)
        return torch.where(clean[:, None], logits, 2 * logits.detach() - logits)


class Shaken(Defence):
    """Right answers, gradients drowned in noise: only the number of steps averages it away."""

    def forward(self, x):
        logits = self.base(x)
        if x.requires_grad:
            x.register_hook(lambda grad: grad + 4 * grad.flatten(1).std(1).view(-1, 1, 1, 1) * torch.randn_like(grad))
        return logits


class BatchStatistics(Defence):
    """Normalises by the batch, whatever mode it is told to be in."""

    def forward(self, x):
        return self.base(F.batch_norm(x, None, None, training=True) * 0.35 + 0.3)


class AlwaysTraining(Defence):
    """Refuses to be put into evaluation mode."""

    def train(self, mode=True):  # noqa: ARG002
        return super().train(True)

    def forward(self, x):
        return self.base(x)


class LabelLeak(Defence):
    """Reads the label off the sign pattern of a one-step attack, as models trained on FGSM learn to."""

    def __init__(self, base):
        super().__init__(base)
        self.register_buffer("patterns", torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).sign())

    def forward(self, x):
        grid = (x.detach() * 16).round() / 16
        change = (x - grid).flatten(1)
        # the gradient of this term carries the pattern of the true class, and so does the change that follows it
        leak = -change @ self.patterns.T
        attacked = change.detach().abs().amax(1) > 1e-6
        return torch.where(attacked[:, None], -leak, self.base(grid) + leak)


CHEATS = [
    (Saturated, "zero gradients at start"),
    (Saturated, "robust to a blind attack"),
    (NaNGradients, "zero gradients at start"),
    (NaNGradients, "robust to a blind attack"),
    (NaNGradients, "not finite under attack"),
    (Noisy, "random outputs"),
    (Noisy, "re-verification"),
    (Quantised, "zero gradients at start"),
    (Quantised, "Square beats white-box"),
    (Probabilities, "probabilities instead of logits"),
    (Reversed, "Square beats white-box"),
    (Reversed, "accuracy at ε = 1"),
    (Reversed, "random noise beats the attacks"),
    (ReversedOffGrid, "one step beats many"),
    (Shaken, "doubling the steps"),
    (BatchStatistics, "batch dependence"),
    (AlwaysTraining, "training mode"),
    (LabelLeak, "attack raises accuracy"),
]


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.mark.parametrize(("defence", "name"), CHEATS)
def test_a_cheat_is_caught(defence, name, natural, judged, cache):
    if name == "Square beats white-box":
        pytest.importorskip("pyautoattack")
    if defence not in cache:
        torch.manual_seed(0)
        cache[defence] = judged(defence(natural))
    results, checks = cache[defence]
    print(results["clean"], {n: (c["verdict"], c["number"]) for n, c in checks.items()})
    assert checks[name]["verdict"] == "fail", checks[name]
    assert results["verdict"] == "fail"


@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_an_honest_model_passes(kind, request, judged):
    results, checks = judged(request.getfixturevalue(kind))
    failed = {name: check["number"] for name, check in checks.items() if check["verdict"] == "fail"}
    print(results["clean"], {n: (c["verdict"], c["number"]) for n, c in checks.items()})
    assert not failed
    assert checks["transfer beats white-box"]["verdict"] == "skipped"
