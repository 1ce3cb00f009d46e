"""Captured steps of models that hold more than weights: attributes, modes, hooks, and tensors that they replace."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from afd.attacks import CaptureWarning
from afd.methods import Natural
from afd.nn import split
from afd.training import recording

CPU = torch.device("cpu")


def eagerly(monkeypatch):
    monkeypatch.setattr(recording.GraphedStep, "_capture", lambda *_: None)


class Tempered(nn.Module):
    """A model with a number that its user sets, and one that it may set itself."""

    def __init__(self, counts):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.temperature, self.counts, self.calls = 1.0, counts, 0

    def forward(self, x):
        self.calls += self.counts
        return self.inner(x) / self.temperature


def tempered_steps(net, change, steps=6):
    """Takes steps of natural training, `change` made before the fourth; returns the losses."""
    step, x, y = Natural(lr=1e-3).build(split(net)), torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    graphed, losses = recording.GraphedStep(net, step, CPU), []
    for number in range(steps):
        if number == 3:
            change(net, step)
        losses.append(float(graphed(x, y, seed=0)["task"]))
    assert step.steps == steps
    return losses


CHANGES = {
    "attribute": lambda net, _: setattr(net, "temperature", 100.0),
    "mode": lambda net, _: net.inner[1].eval(),
    "hook": lambda net, _: net.inner[0].register_forward_hook(lambda _layer, _given, out: out * 0),
    "optimizer": lambda _, step: step.optimizers["task"].param_groups[0].update(momentum=0.0, weight_decay=300.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_python_holds_of_the_model_makes_another_capture(change, tapes):
    torch.manual_seed(0)
    replayed = tempered_steps(Tempered(counts=0), CHANGES[change])
    assert [one.replays for one in tapes] == [2, 2]
    torch.manual_seed(0)
    unchanged = tempered_steps(Tempered(counts=0), lambda *_: None)
    assert replayed[:3] == unchanged[:3]
    assert abs(replayed[5] - unchanged[5]) > 1e-3


class Centred(nn.Module):
    """Keeps a running mean of its features: as a plain tensor, or as a buffer that is replaced; and may wait."""

    def __init__(self, kind, waits):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), nn.Linear(8, 3)
        self.waits, self.calls = waits, 0
        if kind == "buffer":
            self.register_buffer("centre", torch.zeros(8))
        else:
            self.centre = torch.zeros(8)

    def forward(self, x):
        z = self.body(x)
        self.centre = 0.5 * self.centre + 0.5 * z.detach().mean(0)
        if self.waits == "counts":
            self.calls += 1
        logits = self.head(z - self.centre)
        return logits * (1.0 if self.waits != "waits" or float(logits.detach().sum()) < 1e9 else 2.0)


@pytest.mark.parametrize("waits", ["", "waits", "counts"])
@pytest.mark.parametrize("kind", ["plain", "buffer"])
def test_tensors_that_a_model_replaces_are_followed_also_where_a_capture_fails(kind, waits, tapes, monkeypatch):
    """A capture leaves NaN in what it makes; the last, shorter batch comes between the others."""
    ends = []
    for captured in (True, False):
        net = Centred(kind, waits)
        graphed, losses = recording.GraphedStep(net, Natural(lr=0.1).build(split(net)), CPU), []
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("ignore", CaptureWarning)
            if not captured:
                eagerly(patch)
            for number, rows in enumerate((6, 6, 6, 3, 6, 6, 3, 3, 6)):
                x = torch.rand(rows, 1, 6, 6, generator=torch.Generator().manual_seed(number))
                losses.append(graphed(x, torch.arange(rows) % 3, seed=0)["task"])
        ends.append([torch.stack(losses), net.centre, net.head.weight.detach(), net.calls])
    assert [one.replays for one in tapes] == ([0] if waits else [5, 2])
    assert ends[0][0].isfinite().all()
    for one, other in zip(*ends, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_a_model_that_changes_its_own_attributes_is_not_captured_and_is_named(tapes):
    net = Tempered(counts=1)
    with pytest.warns(
        CaptureWarning, match="because each changes the attribute 'calls' of the model, which a graph le"
    ):
        tempered_steps(net, lambda *_: None)
    assert [one.replays for one in tapes] == [0]
