"""Where attacks begin: at random points made from seed, sample and element alone, or at those that a call is given."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from literal_attacks import apgd, ce_at, into_ball, mim, pgd, same_points
from torch import nn

from afd import ops
from afd.attacks import APGD, FGSM, MIM, PGD
from afd.errors import InputError, InputTypeError
from afd.ops import backend

EPS, ALPHA = 0.1, 0.03


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)).to(dtype).eval()


def batch(count=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 2, 6, 6, generator=generator, dtype=dtype), torch.arange(count) % 4


def begun(attack, x, y, **given):
    """What the model is shown first."""
    seen = []
    handle = attack.model[0].register_forward_pre_hook(lambda _, shown: seen.append(shown[0].detach().clone()))
    attack(x, y, **given)
    handle.remove()
    return seen[0]


def uniform(x, seed=0):
    """The draws in (-1, 1) that every start is made from."""
    return ops.random_start(torch.zeros_like(x), eps=1.0, bounds=(-1.0, 1.0), seed=seed)


# --- Random starts --------------------------------------------------------------------------------------------------


def test_a_gaussian_start_is_normal_and_is_shown_as_it_comes():
    x, y = batch(400)
    x[0] = 0.0
    for settings, scale in (({}, 0.001), ({"start_scale": 0.3}, 0.3)):
        normal = (begun(PGD(network(), eps=EPS, init="gaussian", **settings, seed=3), x, y) - x) / scale
        torch.testing.assert_close(normal, math.sqrt(2) * torch.erfinv(uniform(x, 3)), atol=1e-9, rtol=0)
        assert abs(normal.mean()) < 0.02
        assert abs(normal.square().mean() - 1) < 0.02
        assert abs(normal.pow(4).mean() - 3) < 0.15
        assert normal[0].min() < 0  # below the bounds: nothing projects it


def test_a_coin_flip_start_moves_each_element_as_far_up_or_down_as_it_may():
    x, y = batch(400)
    for settings, scale in (({}, EPS), ({"start_scale": 0.04}, 0.04), ({"start_scale": 0.5}, 0.5)):
        start = begun(PGD(network(), eps=EPS, init="coin-flip", **settings, seed=3), x, y)
        sign = uniform(x, 3).sign()
        assert 0.48 < (sign > 0).double().mean() < 0.52
        torch.testing.assert_close(start, into_ball(x + scale * sign, x, EPS), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_a_coin_flip_start_lies_in_other_balls_too(norm):
    x, y = batch()
    start = begun(PGD(network(), norm=norm, eps=0.5, init="coin-flip"), x, y)
    assert ((start - x).flatten(1).norm(p=int(norm[1]), dim=1) <= 0.5 + 1e-12).all()
    assert not start.equal(x)


def test_a_coin_flip_is_as_long_as_each_sample_may():
    x, y = batch()
    eps = torch.linspace(0.0, 0.2, 9, dtype=torch.float64)
    start = begun(PGD(network(), eps=eps, init="coin-flip", bounds=(-1.0, 2.0)), x, y)
    torch.testing.assert_close((start - x).abs(), eps.view(-1, 1, 1, 1).expand_as(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["gaussian", "coin-flip"])
def test_starts_are_the_same_for_any_split_of_the_batch_and_any_backend(init, dtype):
    x, y = batch(67, dtype)
    attack = PGD(network(dtype), eps=EPS, steps=0, init=init, start_scale=0.2, validate=False)
    whole = attack(x, y, seed=7)
    for rows in (slice(0, 1), slice(1, 30), slice(30, 67)):
        assert attack(x[rows], y[rows], seed=7, first_sample=rows.start).equal(whole[rows])
    assert attack(x, y, seed=torch.tensor(7)).equal(whole)
    assert not attack(x, y, seed=8).equal(whole)
    assert PGD(network(dtype), eps=EPS, steps=0, init=init, start_scale=0.2, chunk_size=10)(x, y, seed=7).equal(whole)
    with backend.use("reference"):
        assert attack(x, y, seed=7).equal(whole)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("init", ["gaussian", "coin-flip"])
def test_the_result_lies_in_ball_and_bounds_with_any_number_of_steps(init, norm, steps):
    x, y = batch()
    x[0], x[1] = 0.0, 1.0
    found = PGD(network(), norm=norm, eps=0.2, alpha=0.1, init=init, start_scale=1.0, steps=steps)(x, y)
    order = {"Linf": math.inf, "L2": 2, "L1": 1}[norm]
    assert ((found - x).flatten(1).norm(p=order, dim=1) <= 0.2 + 1e-12).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.equal(x)


def test_equals_the_released_inner_loop_of_trades():
    x, y = batch()
    model = network()
    p = F.softmax(model(x), 1).detach()

    def at(x_adv):
        x_adv = x_adv.detach().requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(x_adv), 1), p, reduction="sum")
        return torch.autograd.grad(divergence, x_adv)[0], None, None

    start = x + 0.001 * math.sqrt(2) * torch.erfinv(uniform(x, 5))
    expected = pgd(at, x, start, 0.031, 0.007, 10)
    attack = PGD(network(), loss="kl", eps=0.031, alpha=0.007, init="gaussian", seed=5)
    torch.testing.assert_close(attack(x), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(attack(x, y), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(attack(x, target=model(x)), expected, atol=1e-9, rtol=0)


# --- A start that is given ------------------------------------------------------------------------------------------


def given_start(x):
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)


def test_a_start_that_is_given_is_begun_from_as_it_is():
    x, y = batch()
    start = given_start(x)
    kept, at = start.clone(), ce_at(network())
    expected = pgd(lambda z: at(z, y), x, start, EPS, ALPHA, 5)
    for attack in (PGD(network(), eps=EPS, alpha=ALPHA, steps=5, random_start=own) for own in (True, False)):
        torch.testing.assert_close(attack(x, y, start=start), expected, atol=1e-12, rtol=0)
        assert attack.perturb(x, y, start=start).equal(attack(x, y, start=start))
        assert begun(attack, x, y, start=start).equal(start)
    by_momentum = mim(lambda z: at(z, y), x, start, EPS, ALPHA, 5)
    found = MIM(network(), eps=EPS, alpha=ALPHA, steps=5)(x, y, start=start)
    torch.testing.assert_close(found, by_momentum, atol=1e-12, rtol=0)
    by_one_step = pgd(lambda z: at(z, y), x, start, EPS, EPS, 1)
    torch.testing.assert_close(FGSM(network(), eps=EPS)(x, y, start=start), by_one_step, atol=1e-12, rtol=0)
    assert start.equal(kept)


def test_auto_pgd_projects_it_and_takes_the_other_restarts_from_elsewhere():
    x, y = batch()
    model = network()
    start, clean, at = given_start(x), model(x), ce_at(network())
    expected = apgd(lambda z: at(z, y), x, y, clean, into_ball(start, x, EPS), EPS, 9)
    same_points(APGD(model, eps=EPS, steps=9)(x, y, start=start), expected)
    seen = []
    model[0].register_forward_pre_hook(lambda _, shown: seen.append(shown[0].detach().clone()))
    APGD(model, eps=EPS, steps=0, n_restarts=2)(x, y, start=start)
    assert seen[1].equal(into_ball(start, x, EPS))
    assert seen[2].equal(ops.random_start(x, eps=EPS, seed=1))


def test_each_chunk_begins_where_its_rows_are_told_to():
    x, y = batch(30)
    start = given_start(x)
    attack = PGD(network(), eps=EPS, alpha=ALPHA, steps=2, chunk_size=8)
    expected = PGD(network(), eps=EPS, alpha=ALPHA, steps=2, chunk_size=30)(x, y, start=start)
    torch.testing.assert_close(attack(x, y, start=start), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [PGD, MIM])
def test_without_a_step_a_start_is_projected(kind):
    x, y = batch()
    start = given_start(x)
    assert kind(network(), eps=EPS, steps=0)(x, y, start=start).equal(into_ball(start, x, EPS))


def test_a_divergence_needs_a_start_that_is_not_the_image():
    x, _ = batch()
    start = given_start(x)
    for attack in (
        PGD(network(), loss="kl", random_start=False),
        MIM(network(), loss="kl"),
        FGSM(network(), loss="kl"),
    ):
        with pytest.raises(
            InputError, match=r"loss is 'kl', whose gradient .* is 0; it needs a random start, or start="
        ):
            attack(x)
        assert not attack(x, start=start).equal(x)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (lambda x: x[:3], InputError, r"start has shape \[3, 2, 6, 6\]; it must match x, \[9, 2, 6, 6\]"),
        (lambda x: x.float(), InputTypeError, r"start is torch\.float32; it must have x's dtype, torch\.float64"),
        (lambda x: x.tolist(), InputTypeError, "start is a list; it must be a torch.Tensor"),
        (lambda x: x * torch.nan, InputError, "start holds values that are not finite"),
        (lambda x: x / 0, InputError, "start holds values that are not finite"),
    ],
)
def test_a_start_that_is_none_is_named(start, error, message):
    x, y = batch()
    with pytest.raises(error, match=message):
        PGD(network())(x, y, start=start(x))
