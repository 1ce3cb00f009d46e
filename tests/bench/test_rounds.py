"""The released flow spends what it is said to spend, and afd's round less."""

import pytest
import torch
from torch import nn

from afd.bench import round_candidates as rounds
from afd.bench.released import ReleasedRound
from afd.methods import AFD
from afd.nn import FeatureClassifier


class Counting(nn.Module):
    """Counts forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        out = self.linear(x.flatten(1))
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, _grad):
        self.backwards += 1


@pytest.mark.parametrize(
    ("build", "forwards", "backwards"),
    [
        (lambda model: ReleasedRound(model, 0.1), 5, 4),
        (lambda model: AFD().build(model), 2, 2),
        (lambda model: AFD(schedule="alternating").build(model), 3, 2),
    ],
)
def test_passes_through_the_features(build, forwards, backwards):
    encoder = Counting()
    round_ = build(FeatureClassifier(encoder, 6, 3))
    x = torch.rand(5, 1, 2, 2)
    round_.step(x, torch.arange(5) % 3, x)
    assert (encoder.forwards, encoder.backwards) == (forwards, backwards)


def test_every_player_of_the_released_round_moves():
    torch.manual_seed(0)
    round_ = ReleasedRound(FeatureClassifier(Counting(), 6, 3), 0.1)
    before = {name: p.clone() for name, p in (*round_.whole.named_parameters(), *round_.judge.named_parameters())}
    x = torch.rand(5, 1, 2, 2)
    round_.step(x, torch.arange(5) % 3, (x + 0.1).clamp(max=1))
    after = dict((*round_.whole.named_parameters(), *round_.judge.named_parameters()))
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "l7.bias")


@pytest.mark.parametrize("name", rounds.CASES)
def test_all_images_of_a_case_are_attacked(name):
    case = rounds.case(name, 4, 1, torch.device("cpu"))
    round_, outside = rounds.ours(case, "fp32", "simultaneous")
    round_()
    outside()
    assert (case.model(case.x).argmax(1) == case.y).all()
