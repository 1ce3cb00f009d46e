"""What an attack notices about the model: NaN, gradients that say nothing, probabilities."""

import warnings

import pytest
import torch
from torch import nn

from afd.attacks import APGD, FGSM, MIM, PGD, ModelWarning
from afd.errors import ModelError

X, Y = torch.linspace(0.2, 0.8, 12 * 4).view(12, 4), torch.arange(12) % 3
ATTACKS = {"pgd": PGD, "apgd": APGD, "mim": MIM}


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class After(nn.Module):
    """A model that changes from its call number `first` on."""

    def __init__(self, first, change):
        super().__init__()
        self.inner, self.first, self.change, self.calls = linear(), first, change, 0

    def forward(self, x):
        self.calls += 1
        logits = self.inner(x)
        return self.change(logits) if self.calls >= self.first else logits


def nan_in(*rows):
    def change(logits):
        bad = torch.zeros_like(logits)
        bad[list(rows), 1] = float("nan")
        return logits + bad

    return change


@pytest.mark.parametrize(("attack", "before"), [("pgd", 0), ("mim", 0), ("apgd", 1)])
def test_nan_logits_are_an_error_that_names_step_and_samples(attack, before):
    model = After(before + 3, nan_in(2, 7))
    with pytest.raises(ModelError, match=r"NaN logits, first seen in step 2, for 2 of 12 samples: 2, 7$"):
        ATTACKS[attack](model, steps=5)(X, Y)


def test_nan_logits_are_named_by_their_place_in_the_batch_and_the_list_is_short():
    with pytest.raises(ModelError, match=r"for 12 of 12 samples: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."):
        PGD(After(1, lambda logits: logits * float("nan")), steps=2, chunk_size=5)(X, Y)
    with pytest.raises(ModelError, match=r"for 3 of 12 samples: 3, 7, 11$"):  # the last of each chunk of four
        PGD(After(1, nan_in(-1)), steps=1, chunk_size=5)(X, Y)


def test_the_model_is_left_as_it_was_found_after_nan():
    model = After(1, nan_in(0)).train()
    with pytest.raises(ModelError):
        PGD(model, steps=1)(X, Y)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


class Deaf(nn.Module):
    """Ignores the images whose first value is below 0.5."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner(x * (x[:, :1] > 0.5))


@pytest.mark.parametrize("attack", ATTACKS)
def test_zero_gradients_are_counted_and_reported(attack):
    deaf = int((X[:, 0] <= 0.5).sum())
    assert 0 < deaf < 12
    attack = ATTACKS[attack](Deaf(), eps=0.001, steps=3)
    with pytest.warns(ModelWarning, match=f"for {deaf} of 12 samples the gradient of the loss was exactly zero"):
        attack(X, Y)
    seen = attack.report.evaluations
    assert torch.equal(attack.report.zero_gradients, torch.where(X[:, 0] > 0.5, torch.zeros_like(seen), seen))


def test_the_warning_points_at_the_caller():
    with pytest.warns(ModelWarning) as caught:
        FGSM(Deaf(), eps=0.001)(X, Y)
    assert caught[0].filename == __file__


def test_probabilities_are_noticed():
    with pytest.warns(ModelWarning, match="sum to 1 as probabilities do; attacks need logits"):
        PGD(nn.Sequential(linear(), nn.Softmax(1)), steps=1)(X, Y)


@pytest.mark.parametrize("end", [nn.Identity(), nn.Sigmoid(), nn.LogSoftmax(1)])
def test_logits_are_no_reason_to_warn(end):
    model = nn.Sequential(linear(), end)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(model, steps=2)(X, Y)


def test_without_a_look_nothing_is_read():
    attack = PGD(After(2, nan_in(0)), steps=3, validate=False)
    attack(X * 5, Y)  # beyond the bounds, and NaN on the way
    assert attack.report is None
