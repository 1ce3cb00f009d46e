"""Radii and step sizes that are numbers on the device: read there at every call, and by a recording at every replay."""

from __future__ import annotations

import pytest
import torch
from recorded_attacks import images, net, replays
from torch.utils._python_dispatch import TorchDispatchMode

from afd.attacks import APGD, FGSM, MIM, PGD, MIMSettings, PGDSettings
from afd.attacks.inputs import Chunk
from afd.errors import InputError, InputTypeError

RADII = {"Linf": (8 / 255, 20 / 255), "L2": (0.5, 1.1), "L1": (6.0, 2.3)}
KINDS = {
    "pgd": lambda model, eps, norm, **more: PGD(model, norm=norm, eps=eps, alpha=eps, steps=4, **more),
    "pgd, a step size of the radius": lambda model, eps, norm, **more: PGD(
        model, norm=norm, eps=eps, alpha=None, steps=4, **more
    ),
    "pgd targeted": lambda model, eps, norm, **more: PGD(
        model, norm=norm, eps=eps, alpha=eps, steps=4, targeted=True, **more
    ),
    "pgd coin-flip": lambda model, eps, norm, **more: PGD(model, norm=norm, eps=eps, steps=2, init="coin-flip", **more),
    "fgsm": lambda model, eps, norm, **more: FGSM(model, norm=norm, eps=eps, **more),
    "mim": lambda model, eps, norm, **more: MIM(model, norm=norm, eps=eps, alpha=None, steps=4, **more),
    "apgd": lambda model, eps, norm, **more: APGD(model, norm=norm, eps=eps, steps=12, n_restarts=2, **more),
    "apgd early": lambda model, eps, norm, **more: APGD(model, norm=norm, eps=eps, steps=12, early_stop=True, **more),
}
each_kind, each_norm = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("norm", RADII)


@each_norm
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_for_bit_the_same_as_the_numbers(kind, norm, dtype):
    x, y = images()
    live = torch.zeros((), dtype=dtype)
    attack = KINDS[kind](net(), live, norm, chunk_size=5)
    for number in RADII[norm]:
        live.fill_(number)
        expected = KINDS[kind](net(), live.item() if dtype == torch.float32 else number, norm, chunk_size=5)(x, y)
        assert attack(x, y).equal(expected)
        assert not expected.equal(x)


@each_norm
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "apgd early"])
def test_a_recording_follows_them_and_no_other_is_made(kind, norm, tapes):
    x, y = images()
    live = torch.tensor(RADII[norm][0])
    attack = KINDS[kind](net(), live, norm)
    for count in range(5):
        live.fill_(RADII[norm][count % 2] * (1 + count / 10))
        plain = KINDS[kind](net(), live.item(), norm)
        plain.own_graphs = False
        assert attack(x, y).equal(plain(x, y))
    assert tapes
    assert len(tapes) <= 3  # those of one call: the steps of different radii in L1
    assert min(replays(tapes)) >= 4


def test_the_name_of_a_recording_holds_the_place_and_not_the_value():
    live, other = torch.tensor(0.1), torch.tensor(0.1)
    attack = PGD(net(), eps=live, alpha=None)
    before = tuple(attack.settings())
    live.fill_(0.2)
    assert tuple(attack.settings()) == before
    attack.eps = other
    assert tuple(attack.settings()) != before


class NoWait(TorchDispatchMode):
    """No value is read back to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "apgd early"])
def test_reading_them_does_not_wait(kind):
    x, y = images()
    attack = KINDS[kind](net(), torch.tensor(0.1), "Linf", validate=False)
    with NoWait():
        attack(x, y)


def test_elsewhere_they_are_the_numbers_that_they_are_at_a_call():
    live = torch.tensor(0.25)
    x = torch.zeros(3, 2, device="meta")
    chunk = Chunk(x, None, slice(0, 3), True, 0, 0, -1, None)
    assert chunk.of(live) == 0.25
    assert chunk.of(live, -2.0) == -0.5
    assert chunk.of(torch.tensor(0.25, device="meta")).shape == (3,)
    model = net().to("meta")
    attack = PGD(model, eps=live)
    before = tuple(attack.settings())
    live.fill_(0.5)
    assert tuple(attack.settings()) != before


def test_settings_hand_them_on():
    x, y = images()
    live = torch.tensor(0.1)
    attacks = [kind(eps=live, steps=3).build(net()) for kind in (PGDSettings, MIMSettings)]
    attacks.append(PGDSettings(eps=live, steps=3).pgd(5).build(net()))
    live.fill_(0.05)
    for attack in attacks:
        assert (attack(x, y) - x).abs().max() <= 0.05 + 1e-7


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor(-0.1), InputError, r"eps is -0\.1.*; it must be a finite number >= 0"),
        (torch.tensor(torch.nan), InputError, "eps is nan; it must be a finite number >= 0"),
        (torch.tensor(True), InputTypeError, "eps is True; it must be a number"),
        (torch.zeros(2, 2), InputError, r"eps has shape \[2, 2\]; it must be a number, or one per sample"),
    ],
)
def test_wrong_values_are_named_when_they_are_set(value, error, message):
    for make in (lambda: PGD(net(), eps=value), lambda: PGDSettings(eps=value)):
        with pytest.raises(error, match=message):
            make()
