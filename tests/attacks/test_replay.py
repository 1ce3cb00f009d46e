"""Attacks as CUDA graphs. On the CPU a tape stands for a graph: it repeats the ops it was recorded with."""

from __future__ import annotations

import gc
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd.attacks import APGD, MIM, PGD, CaptureWarning, base, replay
from afd.errors import InputError


@pytest.fixture
def tapes(tape, monkeypatch):
    """Graphs of attacks are tapes, on any device; returns those that were recorded."""
    made = []

    def recorded(_device):
        made.append(tape.Tape())
        return made[-1]

    monkeypatch.setattr(replay, "Graph", recorded)
    for module in (base, replay):
        monkeypatch.setattr(module, "recordable", lambda _: not tape.Tape.recording)
    return made


def net(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 5),
    ).to(device)  # fmt: skip


class Scaled(nn.Module):
    """A model whose logits hang on what is set of it."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.scale, self.factors, self.temperature = 1.0, [1.0], None
        self.config = SimpleNamespace(power=1, inner=SimpleNamespace(factor=1.0))
        self.tensor = torch.ones(5)

    def forward(self, x):
        logits = self.inner(x) * self.scale * self.factors[0] / (self.temperature or 1)
        return logits**self.config.power * self.config.inner.factor * self.tensor


def radii(model):
    return torch.linspace(0, 1, 8, device=model[5].weight.device)


ATTACKS = {
    "pgd": lambda model: PGD(model, eps=0.1, alpha=0.03, steps=4),
    "pgd l2 per sample": lambda model: PGD(model, norm="L2", eps=radii(model), alpha=0.2, steps=4),
    "pgd l1 bf16": lambda model: PGD(model, norm="L1", eps=5.0, alpha=1.0, steps=4, precision="bf16"),
    "mim": lambda model: MIM(model, eps=0.1, steps=4),
    "apgd": lambda model: APGD(model, eps=0.1, steps=8, n_restarts=2),
    "apgd l1": lambda model: APGD(model, norm="L1", eps=5.0, steps=10),
    "kl": lambda model: PGD(model, loss="kl", eps=0.1, steps=3),
}


def images(device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 3, 8, 8, generator=generator)
    return x.to(device), torch.randint(5, (8,), generator=generator).to(device)


def step_by_step(attack):
    attack._replays.refused = True
    return attack


def replays(tapes):
    return [one.replays for one in tapes]


@pytest.fixture
def quiet():
    """No warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- What is recorded, and when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_replays_are_the_steps_one_by_one_bit_for_bit(name, tapes, quiet):
    model = net()
    recorded, plain = ATTACKS[name](model), step_by_step(ATTACKS[name](model))
    for seed in range(4):
        x, y = images(seed=seed)
        assert torch.equal(recorded(x, y, seed=seed), plain(x, y, seed=seed))
        assert torch.equal(recorded.report.evaluations, plain.report.evaluations)
        assert torch.equal(recorded.report.zero_gradients, plain.report.zero_gradients)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert tapes
    assert all(replays(tapes))


def test_a_shape_is_recorded_the_second_time_and_then_replayed(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for rows in (8, 3, 8, 8, 3, 8):
        attack(x[:rows], y[:rows])
    assert replays(tapes) == [3, 1]


def test_other_settings_are_recorded_apart(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for eps in (0.1, 0.1, 0.2, 0.2, 0.1):
        attack.eps = eps
        attack(x, y)
    assert replays(tapes) == [2, 1]


def test_pieces_are_recorded_apart_for_they_write_their_own_rows(tapes):
    model, (x, y), eps = net(), images(), torch.linspace(0, 0.2, 8)
    recorded, plain = (PGD(model, eps=eps, steps=3, piece=3) for _ in range(2))
    step_by_step(plain)
    for _ in range(3):
        assert torch.equal(recorded(x, y), plain(x, y))
    assert replays(tapes) == [2, 2, 2]


def test_rows_that_are_indices_are_not_recorded(tapes):
    attack = APGD(net(), eps=0.1, steps=4, n_restarts=2, early_stop=True)
    for _ in range(3):
        attack(*images())
    assert not tapes


def test_a_larger_label_is_met_step_by_step_where_the_model_is_asked_for_its_classes(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for largest in (3, 3, 2, 4, 4, 3):
        attack(x, y.clamp(max=largest))
    assert replays(tapes) == [4]
    for _ in range(2):  # nor is it known afterwards
        with pytest.raises(InputError, match="y holds the label 5"):
            attack(x, y.clamp(min=5))


def test_weights_may_change_but_not_move(tapes):
    model, (x, y) = net(), images()
    attack, plain = ATTACKS["pgd"](model), step_by_step(ATTACKS["pgd"](model))
    for _ in range(2):
        attack(x, y)
    with torch.no_grad():
        model[5].weight.mul_(2)
    assert torch.equal(attack(x, y), plain(x, y))
    model[5].weight = nn.Parameter(-model[5].weight)
    assert torch.equal(attack(x, y), plain(x, y))
    assert replays(tapes) == [2]


def test_old_recordings_make_room(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for rows in range(1, 2 + replay.KEPT):
        attack(x[:rows], y[:rows]), attack(x[:rows], y[:rows])
    assert replays(tapes) == [1] * (replay.KEPT + 1)
    assert len(attack._replays._known) == replay.KEPT
    attack(x[:1], y[:1])
    assert replays(tapes) == [1] * (replay.KEPT + 1)


def test_a_failed_capture_is_told_once_and_the_attack_goes_on(tapes, quiet):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.detach().sum()) > 0 else 2.0)

    attack, (x, y) = PGD(Waits(), eps=0.1, steps=2), images()
    first = attack(x, y)
    with pytest.warns(CaptureWarning, match="without a CUDA graph, because recording one failed: operation not perm"):
        assert torch.equal(attack(x, y), first)
    assert torch.equal(attack(x, y), first)
    attack(x[:3], y[:3])


def test_every_setting_of_an_attack_is_part_of_its_name():
    model, eps = nn.Linear(3, 3), torch.full((4,), 0.1)
    names = set()
    for attack in (
        PGD(model, eps=0.1),
        PGD(model, eps=0.2),
        PGD(model, eps=eps),
        PGD(model, eps=0.1, alpha=0.3),
        PGD(model, eps=0.1, steps=3),
        PGD(model, eps=0.1, targeted=True),
        PGD(model, eps=0.1, norm="L2"),
        PGD(model, eps=0.1, precision="bf16"),
        PGD(model, eps=0.1, bounds=(0.0, 2.0)),
        PGD(model, eps=0.1, loss="dlr"),
    ):
        names.add(tuple(attack.settings()))
    assert len(names) == 10
    attack = PGD(model, eps=0.1)
    before = tuple(attack.settings())
    attack.eps = 0.3
    assert tuple(attack.settings()) != before


# --- What Python holds, and a graph does not see ----------------------------------------------------------------------


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
    recorded, plain = (PGD(model, eps=0.1, steps=3, fold=fold) for _ in range(2))
    step_by_step(plain)
    before = [recorded(x, y) for _ in range(3)]
    assert replays(tapes) == [2]
    CHANGES[change](model)
    expected = plain(x, y)
    assert not torch.equal(expected, before[0])
    for _ in range(3):
        assert torch.equal(recorded(x, y), expected)
    assert replays(tapes)[1:] in ([1], [2]), "and is recorded anew"


FLAGS = {
    "tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "deterministic": lambda on: setattr(torch.backends.cudnn, "deterministic", on),
    "autocast": lambda on: torch.set_autocast_enabled("cuda", on),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_torch_makes_a_recording_of_its_own(flag, tapes):
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
    recorded, plain = ATTACKS["apgd"](model), step_by_step(ATTACKS["apgd"](model))
    for number in (1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 3.0, 3.0, 3.0):
        factor[0] = number
        assert torch.equal(recorded(x, y), plain(x, y)), number
        assert torch.equal(recorded.report.evaluations, plain.report.evaluations)
    assert not recorded._replays.refused
    assert len(tapes) == 3


def test_without_a_look_it_is_told_at_the_next_call(tapes, quiet):
    factor, (x, y) = [1.0], images()
    model = outside(factor)
    recorded = PGD(model, eps=0.1, steps=3, look=False)
    plain = step_by_step(PGD(model, eps=0.1, steps=3, look=False))
    for _ in range(3):
        recorded(x, y)
    factor[0] = -2.0
    assert not torch.equal(recorded(x, y), plain(x, y))
    with pytest.warns(CaptureWarning, match="an earlier call of this attack replayed a graph in which the model gave"):
        assert torch.equal(recorded(x, y), plain(x, y))
    for _ in range(2):
        assert torch.equal(recorded(x, y), plain(x, y))


def test_a_model_that_draws_at_random_is_attacked_step_by_step_and_it_is_said(tapes):
    model, (x, y) = nn.Sequential(net(), nn.Dropout()), images()
    model[1].forward = lambda logits: torch.nn.functional.dropout(logits, 0.3, training=True)
    attack = PGD(model, eps=0.1, steps=3)
    for _ in range(3):
        attack(x, y)
    with pytest.warns(CaptureWarning, match="not those of its recording, time and again: it draws at random, or dep"):
        attack(x, y)
    assert attack._replays.refused
    assert len(tapes) == replay.MOST_DROPS
    points = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        points.append(attack(x, y))
    assert torch.equal(points[0], points[1])
    assert not torch.equal(points[0], points[2])


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_sometimes_gives_the_same_logits_again_does_not_go_on_for_ever(seed, tapes):
    """Restarts of one call share a recording, and some of its replays are right by chance: one repetition is enough."""
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
    step_by_step(plain)
    for eps in (several[:8], several[::2], several[:1].expand(8), several[8:]):
        for _ in range(3):
            attack.eps = plain.eps = eps
            assert torch.equal(attack(x, y), plain(x, y))
    several.mul_(0.5)
    assert torch.equal(attack(x, y), plain(x, y))
    assert replays(tapes) == [2, 2, 2, 3]


def test_of_many_pieces_as_many_are_recorded_as_are_kept(tapes):
    """And are not driven out by the others of the same call, to be recorded again in the next."""
    attack, (x, y) = PGD(net(), eps=0.1, steps=2, piece=1), images()
    for _ in range(4):
        attack(x, y)
    assert replays(tapes) == [3] * replay.KEPT


def test_a_model_that_differentiates_in_its_forward_is_recorded(tapes, quiet):
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
    attack, plain = PGD(model, eps=0.1, steps=2), step_by_step(PGD(model, eps=0.1, steps=2))
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


def test_counters_and_kept_activations_are_no_reason_for_another_recording(tapes, quiet):
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
    assert not attack._replays._compared


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


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(cuda, monkeypatch):
    """Images and labels; convolutions give equal bits every time, for a step goes by the sign of the gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return images(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_replays_equal_the_steps_one_by_one(name, batch, cuda):
    model = net(cuda)
    recorded, plain = ATTACKS[name](model), ATTACKS[name](model)
    step_by_step(plain)
    for seed in range(4):
        x, y = batch[0].roll(seed, 0), batch[1].roll(seed, 0)
        torch.testing.assert_close(recorded(x, y, seed=seed), plain(x, y, seed=seed), atol=1e-5, rtol=0)
        assert torch.equal(recorded.report.evaluations, plain.report.evaluations)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert not recorded._replays.refused
    assert any(known.recording for known in recorded._replays._known.values())


@pytest.mark.gpu
def test_a_partial_batch_between_full_ones(batch, cuda):
    model = net(cuda)
    recorded, plain = ATTACKS["pgd"](model), ATTACKS["pgd"](model)
    step_by_step(plain)
    for rows in (8, 8, 3, 8, 3, 3, 8):
        x, y = batch[0][:rows], batch[1][:rows]
        torch.testing.assert_close(recorded(x, y), plain(x, y), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_pieces_keep_to_their_own_radii_and_rows(batch, cuda):
    model, eps = net(cuda), torch.linspace(0, 0.2, 8).cuda()
    recorded = PGD(model, eps=eps, steps=3, piece=3)
    for _ in range(3):
        x_adv = recorded(*batch)
        assert ((x_adv - batch[0]).flatten(1).abs().amax(1) <= eps + 1e-6).all()
        assert recorded.report.evaluations.tolist() == [3] * 8


@pytest.mark.gpu
def test_restarts_on_the_samples_that_are_left_keep_to_their_own_radii(batch, cuda):
    attack = APGD(net(cuda), norm="L1", eps=torch.linspace(0, 2, 8).cuda(), steps=10, n_restarts=3, early_stop=True)
    for seed in range(3):
        x_adv = attack(*batch, seed=seed)
        assert ((x_adv - batch[0]).flatten(1).abs().sum(1) <= attack.eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.gpu
def test_a_label_that_the_model_lacks_is_named_though_the_attack_is_recorded(batch, cuda):
    x, y = batch
    attack = PGD(net(cuda), eps=0.1, steps=2)
    for _ in range(3):
        attack(x, y)
    y[2] = 5
    with pytest.raises(InputError, match="y holds the label 5"):
        attack(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_no_wait_for_the_device_between_first_and_last_step(name, batch, cuda):
    model = net(cuda)
    attack = ATTACKS[name](model)
    attack.look = False
    attack(*batch)  # libraries load
    plain = ATTACKS[name](model)
    plain.look, plain._replays.refused = False, True
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_model_that_waits_cannot_be_recorded_and_is_attacked_all_the_same(batch, cuda):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(cuda)

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.sum()) > 0 else 2.0)

    attack = PGD(Waits(), eps=0.1, steps=2)
    first = attack(*batch)
    with pytest.warns(CaptureWarning):
        second = attack(*batch)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(attack(*batch), first, atol=1e-5, rtol=0)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    other = PGD(net(cuda), eps=0.1, steps=2)
    assert torch.equal(other(*batch), other(*batch))
    assert not other._replays.refused
