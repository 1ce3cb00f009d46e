"""Earlier names of attacks' settings: each says what it is now, and does the same."""

import copy
import dataclasses
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from afd.attacks import APGD, ATTACKS, FGSM, MIM, PGD, PGDSettings
from afd.deprecated import OldSpellingWarning, settings_of_today
from afd.errors import InputError, InputTypeError
from afd.methods import AT
from afd.methods.registry import attack_of, described, made

CLASSES = {"pgd": PGD, "apgd": APGD, "fgsm": FGSM, "mim": MIM}
OLD, NEW = {"piece": 3, "look": False, "fold": False}, {"chunk_size": 3, "validate": False, "fold_batchnorm": False}
NAMES = list(zip(OLD, NEW, strict=True))
each = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(autouse=True)
def other_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


@each
def test_settings_and_attacks_take_them_as_arguments(name):
    said = r"^piece= is now chunk_size=; look= is now validate=; fold= is now fold_batchnorm=$"
    with pytest.warns(OldSpellingWarning, match=said):
        assert ATTACKS[name](eps=0.1, **OLD) == ATTACKS[name](eps=0.1, **NEW)
    with pytest.warns(OldSpellingWarning, match=said):
        attack = CLASSES[name](network(), eps=0.1, **OLD)
    assert {new: getattr(attack, new) for new in NEW} == NEW
    x, y = torch.rand(5, 3, 2, 2), torch.arange(5) % 4
    assert attack(x, y).equal(CLASSES[name](network(), eps=0.1, **NEW)(x, y))


@pytest.mark.parametrize(("old", "new"), NAMES)
@each
def test_they_are_read_and_set_as_attributes(name, old, new):
    settings, attack = ATTACKS[name](**NEW), CLASSES[name](network())
    with pytest.warns(OldSpellingWarning, match=rf"^{type(settings).__name__}\.{old} is now {new}$"):
        assert getattr(settings, old) == NEW[new]
    with pytest.warns(OldSpellingWarning, match=rf"^{type(attack).__name__}\.{old} is now {new}$"):
        setattr(attack, old, NEW[new])
    assert getattr(attack, new) == NEW[new]


def test_they_take_the_place_of_what_settings_say():
    settings = PGDSettings(eps=0.1, chunk_size=7)
    with pytest.warns(OldSpellingWarning):
        assert dataclasses.replace(settings, piece=3).chunk_size == 3
    with pytest.warns(OldSpellingWarning):
        assert settings.build(network(), look=False).validate is False
    with pytest.warns(OldSpellingWarning):
        assert PGD(network(), **settings, piece=3).chunk_size == 3
    with pytest.warns(OldSpellingWarning):
        assert PGD.partial(fold=False)(network()).fold_batchnorm is False


def test_what_they_are_given_is_checked_by_todays_name():
    with pytest.warns(OldSpellingWarning), pytest.raises(InputError, match=r"^chunk_size is 0; it must be an integer"):
        PGD(network(), piece=0)
    with pytest.warns(OldSpellingWarning), pytest.raises(InputTypeError, match=r"^validate is 1; it must be True or"):
        PGDSettings(look=1)
    with pytest.warns(OldSpellingWarning), pytest.raises(InputTypeError, match=r"^pieces is no setting of this attack"):
        PGD(network(), pieces=3, fold=True)


@each
def test_they_are_understood_where_a_file_describes_an_attack(name):
    method = AT(attack=ATTACKS[name](eps=0.1, **NEW))
    today = described(method)
    earlier = copy.deepcopy(today)
    for old, new in NAMES:
        earlier["attack"][old] = earlier["attack"].pop(new)
    with pytest.warns(OldSpellingWarning):
        assert attack_of(earlier["attack"]) == method.attack
    with pytest.warns(OldSpellingWarning):
        assert made(earlier) == method
    assert settings_of_today({"method": earlier}) == {"method": today}
    assert settings_of_today({"method": today}) == {"method": today}
    with pytest.raises(InputError, match="Settings has no setting 'pieces'; it has "):
        attack_of({"name": name, "pieces": 3})


def test_only_todays_names_are_shown():
    for kind in (*ATTACKS.values(), *CLASSES.values()):
        shown = inspect.signature(kind).parameters
        assert NEW.keys() <= shown.keys()
        assert not OLD.keys() & shown.keys()
    assert not OLD.keys() & {**PGDSettings()}.keys()


@pytest.mark.parametrize("first", ["afd.attacks", "afd.deprecated", "afd.methods", "afd.attacks.settings"])
def test_they_are_known_whatever_is_imported_first(first):
    code = f"""
import warnings, {first}
from afd.attacks import PGDSettings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert PGDSettings(piece=3).chunk_size == 3
assert [type(one.message).__name__ for one in said] == ["OldSpellingWarning"], said
"""
    subprocess.run([sys.executable, "-c", code], check=True)
