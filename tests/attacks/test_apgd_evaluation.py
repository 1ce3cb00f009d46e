"""APGD as an evaluation runs it: target class after target class, and without the samples that are broken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afd.attacks import APGD
from afd.errors import InputError

NORMS = {"Linf": 0.06, "L2": 0.3, "L1": 1.0}


class RowByRow(nn.Module):
    """Rounds each sample alike, whatever the batch around it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.randn(36, 6, dtype=torch.float64, generator=generator)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return (x.flatten(1)[:, :, None] * self.weight).sum(1).tanh() * 3


@pytest.fixture
def batch():
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = RowByRow()(x).argmax(1)
    y[:5] = (y[:5] + 1) % 6  # wrong to begin with
    return x, y


def fooled(x, y):
    return RowByRow()(x).argmax(1) != y


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("norm", NORMS)
def test_early_stop_breaks_the_same_samples_and_leaves_the_same_points_for_the_others(batch, norm, loss):
    x, y = batch
    settings = {"norm": norm, "eps": NORMS[norm], "steps": 12, "n_restarts": 2, "loss": loss, "n_target_classes": 3}
    plain, early = RowByRow(), RowByRow()
    slow, fast = APGD(plain, **settings)(x, y), APGD(early, early_stop=True, **settings)(x, y)
    broken = fooled(slow, y)
    assert 5 < broken.sum() < 40
    assert torch.equal(fooled(fast, y), broken)
    assert torch.equal(fast[~broken], slow[~broken])
    assert torch.equal(fast[:5], x[:5])
    assert sum(early.sizes) < 0.9 * sum(plain.sizes)


def test_early_stop_takes_the_radius_of_each_sample_along(batch):
    x, y = batch
    eps = torch.linspace(0, 0.3, 40, dtype=torch.float64)
    for norm in ("Linf", "L1"):
        radii = eps * (40 if norm == "L1" else 1)
        settings = {"norm": norm, "eps": radii, "steps": 10, "n_restarts": 2, "chunk_size": 16}
        slow, fast = (APGD(RowByRow(), early_stop=early, **settings)(x, y) for early in (False, True))
        broken = fooled(slow, y)
        assert 5 < broken.sum() < 40
        assert torch.equal(fooled(fast, y), broken)
        assert torch.equal(fast[~broken], slow[~broken])


def test_early_stop_ends_when_nothing_is_left(batch):
    x, y = batch
    model = RowByRow()
    APGD(model, eps=0.9, steps=50, n_restarts=3, early_stop=True)(x, y)
    assert len(model.sizes) < 50


def test_low_precision_successes_are_confirmed_before_a_sample_is_dropped():
    """bfloat16 sees the two logits as equal and calls every sample fooled; float32 knows better."""

    class Fine(nn.Module):
        def forward(self, x):
            low = torch.is_autocast_enabled("cpu")
            edge = x.flatten(1).mean(1) * 1e-3
            return torch.stack([1 + edge * (not low), torch.ones_like(edge) + 1e-6, edge], 1)

    x, y = torch.full((8, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    for early in (False, True):
        x_adv = APGD(Fine(), eps=0.01, steps=4, precision="bf16", early_stop=early)(x, y)
        assert (x_adv - x).abs().max() <= 0.01 + 1e-6
        assert (Fine()(x_adv).argmax(1) == 0).all()


@pytest.mark.parametrize("restarts", [1, 2])
def test_targeted_dlr_aims_at_each_of_the_likeliest_classes(batch, restarts):
    x, y = batch
    aims = []
    attack = APGD(RowByRow(), eps=0.001, steps=2, loss="dlr-targeted", n_target_classes=4, n_restarts=restarts)
    inner = attack.loss.value
    from dataclasses import replace

    attack.loss = replace(attack.loss, value=lambda logits, target: aims.append(target) or inner(logits, target))
    attack(x[5:], y[5:])
    order = RowByRow()(x[5:]).argsort(1, descending=True)
    assert len(aims) == restarts * 4 * 3
    assert len(attack.model.sizes) == len(aims) + 1  # the clean images are looked at once
    for run in range(restarts * 4):
        assert torch.equal(aims[3 * run], torch.stack([y[5:], order[:, 1 + run % 4]], 1))


def test_targeted_dlr_finds_what_one_class_alone_does_not(batch):
    x, y = batch[0], RowByRow()(batch[0]).argmax(1)
    one, five = (
        fooled(APGD(RowByRow(), eps=0.05, steps=10, loss="dlr-targeted", n_target_classes=n)(x, y), y) for n in (1, 5)
    )
    assert (five | ~one).all()
    assert five.sum() > one.sum()


def test_more_target_classes_than_the_model_has(batch):
    with pytest.raises(InputError, match="n_target_classes is at most 5"):
        APGD(RowByRow(), loss="dlr-targeted", steps=1)(*batch)
    with pytest.raises(InputError, match="n_target_classes is 0"):
        APGD(RowByRow(), loss="dlr-targeted", n_target_classes=0)
