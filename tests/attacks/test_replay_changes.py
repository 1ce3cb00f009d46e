"""What Python holds and a graph does not see: what changes makes another capture, or is found by its logits."""

from __future__ import annotations

import gc
import itertools
import warnings

import pytest
import torch
from recorded_attacks import ATTACKS, Scaled, eagerly, images, net, replays
from torch import nn

from afd import graphs
from afd.attacks import APGD, PGD, CaptureWarning, replay


def hooked(model):
    model.inner[2].register_forward_hook(lambda _layer, _given, out: out * torch.linspace(0, 1, 16)[:, None, None])


CHANGES = {
    "a number": lambda model: setattr(model, "scale", -3.0),
    "None": lambda model: setattr(model, "temperature", -2),
    "a list": lambda model: model.factors.__setitem__(0, -5.0),
    "an object": lambda model: setattr(model.config, "power", 3),
    "an object in an object": lambda model: setattr(model.config.inner, "factor", -1.0),
    "a layer's attribute": lambda model: setattr(model.inner[1], "eps", 10.0),
    "a hook": hooked,
    "a tensor": lambda model: setattr(model, "tensor", torch.tensor([3.0, -1, 2, 0, 1])),
    "a layer": lambda model: model.inner.__setitem__(2, nn.Tanh()),
    "a forward": lambda model: setattr(model.inner[2], "forward", torch.tanh),
    "a function of the class": lambda _: setattr(Scaled, "forward", lambda self, x: -self.inner(x)),
}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_python_makes_between_calls_is_seen(change, fold, tapes, monkeypatch, quiet):
    monkeypatch.setattr(Scaled, "forward", Scaled.forward)  # as it was, afterwards
    model, (x, y) = Scaled(), images()
    captured, plain = (PGD(model, eps=0.1, steps=3, fold_batchnorm=fold) for _ in range(2))
    eagerly(plain)
    before = [captured(x, y) for _ in range(3)]
    assert replays(tapes) == [2]
    CHANGES[change](model)
    expected = plain(x, y)
    assert not torch.equal(expected, before[0])
    for _ in range(3):
        assert torch.equal(captured(x, y), expected)
    assert replays(tapes)[1:] in ([1], [2]), "and is captured anew"


FLAGS = {
    "tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "deterministic": lambda on: setattr(torch.backends.cudnn, "deterministic", on),
    "autocast": lambda on: torch.set_autocast_enabled("cuda", on),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_torch_makes_a_capture_of_its_own(flag, tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    try:
        for on in (False, False, True, True, False):
            FLAGS[flag](on)
            attack(x, y)
    finally:
        FLAGS[flag](False)
    assert replays(tapes) == [2, 1]


def outside(factor):
    """A model whose logits hang on a number in a closure."""

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) * factor[0]

    return Closure()


def test_what_changes_outside_of_a_model_is_found_by_its_logits(tapes, quiet):
    factor, (x, y) = [1.0], images()
    model = outside(factor)
    captured, plain = ATTACKS["apgd"](model), eagerly(ATTACKS["apgd"](model))
    for number in (1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 3.0, 3.0, 3.0):
        factor[0] = number
        assert torch.equal(captured(x, y), plain(x, y)), number
        assert torch.equal(captured.report.evaluations, plain.report.evaluations)
    assert not captured._graphs.cache.refused
    assert len(tapes) == 3


def test_without_a_look_it_is_told_at_the_next_call(tapes, quiet):
    factor, (x, y) = [1.0], images()
    model = outside(factor)
    captured = PGD(model, eps=0.1, steps=3, validate=False)
    plain = eagerly(PGD(model, eps=0.1, steps=3, validate=False))
    for _ in range(3):
        captured(x, y)
    factor[0] = -2.0
    assert not torch.equal(captured(x, y), plain(x, y))
    with pytest.warns(CaptureWarning, match="an earlier call of this attack replayed a graph in which the model gave"):
        assert torch.equal(captured(x, y), plain(x, y))
    for _ in range(2):
        assert torch.equal(captured(x, y), plain(x, y))


def test_a_model_that_draws_at_random_is_attacked_eagerly_and_it_is_said(tapes):
    model, (x, y) = nn.Sequential(net(), nn.Dropout()), images()
    model[1].forward = lambda logits: torch.nn.functional.dropout(logits, 0.3, training=True)
    attack = PGD(model, eps=0.1, steps=3)
    for _ in range(3):
        attack(x, y)
    with pytest.warns(CaptureWarning, match="not those of its replay, time and again: it draws at random, or dep"):
        attack(x, y)
    assert attack._graphs.cache.refused
    assert len(tapes) == replay.MOST_DROPS
    points = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        points.append(attack(x, y))
    assert torch.equal(points[0], points[1])
    assert not torch.equal(points[0], points[2])


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_sometimes_gives_the_same_logits_again_does_not_go_on_for_ever(seed, tapes):
    """Restarts of one call share a graph, and some of its replays are right by chance: one repetition is enough."""
    factors = itertools.cycle([[1.0, 1.3], [1.3, 1.0, 1.0], [1.0, 1.0, 1.3]][seed])

    class Alternates(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) * next(factors)

    attack, (x, y) = APGD(Alternates(), eps=0.1, steps=3, n_restarts=8), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        for _ in range(3):
            attack(x, y)
    assert len(tapes) <= 2 * replay.MOST_DROPS


def test_radii_of_samples_are_followed_where_they_lie(tapes, quiet):
    x, y = images()
    several = torch.linspace(0.01, 0.3, 16)
    attack, plain = (PGD(net(), eps=0.1, alpha=0.05, steps=3) for _ in range(2))
    eagerly(plain)
    for eps in (several[:8], several[::2], several[:1].expand(8), several[8:]):
        for _ in range(3):
            attack.eps = plain.eps = eps
            assert torch.equal(attack(x, y), plain(x, y))
    several.mul_(0.5)
    assert torch.equal(attack(x, y), plain(x, y))
    assert replays(tapes) == [2, 2, 2, 3]


def test_of_many_pieces_as_many_are_captured_as_are_kept(tapes):
    """And are not driven out by the others of the same call, to be captured again in the next."""
    attack, (x, y) = PGD(net(), eps=0.1, steps=2, chunk_size=1), images()
    for _ in range(4):
        attack(x, y)
    assert replays(tapes) == [3] * graphs.KEPT


def test_a_model_that_differentiates_in_its_forward_is_captured(tapes, quiet):
    class Purifies(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (step,) = torch.autograd.grad(self.inner(y).square().sum(), y)
            return self.inner(x - 0.01 * step)

    model, (x, y) = Purifies(), images()
    attack, plain = PGD(model, eps=0.1, steps=2), eagerly(PGD(model, eps=0.1, steps=2))
    for _ in range(3):
        assert torch.equal(attack(x, y), plain(x, y))
    assert replays(tapes) == [2]


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_model_keeps_of_a_forward_is_never_memory_that_nobody_has_written(waits, tapes):
    """A capture computes nothing, whether it goes well or fails: here it leaves NaN in all that it makes."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mean, self.seen, self.calls = net(), torch.zeros(3, 8, 8), [], 0

        def forward(self, x):
            self.mean, self.calls = 0.9 * self.mean + 0.1 * x.detach().mean(0), self.calls + 1
            self.seen.append(self.mean)
            logits = self.inner(x)
            return logits * (1.0 if not waits or float(logits.detach().sum()) < 1e9 else 2.0)

    model, (x, y) = Keeps(), images()
    attack = PGD(model, eps=0.1, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        for _ in range(3):
            assert attack(x, y).isfinite().all()
    assert model.mean.isfinite().all()
    assert all(seen.isfinite().all() for seen in model.seen)
    assert model.calls == len(model.seen) == (6 if waits else 4)


def test_counters_and_kept_activations_are_no_reason_for_another_capture(tapes, quiet):
    class Counts(Scaled):
        calls, nothing = 0, float("nan")

        def forward(self, x):
            self.calls += 1
            self.nothing = float("nan")
            self.seen = self.inner[0](x)
            return super().forward(x)

    attack, (x, y) = PGD(Counts(), eps=0.1, steps=3), images()
    for _ in range(5):
        attack(x, y)
    assert replays(tapes) == [4]


def test_each_call_costs_one_forward_of_the_model_and_keeps_nothing_of_it(tapes):
    model, (x, y) = net(), images()
    attack, seen = PGD(model, eps=0.1, steps=10), []
    model.register_forward_pre_hook(lambda _, given: seen.append((torch.is_grad_enabled(), given[0].requires_grad)))
    for _ in range(3):
        attack(x, y)
    seen.clear()
    attack(x, y)
    assert seen == [(True, True)], "as in a step"
    gc.collect()
    assert not attack._graphs._compared


def test_logits_differ_by_more_than_rounding():
    logits = torch.tensor([[1.0, -2.0], [float("nan"), 0.5]])
    near, far = logits * (1 + 1e-6), logits.clone()
    far[1, 1] = 0.6
    assert not replay.differ(near, logits, 1e-4)
    assert replay.differ(far, logits, 0.1), "another sample's larger logits hide nothing"
    assert not replay.differ(far, logits, 0.3)
    assert replay.differ(logits.nan_to_num(), logits, 0.1)
    assert replay.differ(logits[:, :1], logits, 0.1)
    assert not replay.differ(torch.full((2, 2), float("inf")), torch.full((2, 2), float("inf")), 0.1)
