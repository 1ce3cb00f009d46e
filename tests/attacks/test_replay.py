"""Attacks as CUDA graphs. What decides about recordings is tested anywhere; the graphs themselves need a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from afd.attacks import APGD, MIM, PGD, CaptureWarning, replay
from afd.attacks.piece import Piece
from afd.attacks.watch import new_trace
from afd.errors import InputError


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


def piece_of(samples, rows=None, largest_label=0):
    x, y = torch.zeros(samples, 3), torch.zeros(samples, dtype=torch.int64)
    rows = slice(0, samples) if rows is None else rows
    return Piece(x, y, y, rows, 0, 0, largest_label, new_trace(samples, torch.device("cpu")))


def climb(_piece, x_adv):
    return (x_adv + 1,)


def run(replays, samples=4, name="pgd", model=None, **of_piece):
    piece = piece_of(samples, **of_piece)
    (out,) = replays(name, model or nn.Identity(), climb, piece, on_device(torch.zeros(samples, 3)))
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


def test_pieces_are_recorded_apart_for_they_write_their_own_rows(recordings):
    replays = replay.Replays()
    first, second = slice(0, 4), slice(4, 8)
    assert [run(replays, rows=rows) for rows in (first, second, first, second)] == [1, 1, 100, 100]
    assert recordings.made == 2


def test_rows_that_are_indices_are_not_recorded(recordings):
    replays = replay.Replays()
    assert [run(replays, rows=torch.arange(4)) for _ in range(3)] == [1, 1, 1]
    assert not recordings.made


def test_a_larger_label_is_met_step_by_step_where_the_model_is_asked_for_its_classes(recordings):
    replays = replay.Replays()
    assert [run(replays, largest_label=label) for label in (7, 7, 5, 9, 9, 8)] == [1, 100, 100, 1, 100, 100]
    assert recordings.made == 1

    def refuses(_piece, _x_adv):
        raise ValueError("no such class")

    x_adv = on_device(torch.zeros(4, 3))
    for _ in range(2):  # nor is it known afterwards
        with pytest.raises(ValueError, match="no such class"):
            replays("pgd", nn.Identity(), refuses, piece_of(4, largest_label=10), x_adv)


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
    assert len(replays._known) == replay.KEPT
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
def batch(cuda, monkeypatch):
    """Images and labels; convolutions give equal bits every time, for a step goes by the sign of the gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
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
    assert any(known.recording for known in recorded._replays._known.values())


@pytest.mark.gpu
def test_a_partial_batch_between_full_ones(batch):
    model = net()
    recorded, plain = ATTACKS["pgd"](model), ATTACKS["pgd"](model)
    plain._replays.refused = True
    for rows in (8, 8, 3, 8, 3, 3, 8):
        x, y = batch[0][:rows], batch[1][:rows]
        torch.testing.assert_close(recorded(x, y), plain(x, y), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_pieces_keep_to_their_own_radii_and_rows(batch):
    model, eps = net(), torch.linspace(0, 0.2, 8).cuda()
    recorded = PGD(model, eps=eps, steps=3, piece=3)
    for _ in range(3):
        x_adv = recorded(*batch)
        assert ((x_adv - batch[0]).flatten(1).abs().amax(1) <= eps + 1e-6).all()
        assert recorded.report.evaluations.tolist() == [3] * 8


@pytest.mark.gpu
def test_restarts_on_the_samples_that_are_left_keep_to_their_own_radii(batch):
    attack = APGD(net(), norm="L1", eps=torch.linspace(0, 2, 8).cuda(), steps=10, n_restarts=3, early_stop=True)
    for seed in range(3):
        x_adv = attack(*batch, seed=seed)
        assert ((x_adv - batch[0]).flatten(1).abs().sum(1) <= attack.eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.gpu
def test_a_label_that_the_model_lacks_is_named_though_the_attack_is_recorded(batch):
    x, y = batch
    attack = PGD(net(), eps=0.1, steps=2)
    for _ in range(3):
        attack(x, y)
    y[2] = 5
    with pytest.raises(InputError, match="y holds the label 5"):
        attack(x, y)


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
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    other = PGD(net(), eps=0.1, steps=2)
    assert torch.equal(other(*batch), other(*batch))
    assert not other._replays.refused
