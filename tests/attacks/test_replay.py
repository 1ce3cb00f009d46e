"""Attacks as CUDA graphs. What decides about recordings is tested anywhere; the graphs themselves need a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from afd.attacks import APGD, MIM, PGD, CaptureWarning, replay
from afd.attacks.piece import Piece
from afd.attacks.watch import new_trace


class OnDevice(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def on_device(values):
    return torch.Tensor._make_subclass(OnDevice, values)


class FakeRecording:
    """Counts instead of capturing."""

    made, played = 0, 0

    @classmethod
    def of(cls, _climb, _piece, _x_adv):
        cls.made += 1
        return cls()

    def play(self, _piece, x_adv):
        type(self).played += 1
        return (x_adv + 100,)


@pytest.fixture
def recordings(monkeypatch):
    class Fresh(FakeRecording):
        made, played = 0, 0

    monkeypatch.setattr(replay, "Recording", Fresh)
    return Fresh


def piece_of(samples):
    x, y = torch.zeros(samples, 3), torch.zeros(samples, dtype=torch.int64)
    return Piece(x, y, y, slice(0, samples), 0, 0, 0, new_trace(samples, torch.device("cpu")))


def climb(_piece, x_adv):
    return (x_adv + 1,)


def run(replays, samples=4, name="pgd", model=None):
    (out,) = replays(name, model or nn.Identity(), climb, piece_of(samples), on_device(torch.zeros(samples, 3)))
    return float(out[0, 0])


def test_a_shape_is_recorded_the_second_time_and_then_replayed(recordings):
    replays = replay.Replays()
    assert [run(replays) for _ in range(4)] == [1, 100, 100, 100]
    assert (recordings.made, recordings.played) == (1, 3)


def test_partial_batches_and_other_settings_are_recorded_apart(recordings):
    replays = replay.Replays()
    results = [run(replays), run(replays, samples=3), run(replays), run(replays, name="other"), run(replays, samples=3)]
    assert results == [1, 1, 100, 1, 100]
    assert recordings.made == 2


def test_weights_may_change_but_not_move(recordings):
    replays, model = replay.Replays(), nn.Linear(3, 3)
    run(replays, model=model), run(replays, model=model)
    with torch.no_grad():
        model.weight.mul_(2)
    assert run(replays, model=model) == 100
    model.weight = nn.Parameter(model.weight.clone())
    assert run(replays, model=model) == 1
    assert recordings.made == 1


def test_old_recordings_make_room(recordings):
    replays = replay.Replays()
    for samples in range(1, 2 + replay.KEPT):
        run(replays, samples=samples), run(replays, samples=samples)
    assert recordings.made == replay.KEPT + 1
    assert len(replays._recordings) == replay.KEPT
    assert run(replays, samples=1) == 1


def test_a_failed_capture_is_told_once_and_the_attack_goes_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay.Recording, "of", fail)
    replays = replay.Replays()
    assert run(replays) == 1
    with pytest.warns(CaptureWarning, match="without a CUDA graph, because recording one failed: operation not perm"):
        assert run(replays) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run(replays), run(replays, samples=9)] == [1, 1]


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
    ):
        names.add(tuple(attack._settings()))
    assert len(names) == 9
    attack = PGD(model, eps=0.1)
    before = tuple(attack._settings())
    attack.eps = 0.3
    assert tuple(attack._settings()) != before


# --- On a GPU -------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 5),
    ).cuda()  # fmt: skip


ATTACKS = {
    "pgd": lambda model: PGD(model, eps=0.1, alpha=0.03, steps=4),
    "pgd l2 per sample": lambda model: PGD(model, norm="L2", eps=torch.linspace(0, 1, 8).cuda(), alpha=0.2, steps=4),
    "pgd l1 bf16": lambda model: PGD(model, norm="L1", eps=5.0, alpha=1.0, steps=4, precision="bf16"),
    "mim": lambda model: MIM(model, eps=0.1, steps=4),
    "apgd": lambda model: APGD(model, eps=0.1, steps=8, n_restarts=2),
    "apgd l1": lambda model: APGD(model, norm="L1", eps=5.0, steps=10),
    "kl": lambda model: PGD(model, loss="kl", eps=0.1, steps=3),
}


@pytest.fixture
def batch(cuda):
    torch.manual_seed(1)
    return torch.rand(8, 3, 8, 8).to(cuda), torch.randint(5, (8,)).to(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_replays_equal_the_steps_one_by_one(name, batch):
    model = net()
    recorded, plain = ATTACKS[name](model), ATTACKS[name](model)
    plain._replays.refused = True
    for seed in range(4):
        x, y = batch[0].roll(seed, 0), batch[1].roll(seed, 0)
        torch.testing.assert_close(recorded(x, y, seed=seed), plain(x, y, seed=seed), atol=1e-5, rtol=0)
        assert torch.equal(recorded.report.evaluations, plain.report.evaluations)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert not recorded._replays.refused
    assert any(recorded._replays._recordings.values())


@pytest.mark.gpu
def test_a_partial_batch_between_full_ones(batch):
    model = net()
    recorded, plain = ATTACKS["pgd"](model), ATTACKS["pgd"](model)
    plain._replays.refused = True
    for rows in (8, 8, 3, 8, 3, 3, 8):
        x, y = batch[0][:rows], batch[1][:rows]
        torch.testing.assert_close(recorded(x, y), plain(x, y), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_no_wait_for_the_device_between_first_and_last_step(name, batch):
    model = net()
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
def test_a_model_that_waits_cannot_be_recorded_and_is_attacked_all_the_same(batch):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.sum()) > 0 else 2.0)

    attack = PGD(Waits(), eps=0.1, steps=2)
    first = attack(*batch)
    with pytest.warns(CaptureWarning):
        second = attack(*batch)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(attack(*batch), first, atol=1e-5, rtol=0)
