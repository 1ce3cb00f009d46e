"""Defences that cheat, each in its own way, and the check of the quick protocol that catches each; honest models pass.

And it is quick: with all of its checks it passes a model at most four times as often as PGD-20 and APGD-CE alone.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.evaluation import runner
from afd.evaluation.attacks import Epsilon
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.protocol import quick

EPS = Epsilon.of("0.15")
GRADIENT = 3  # forwards that a forward with the gradient at its input counts as


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


class Counted(nn.Module):
    """Adds up forwards of images, and gradients as so many forwards, by the stage that asks for them."""

    def __init__(self, base):
        super().__init__()
        self.base, self.stage, self.passes = base, "", Counter()

    def forward(self, x):
        self.passes[self.stage] += len(x) * (GRADIENT if torch.is_grad_enabled() and x.requires_grad else 1)
        return self.base(x)


@pytest.fixture(scope="module")
def quickly(images, tmp_path_factory):
    """What the quick protocol finds of a model: its results, checks by name, and passes by stage; each model once."""
    known = {}

    def run(name, model):
        if name not in known:
            torch.manual_seed(0)
            counted, compute = Counted(model), runner.Runner.compute

            def noted(self, batch, item, rows, started):
                counted.stage = item.stage.name
                found = compute(self, batch, item, rows, started)
                counted.stage = ""
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runner.Runner, "compute", noted)
                protocol, out = quick("Linf", (EPS,), EPS), tmp_path_factory.mktemp("quick") / "out"
                results = evaluate_to_folder(Model("model", "test", counted), images, protocol, out, batch_size=60)
            checks = {check["name"]: check for check in results["checks"]}
            known[name] = results, checks, counted.passes
            print(results["clean"], {n: (c["verdict"], c["number"]) for n, c in checks.items()})
        return known[name]

    return run


@pytest.mark.parametrize(("defence", "name"), CHEATS)
def test_a_cheat_is_caught(defence, name, natural, quickly):
    results, checks, _ = quickly(defence, defence(natural))
    assert checks[name]["verdict"] == "fail", checks[name]
    assert results["verdict"] == "fail"


@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_an_honest_model_passes(kind, request, quickly):
    _, checks, _ = quickly(kind, request.getfixturevalue(kind))
    assert not {name: check["number"] for name, check in checks.items() if check["verdict"] == "fail"}
    assert checks["transfer beats white-box"]["verdict"] == "skipped"


@pytest.mark.parametrize("kind", ["natural", "robust", *dict.fromkeys(defence for defence, _ in CHEATS)])
def test_all_checks_cost_at_most_three_times_what_they_check(kind, request, natural, quickly):
    model = request.getfixturevalue(kind) if isinstance(kind, str) else kind(natural)
    _, _, passes = quickly(kind, model)
    asked = passes["pgd-20"] + passes["apgd-ce"]
    print(f"{passes.total() / asked:.2f} times", dict(passes))
    assert "probe-pgd-20" not in passes
    assert passes.total() <= 4 * asked
