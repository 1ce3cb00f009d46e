"""Attack losses against values worked out by hand."""

import math

import pytest
import torch

from afd.attacks.losses import LOSSES, cross_entropy, dlr, loss_named, margin
from afd.errors import InputError

LOGITS = torch.tensor([[5.0, 3.0, 1.0, -2.0], [0.0, 4.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])


def test_margin_by_hand():
    assert margin(LOGITS, torch.tensor([0, 0, 2])).tolist() == [3 - 5, 4 - 0, 0]
    assert margin(LOGITS, torch.tensor([3, 1, 0])).tolist() == [5 + 2, 0, 0]


def test_dlr_by_hand():
    # (other - own) / (first - third): (3 - 5) / (5 - 1), (4 - 0) / (4 - 2)
    torch.testing.assert_close(dlr(LOGITS, torch.tensor([0, 0, 2])), torch.tensor([-0.5, 2.0, 0.0]))
    torch.testing.assert_close(dlr(LOGITS, torch.tensor([1, 3, 2]))[:2], torch.tensor([0.5, 1.0]))


def test_cross_entropy_by_hand():
    got = cross_entropy(torch.tensor([[0.0, math.log(3)], [2.0, 2.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([math.log(4), math.log(2)]))


def test_dlr_ignores_shift_and_scale():
    logits, y = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 7
    torch.testing.assert_close(dlr(logits * 31 + 5, y), dlr(logits, y))


def test_a_positive_loss_means_a_wrong_prediction():
    logits, y = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 5
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_right(loss):
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.arange(6) % 5), logits)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_logits_give_float32_losses(loss):
    assert loss(LOGITS.bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32


@pytest.mark.parametrize(("name", "classes", "least"), [("dlr", 2, 3), ("margin", 1, 2)])
def test_too_few_classes_are_named(name, classes, least):
    words = f"loss is '{name}', which needs at least {least} classes; the model has {classes}"
    with pytest.raises(InputError, match=words):
        loss_named(name)(torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64))


def test_dlr_has_no_target():
    with pytest.raises(InputError, match="loss is 'dlr', which has no target class; with targeted=True, allowed are"):
        loss_named("dlr", targeted=True)
