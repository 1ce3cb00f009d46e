"""Losses of one's own, of samples or of the batch, of logits or features, and what a call gives them to judge by."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from literal_attacks import apgd, mim, pgd, same_points
from torch import nn

from afd import ops
from afd.attacks import APGD, FGSM, MIM, PGD, ModelWarning
from afd.errors import InputError, InputTypeError, ModelError

EPS, ALPHA = 0.1, 0.03


class Net(nn.Module):
    """A small split model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten())
        self.classifier = nn.Linear(3 * 16, 4)
        self.double().eval()

    def features(self, x):
        return self.encoder(x)

    def features_and_logits(self, x):
        features = self.encoder(x)
        return features, self.classifier(features)

    def forward(self, x):
        return self.classifier(self.encoder(x))


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def squares(outputs, target):
    """A loss of each sample."""
    return (outputs - target).square().sum(1)


def nuclear(outputs, target):
    """One of the whole batch, which no part of it has (NuAT's)."""
    return torch.linalg.matrix_norm(outputs - target, "nuc")


def at(loss, target, outputs=None):
    """The gradient of a loss of this model's, for the literal loops."""
    model = Net()

    def at(x_adv):
        x_adv = x_adv.detach().requires_grad_()
        losses = loss((outputs or model)(x_adv) if outputs is None else outputs(model, x_adv), target)
        (grad,) = torch.autograd.grad(losses.sum(), x_adv)
        return grad, losses.detach().expand(len(x_adv)), model(x_adv).detach()

    return at


def features(model, x):
    return model.features(x)


# --- Losses of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [squares, nuclear])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_loss_of_ones_own_is_ascended_like_any_other(loss, chunk_size):
    x, _ = batch()
    target = Net()(x).detach().flip(0)
    start = ops.random_start(x, eps=EPS, seed=0)
    settings = {"eps": EPS, "loss": loss, "chunk_size": chunk_size}
    expected = pgd(at(loss, target), x, start, EPS, ALPHA, 5)
    found = PGD(Net(), alpha=ALPHA, steps=5, **settings)(x, target=target)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    expected = mim(at(loss, target), x, x, EPS, ALPHA, 5)
    found = MIM(Net(), alpha=ALPHA, steps=5, **settings)(x, target=target)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    expected = pgd(at(loss, target), x, x, EPS, EPS, 1)
    torch.testing.assert_close(FGSM(Net(), **settings)(x, target=target), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("loss", [squares, nuclear])
def test_auto_pgd_takes_it_too_and_a_scalar_is_everybodys(loss, early_stop):
    x, y = batch()
    target, clean = Net()(x).detach().flip(0), Net()(x).detach()
    start = ops.random_start(x, eps=EPS, seed=0)
    expected = apgd(at(loss, target), x, y, clean, start, EPS, 9)
    found = APGD(Net(), eps=EPS, steps=9, loss=loss, early_stop=early_stop)(x, y, target=target)
    if loss is nuclear or not early_stop:
        same_points(found, expected)
    else:  # earlier points of the same runs
        same = [Net()(z).argmax(1).eq(y) for z in (found, expected)]
        assert same[0].equal(same[1])


def test_it_can_be_descended():
    x, _ = batch()
    target = Net()(x).detach().flip(0)
    found = PGD(Net(), eps=EPS, alpha=ALPHA, steps=5, loss=squares, targeted=True)(x, target=target)
    assert (squares(Net()(found), target) < squares(Net()(x), target)).all()


@pytest.mark.parametrize("outputs", ["logits", "features"])
def test_what_it_is_given(outputs):
    x, y = batch()
    given = []

    def loss(outputs, target):
        given.append((outputs.shape, outputs.dtype, target))
        return outputs.sum(1)

    attack = PGD(Net().float(), eps=EPS, steps=1, loss=loss, outputs=outputs, precision="bf16")
    target = torch.rand(8, 2, 3)
    for call in ({"y": y}, {"target": target}, {"y": y, "target": target}):
        attack(x.float(), **call)
    width = 4 if outputs == "logits" else 48
    assert [one[:2] for one in given] == [(torch.Size([8, width]), torch.float32)] * 3
    assert given[0][2].equal(y)
    assert given[1][2].equal(target)
    assert given[2][2].equal(target)


def test_a_target_is_no_way_for_gradients_and_may_come_from_inference():
    x, _ = batch()
    with torch.inference_mode():
        made_there = Net()(x).flip(0)
    target = made_there.clone().requires_grad_()
    attack = PGD(Net(), eps=EPS, alpha=ALPHA, steps=3, loss=squares)
    assert attack(x, target=made_there).equal(attack(x, target=target))
    assert target.grad is None


# --- Of the whole batch ---------------------------------------------------------------------------------------------


class Drawing(Net):
    """Draws at random, and is run on batches whose sizes are noted."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_that_a_loss_is_a_scalar_is_seen_once_and_the_batch_is_begun_with_anew():
    x, _ = batch()
    target = torch.zeros(8, 4, dtype=torch.float64)
    whole, attack = (PGD(Drawing(), eps=EPS, steps=2, loss=nuclear, chunk_size=chunk_size) for chunk_size in (8, 3))
    torch.manual_seed(3)
    expected = whole(x, target=target)
    torch.manual_seed(3)
    assert attack(x, target=target).equal(expected)
    assert attack.model.sizes == [3, 8, 8]
    attack(x, target=target)
    assert attack.model.sizes == [3, 8, 8, 8, 8]


def test_auto_pgd_leaves_no_sample_out_of_a_scalar():
    x, y = batch()
    target = torch.zeros(8, 4, dtype=torch.float64)
    model = Net()
    y = torch.where(torch.arange(8) < 4, model(x).argmax(1), (model(x).argmax(1) + 1) % 4)  # half are wrong already
    assert (model(x).argmax(1) != y).sum() == 4
    settings = {"eps": EPS, "steps": 8, "loss": nuclear, "n_restarts": 2}
    expected = APGD(Net(), **settings)(x, y, target=target)
    attack = APGD(Net(), early_stop=True, **settings)
    assert attack(x, y, target=target).equal(expected)
    assert attack(x, y, target=target).equal(expected)


def test_a_single_image_has_a_scalar_too():
    x, y = batch(1)
    mean = PGD(Net(), eps=EPS, loss=lambda outputs, y: F.cross_entropy(outputs, y))
    assert mean(x, y).equal(PGD(Net(), eps=EPS)(x, y))


def test_scalars_and_losses_of_ones_own_are_recorded_too(tapes):
    x, _ = batch()
    attacks = [kind(Net(), eps=EPS, steps=3, loss=nuclear) for kind in (PGD, MIM, APGD)]
    for attack in attacks:
        plain = copy.deepcopy(attack)
        plain.own_graphs = False
        for seed in range(3):
            target = torch.rand(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert attack(x, target=target, seed=seed).equal(plain(x, target=target, seed=seed))
    assert [one.replays for one in tapes] == [2, 2, 2]


# --- Features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [squares, nuclear])
def test_a_loss_of_features(loss):
    x, y = batch()
    target = Net().features(x).detach().flip(0)
    start = ops.random_start(x, eps=EPS, seed=0)
    settings = {"eps": EPS, "loss": loss, "outputs": "features"}
    expected = pgd(at(loss, target, features), x, start, EPS, ALPHA, 5)
    found = PGD(Net(), alpha=ALPHA, steps=5, **settings)(x, target=target)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    expected = apgd(at(loss, target, features), x, y, Net()(x).detach(), start, EPS, 9)
    same_points(APGD(Net(), steps=9, **settings)(x, y, target=target), expected)


def test_a_model_without_features_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    with pytest.raises(InputError, match="outputs is 'features', and the model, a Sequential, has no method features"):
        PGD(model, loss=squares, outputs="features")
    model.features = lambda x: x.flatten(1)
    with pytest.raises(InputError, match="a Sequential, has no method features_and_logits"):
        APGD(model, loss=squares, outputs="features")
    model.features = lambda x: x
    with pytest.raises(InputError, match=r"the model's features have shape \[8, 1, 6, 6\]; they must be \[8, D\]"):
        PGD(model, loss=squares, outputs="features")(*batch())
    model.features = lambda x: [x]
    with pytest.raises(InputTypeError, match="the model's features are a list"):
        PGD(model, loss=squares, outputs="features")(*batch())


# --- Wrong returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda *_: 1.0, InputTypeError, r"loss returned a float; it must return a floating-point tensor, \[8\] or"),
        (lambda *_: None, InputTypeError, "loss returned None"),
        (lambda z, _: z.argmax(1), InputTypeError, r"loss returned a tensor of torch\.int64"),
        (lambda z, _: z, InputError, r"loss returned shape \[8, 4\]; it must be \[8\], one for each image, or \[\]"),
        (lambda z, _: z.sum(0), InputError, r"loss returned shape \[4\]"),
        (lambda z, _: z.sum(1, keepdim=True), InputError, r"loss returned shape \[8, 1\]"),
        (
            lambda z, _: z.detach().sum(1),
            InputError,
            "loss returned a tensor without a gradient: something in it detach",
        ),
        (lambda *_: torch.zeros(8), InputError, "loss returned a tensor without a gradient"),
    ],
)
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_what_a_loss_must_not_return_is_named(kind, loss, error, message):
    with pytest.raises(error, match=message):
        kind(Net(), steps=2, loss=loss)(*batch())


def test_a_model_without_a_gradient_is_still_the_models_fault():
    class Cut(Net):
        def forward(self, x):
            return super().forward(x.detach())

    model = Cut()
    model.requires_grad_(False)
    for loss in ("ce", lambda z, _: z.sum(1)):
        with pytest.raises(ModelError, match="no gradient leads from the model's output to the images"):
            PGD(model, loss=loss)(*batch())


# --- Labels and targets ---------------------------------------------------------------------------------------------


def soft_labels(count=8):
    return torch.rand(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).softmax(1)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_soft_labels(chunk_size):
    x, _ = batch()
    y, start = soft_labels(), ops.random_start(x, eps=EPS, seed=0)

    def soft(logits, y):
        return -(y * logits.log_softmax(1)).sum(1)

    expected = pgd(at(soft, y), x, start, EPS, ALPHA, 5)
    for loss in ("ce", soft):
        found = PGD(Net(), eps=EPS, alpha=ALPHA, steps=5, loss=loss, chunk_size=chunk_size)(x, y)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        leave = apgd(at(soft, y), x, y.argmax(1), Net()(x).detach(), start, EPS, 9)
        found = APGD(Net(), eps=EPS, steps=9, loss=loss, chunk_size=chunk_size)(x, y)
        same_points(found, leave)
    exact = F.one_hot(y.argmax(1), 4).double()
    settings = {"eps": EPS, "steps": 9, "early_stop": True}
    assert APGD(Net(), **settings)(x, exact).equal(APGD(Net(), **settings)(x, y.argmax(1)))


def test_without_labels_a_divergence_is_the_same_and_auto_pgd_leaves_what_the_model_sees():
    x, _ = batch()
    for kind in (PGD, APGD):
        attack = kind(Net(), loss="kl", eps=EPS, steps=5)
        seen = Net()(x).argmax(1)
        assert attack(x).equal(attack(x, seen))
        assert attack(x).equal(attack(x, target=Net()(x)))
        assert not attack(x, target=Net()(x).flip(0)).equal(attack(x))


def test_a_target_spares_the_clean_forward():
    x, _ = batch()
    model = Drawing()
    PGD(model, loss="kl", steps=2)(x, target=torch.zeros(8, 4))
    assert len(model.sizes) == 2


X, Y = batch()


@pytest.mark.parametrize(
    ("settings", "call", "error", "message"),
    [
        ({}, {}, InputError, "y is None; the loss needs labels"),
        ({"loss": "dlr"}, {}, InputError, "y is None; the loss needs labels"),
        ({"loss": squares}, {}, InputError, "y and target are None; a loss of your own is called with target, or else"),
        ({}, {"y": Y, "target": Y}, InputError, "target is given; the loss is judged by y alone"),
        ({"loss": "margin"}, {"y": soft_labels()}, InputTypeError, r"y is torch\.float64; labels must be torch\.int64"),
        ({}, {"y": soft_labels()[:, :3]}, InputError, "y is soft labels of 3 classes; the model has 4"),
        ({"loss": squares}, {"y": soft_labels()[:, :3]}, InputError, "y is soft labels of 3 classes; the model has 4"),
        ({}, {"y": soft_labels()[:5]}, InputError, r"y has shape \[5, 4\]; it must have a row for each image, \[8, "),
        ({}, {"y": -soft_labels()}, InputError, r"y has values in \[-.*\]; soft labels must be finite and >= 0"),
        ({}, {"y": soft_labels() / 0}, InputError, "y has values in .*inf.*; soft labels must be finite"),
        ({}, {"y": soft_labels() * torch.nan}, InputError, "y has values in .*nan.*; soft labels must be finite"),
        (
            {"loss": "kl"},
            {"target": Y},
            InputError,
            r"target is torch\.int64 of shape \[8\]; with 'kl' it must be the cl",
        ),
        (
            {"loss": "kl"},
            {"target": torch.zeros(8, 3)},
            InputError,
            r"target has shape \[8, 3\]; the model's logits are",
        ),
        (
            {"loss": squares},
            {"target": torch.zeros(4, 8)},
            InputError,
            r"target has shape \[4, 8\]; it must have a row",
        ),
        ({"loss": squares}, {"target": torch.zeros(())}, InputError, r"target has shape \[\]; it must have a row"),
        ({"loss": squares}, {"target": 3}, InputTypeError, "target is a int; it must be a torch.Tensor"),
    ],
)
def test_what_a_loss_cannot_be_judged_by_is_named(settings, call, error, message):
    with pytest.raises(error, match=message):
        PGD(Net(), steps=1, **settings)(X, **call)


def test_auto_pgd_cannot_guess_the_class_to_reach():
    with pytest.raises(InputError, match="y is None; with targeted=True, APGD needs the classes to reach"):
        APGD(Net(), loss=squares, targeted=True)(X, target=torch.zeros(8, 4))


def test_values_of_a_loss_of_ones_own_are_looked_at():
    def flat(outputs, target):
        return 0 * outputs.sum(1)

    with pytest.warns(ModelWarning, match="for 8 of 8 samples the gradient of the loss was exactly zero"):
        PGD(Net(), steps=1, loss=flat)(X, Y)
    with (
        pytest.warns(ModelWarning, match="exactly zero or NaN wherever"),
        pytest.warns(ModelWarning, match=r"values were not finite \(8 of 8 gradients, 8 of 8 losses\)"),
    ):
        PGD(Net(), steps=1, loss=lambda z, _: z.sum() * torch.inf)(X, Y)
