"""Attack losses against values worked out by hand."""

import math

import pytest
import torch

from afd.attacks.losses import LOSSES, cross_entropy, dlr, dlr_targeted, kl_divergence, loss_named, margin
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


def test_cross_entropy_of_soft_labels_by_hand():
    got = cross_entropy(torch.tensor([[0.0, math.log(3)], [2.0, 2.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.5]]))
    expected = torch.tensor([0.25 * math.log(4) + 0.75 * math.log(4 / 3), 1.5 * math.log(2)])
    torch.testing.assert_close(got, expected)


def test_dlr_ignores_shift_and_scale():
    logits, y = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 7
    torch.testing.assert_close(dlr(logits * 31 + 5, y), dlr(logits, y))


def test_a_positive_loss_means_a_wrong_prediction():
    logits, y = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 5
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)


def test_targeted_dlr_by_hand():
    # (target - own) / (first - (third + fourth) / 2)
    logits = torch.tensor([[5.0, 3.0, 1.0, -2.0], [0.0, 4.0, 4.0, 2.0]])
    got = dlr_targeted(logits, torch.tensor([[0, 1], [3, 2]]))
    torch.testing.assert_close(got, torch.tensor([(3 - 5) / (5 + 0.5), (4 - 2) / (4 - 1)]))


def test_kl_divergence_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(kl_divergence(q.log() + 7, p.log()), torch.tensor([expected]))
    assert kl_divergence(LOGITS, LOGITS.log_softmax(1)).abs().max() < 1e-6


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_classes_aimed_at_are_the_likeliest_others(rank):
    y = torch.tensor([0, 1, 3])
    logits = torch.tensor([[9.0, 3.0, 1.0, 5.0], [3.0, 1.0, 2.0, 4.0], [0.0, 2.0, 1.0, 1.5]])
    ranked = [[3, 1, 2], [3, 0, 2], [1, 2, 0]]
    target = loss_named("dlr-targeted").target(lambda: logits, y, rank)
    assert target.tolist() == [[own, others[rank]] for own, others in zip(y.tolist(), ranked, strict=True)]


def test_more_target_classes_than_there_are_is_an_error():
    with pytest.raises(InputError, match="aims at 4 other classes; the model has 4, so n_target_classes is at most 3"):
        loss_named("dlr-targeted").target(lambda: LOGITS, torch.tensor([0, 1, 2]), 3)


def aimed(loss, logits, y):
    """What the loss is judged by, from other logits than those at hand."""
    return loss.target(lambda: logits.detach().flip(0), y, 0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_right(loss):
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target = aimed(loss, logits, torch.arange(6) % 5)
    assert torch.autograd.gradcheck(lambda z: loss.value(z, target), logits)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_logits_give_float32_losses(loss):
    logits = LOGITS.bfloat16()
    assert loss.value(logits, aimed(loss, logits, torch.tensor([0, 1, 2]))).dtype == torch.float32


@pytest.mark.parametrize(("name", "classes", "least"), [("dlr-targeted", 3, 4), ("dlr", 2, 3), ("margin", 1, 2)])
def test_too_few_classes_are_named(name, classes, least):
    words = f"loss is '{name}', which needs at least {least} classes; the model has {classes}"
    target = torch.zeros((2, 2) if name == "dlr-targeted" else 2, dtype=torch.int64)
    with pytest.raises(InputError, match=words):
        loss_named(name).value(torch.zeros(2, classes), target)


def test_a_clean_prediction_of_other_classes_is_named():
    with pytest.raises(InputError, match=r"target has shape \[2, 1\]; the model's logits are \[2, 4\]"):
        kl_divergence(torch.zeros(2, 4), torch.zeros(2, 1))


def test_dlr_has_no_target():
    with pytest.raises(InputError, match="loss is 'dlr', which takes no target class; with targeted=True, allowed are"):
        loss_named("dlr", targeted=True)
