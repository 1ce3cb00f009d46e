"""Attacks as CUDA graphs, for which tapes stand, that repeat the ops of their capture: what is captured."""

from __future__ import annotations

import pytest
import torch
from recorded_attacks import ATTACKS, eagerly, images, net, replays
from torch import nn

from afd import graphs
from afd.attacks import APGD, PGD, CaptureWarning
from afd.errors import InputError


@pytest.mark.parametrize("name", ATTACKS)
def test_replays_are_the_eager_steps_bit_for_bit(name, tapes, quiet):
    model = net()
    captured, plain = ATTACKS[name](model), eagerly(ATTACKS[name](model))
    for seed in range(4):
        x, y = images(seed=seed)
        assert torch.equal(captured(x, y, seed=seed), plain(x, y, seed=seed))
        assert torch.equal(captured.report.evaluations, plain.report.evaluations)
        assert torch.equal(captured.report.zero_gradients, plain.report.zero_gradients)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert tapes
    assert all(replays(tapes))


def test_a_shape_is_captured_the_second_time_and_then_replayed(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for rows in (8, 3, 8, 8, 3, 8):
        attack(x[:rows], y[:rows])
    assert replays(tapes) == [3, 1]


def test_other_settings_are_captured_apart(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for eps in (0.1, 0.1, 0.2, 0.2, 0.1):
        attack.eps = eps
        attack(x, y)
    assert replays(tapes) == [2, 1]


def test_pieces_are_captured_apart_for_they_write_their_own_rows(tapes):
    model, (x, y), eps = net(), images(), torch.linspace(0, 0.2, 8)
    captured, plain = (PGD(model, eps=eps, steps=3, chunk_size=3) for _ in range(2))
    eagerly(plain)
    for _ in range(3):
        assert torch.equal(captured(x, y), plain(x, y))
    assert replays(tapes) == [2, 2, 2]


def test_rows_that_are_indices_are_not_captured(tapes):
    attack = APGD(net(), eps=0.1, steps=4, n_restarts=2, early_stop=True)
    for _ in range(3):
        attack(*images())
    assert not tapes


def test_a_larger_label_is_met_eagerly_where_the_model_is_asked_for_its_classes(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for largest in (3, 3, 2, 4, 4, 3):
        attack(x, y.clamp(max=largest))
    assert replays(tapes) == [4]
    for _ in range(2):  # nor is it known afterwards
        with pytest.raises(InputError, match="y holds the label 5"):
            attack(x, y.clamp(min=5))


def test_weights_may_change_but_not_move(tapes):
    model, (x, y) = net(), images()
    attack, plain = ATTACKS["pgd"](model), eagerly(ATTACKS["pgd"](model))
    for _ in range(2):
        attack(x, y)
    with torch.no_grad():
        model[5].weight.mul_(2)
    assert torch.equal(attack(x, y), plain(x, y))
    model[5].weight = nn.Parameter(-model[5].weight)
    assert torch.equal(attack(x, y), plain(x, y))
    assert replays(tapes) == [2]


def test_graphs_used_longest_ago_make_room(tapes):
    attack, (x, y) = ATTACKS["pgd"](net()), images()
    for rows in range(1, 2 + graphs.KEPT):
        attack(x[:rows], y[:rows]), attack(x[:rows], y[:rows])
    assert replays(tapes) == [1] * (graphs.KEPT + 1)
    assert len(attack._graphs.cache._entries) == graphs.KEPT
    attack(x[:1], y[:1])
    assert replays(tapes) == [1] * (graphs.KEPT + 1)


def test_a_failed_capture_is_told_once_and_the_attack_goes_on(tapes, quiet):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.detach().sum()) > 0 else 2.0)

    attack, (x, y) = PGD(Waits(), eps=0.1, steps=2), images()
    first = attack(x, y)
    with pytest.warns(CaptureWarning, match="without a CUDA graph, because its capture failed: operation not perm"):
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
