"""Balls: their steps are the ops', their lengths those of the norm; a norm is one class."""

import copy
import math
import pickle
from typing import get_args

import pytest
import torch
from torch import nn

from afd import ops
from afd.attacks import APGD, FGSM, MIM, NORMS, PGD, Ball, Norm, PGDSettings
from afd.attacks.ball import L1, L2, Linf
from afd.errors import InputError
from afd.ops import checks

X, STEPS = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0.05, 0.2, 5)
RADII = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}
each = pytest.mark.parametrize("norm", RADII)
numbers_and_rows = pytest.mark.parametrize("eps", [1.0, torch.linspace(0.5, 1.5, 5)], ids=["number", "rows"])


def direction():
    return torch.randn(X.shape, generator=torch.Generator().manual_seed(1))


def test_norms_are_those_of_the_ops_and_of_annotations():
    assert tuple(NORMS) == get_args(Norm)
    assert {norm: NORMS[norm] for norm in checks.NORMS} == {"Linf": Linf, "L2": L2, "L1": L1}
    with pytest.raises(InputError, match=f"norm is 'L7'; allowed are {', '.join(NORMS)}"):
        Ball("L7", 0.1)


@each
def test_a_ball_is_of_its_norms_class_and_stays_so_in_copies(norm):
    ball = Ball(norm, 0.5, (-1.0, 1.0))
    assert type(ball) is NORMS[norm]
    for other in (copy.deepcopy(ball), pickle.loads(pickle.dumps(ball)), NORMS[norm](norm, 0.5, (-1.0, 1.0))):
        assert type(other) is type(ball)
        assert other == ball


@each
@numbers_and_rows
def test_start_step_and_projection_are_the_ops(norm, eps):
    eps = RADII[norm] * eps
    ball, given, g = Ball(norm, eps, (-0.5, 1.5)), {"eps": eps, "bounds": (-0.5, 1.5), "norm": norm}, direction()
    start = ball.start(X, seed=3, first_sample=7)
    assert start.equal(ops.random_start(X, seed=3, first_sample=7, **given))
    assert ball.step(start, X, g, STEPS).equal(ops.pgd_step(start, X, g, alpha=STEPS, **given))
    assert ball.step_(start.clone(), X, g, STEPS).equal(ball.step(start, X, g, STEPS))
    far = X + g
    assert ball.project_(far.clone(), X).equal(ops.project_(far.clone(), X, **given))
    assert (ball.distance(ball.project_(far.clone(), X), X) <= ball.radii(X) * (1 + 1e-5)).all()


@each
@numbers_and_rows
def test_a_momentum_step_mixes_and_projects_again(norm, eps):
    ball, g = Ball(norm, RADII[norm] * eps), direction()
    old, now = ball.start(X, seed=1), ball.start(X, seed=2)
    mixed = ops.momentum_point(now, old, ball.step(now, X, g, STEPS), 0.75)
    x_adv, x_adv_old = now.clone(), old.clone()
    ball.momentum_step_(x_adv, x_adv_old, X, g, STEPS, 0.75)
    torch.testing.assert_close(x_adv, ball.project_(mixed, X))
    assert x_adv_old.equal(now)


def test_a_sparse_step_moves_a_share_of_the_elements():
    moved = Ball("L1", 5.0, (-9.0, 9.0)).step_(X.clone(), X, direction(), STEPS, sparsity=torch.full((5,), 3 / 18))
    assert (moved != X).flatten(1).sum(1).tolist() == [3] * 5


@each
def test_samples_are_taken_with_their_radii(norm):
    kept = torch.tensor([3, 0])
    ball = Ball(norm, STEPS, (-1.0, 2.0))
    assert ball.take(kept).eps.equal(STEPS[kept])
    assert (type(ball.take(kept)), ball.take(kept).bounds) == (NORMS[norm], (-1.0, 2.0))
    assert Ball(norm, 0.5).take(kept) == Ball(norm, 0.5)
    assert ball.radii(X).equal(STEPS)
    assert Ball(norm, 0.5).radii(X).tolist() == [0.5] * 5


@each
def test_distances_are_those_of_the_norm(norm):
    moved = X + direction()
    difference = (moved.double() - X.double()).flatten(1).abs()
    expected = {"Linf": difference.amax(1), "L2": difference.square().sum(1).sqrt(), "L1": difference.sum(1)}[norm]
    torch.testing.assert_close(NORMS[norm].distance(moved, X), expected)
    assert NORMS[norm].distance(moved, X).dtype == torch.float64
    assert Ball(norm, 1.0).holds(torch.tensor([0.5, 1.0, 1.00001, 1.0001])).tolist() == [True, True, True, False]


def test_diameters():
    assert [NORMS[norm].diameter(784) for norm in RADII] == [1.0, math.sqrt(784), 784.0]
    corners = torch.stack([torch.zeros(9), torch.ones(9)])
    for norm in NORMS.values():
        assert norm.distance(corners[:1], corners[1:]).item() == norm.diameter(9)


@each
def test_what_is_too_far_is_pulled_back_and_nothing_else_moves(norm):
    moved = X + torch.linspace(0, 0.3, 5).view(-1, 1, 1, 1) * direction().abs()
    ball = Ball(norm, RADII[norm])
    pulled, far = ball.shorten(moved, X), ball.distance(moved, X) > RADII[norm]
    assert 0 < far.sum() < 5
    assert pulled[~far].equal(moved[~far])
    torch.testing.assert_close(ball.distance(pulled, X)[far], torch.full((5,), RADII[norm]).double()[far])


@pytest.fixture
def another_norm(monkeypatch):
    """The largest change of an image's first half; the other half is left alone. One class, and nothing else."""
    monkeypatch.setattr("afd.attacks.ball.NORMS", {**NORMS})

    class FirstHalf(Ball):
        order, sign = math.inf, "half"

        def inside(self, x_adv, x):
            half = x.shape[1] // 2
            near = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(*self.bounds)
            return torch.cat([near[:, :half], x[:, half:]], 1)

        def start(self, x, *, seed, first_sample=0):
            return self.inside(Ball("Linf", self.eps, self.bounds).start(x, seed=seed, first_sample=first_sample), x)

        def step(self, x_adv, x, grad, alpha):
            alpha = alpha.view(-1, 1) if isinstance(alpha, torch.Tensor) else alpha
            return self.inside(x_adv + alpha * grad.sign(), x)

        def step_(self, x_adv, x, grad, alpha, **_sparsity):
            return x_adv.copy_(self.step(x_adv, x, grad, alpha))

        def project_(self, x_adv, x):
            return x_adv.copy_(self.inside(x_adv, x))

    return FirstHalf.__name__


@pytest.mark.parametrize("kind", [PGD, FGSM, MIM, APGD])
def test_another_norm_is_one_class_that_every_attack_takes(another_norm, kind):
    torch.manual_seed(0)
    x, y, model = torch.rand(6, 8), torch.arange(6) % 3, nn.Linear(8, 3)
    moved = (kind(model, norm=another_norm, eps=0.03)(x, y) - x).abs()
    assert moved[:, 4:].max() == 0
    torch.testing.assert_close(moved[:, :4].amax(1), torch.full((6,), 0.03))
    assert PGDSettings(norm=another_norm, eps=0.1).pgd(3).norm == another_norm
