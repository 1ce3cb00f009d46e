"""Settings of attacks as dataclasses: an attack's own keywords and defaults, checked alike, called on batches."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd.attacks import (
    APGD,
    ATTACKS,
    FGSM,
    MIM,
    PGD,
    APGDSettings,
    AttackSettings,
    FGSMSettings,
    KeepsAttacks,
    MIMSettings,
    PGDSettings,
    attack_named,
)
from afd.errors import InputError, InputTypeError

CLASSES = {"pgd": PGD, "apgd": APGD, "fgsm": FGSM, "mim": MIM}
RUNNING = {"precision": None, "chunk_size": None, "validate": True, "fold_batchnorm": True}
each = pytest.mark.parametrize("name", CLASSES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(seed=5, first_sample=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return SimpleNamespace(x=x, y=torch.arange(6) % 4, seed=seed, first_sample=first_sample)


@each
def test_the_fields_are_the_attacks_keywords_with_the_same_defaults(name):
    keywords = {
        one.name: one.default
        for one in inspect.signature(CLASSES[name].__init__).parameters.values()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }
    fields = {field.name: field.default for field in dataclasses.fields(ATTACKS[name])}
    if name in ("pgd", "mim"):
        assert (keywords.pop("alpha"), fields.pop("alpha")) == (2 / 255, None)
    assert fields == keywords | RUNNING


@each
def test_every_field_is_described_once_in_the_settings(name):
    described = "".join(inspect.getdoc(kind) or "" for kind in (AttackSettings, ATTACKS[name]))
    for field in dataclasses.fields(ATTACKS[name]):
        assert described.count(f"    {field.name}: ") == 1, field.name


@each
def test_an_attack_takes_its_settings_as_keywords_and_does_the_same(name):
    settings, b = ATTACKS[name](eps=0.1), batch()
    attack = CLASSES[name](network(), **settings)
    assert type(settings.build(network())) is CLASSES[name]
    expected = attack(b.x, b.y, seed=5, first_sample=3)
    assert not expected.equal(b.x)
    assert settings.build(network())(b.x, b.y, seed=5, first_sample=3).equal(expected)
    assert settings(network(), b).equal(expected)


def test_changes_take_the_place_of_settings():
    attack = PGDSettings(eps=0.1, steps=3).build(network(), validate=False, steps=4)
    assert (attack.eps, attack.steps, attack.validate) == (0.1, 4, False)
    with pytest.raises(InputError, match="steps is -1"):
        PGDSettings().build(network(), steps=-1)
    with pytest.raises(TypeError, match="momentum"):
        PGDSettings().build(network(), momentum=1)


@pytest.mark.parametrize(("steps", "alpha"), [(10, 0.025), (4, 0.0625), (0, 0.25)])
@pytest.mark.parametrize(("kind", "attack"), [(PGDSettings, PGD), (MIMSettings, MIM)])
def test_a_step_size_that_is_none_crosses_the_ball(kind, attack, steps, alpha):
    settings = kind(eps=0.1, steps=steps)
    assert settings.alpha is None
    assert settings.resolved() == kind(eps=0.1, steps=steps, alpha=alpha)
    assert settings.build(network()).alpha == attack(network(), eps=0.1, steps=steps, alpha=None).alpha == alpha
    assert settings.resolved().resolved() == settings.resolved()
    assert kind(alpha=0.3).resolved().alpha == 0.3


def test_of_one_radius_per_sample_the_step_size_is_one_per_sample():
    eps = torch.linspace(0, 0.3, 6, dtype=torch.float64)
    attack, b = PGDSettings(eps=eps, steps=5).build(network()), batch()
    assert attack.alpha.equal(2.5 * eps / 5)
    assert attack(b.x, b.y).equal(PGD(network(), eps=eps, alpha=2.5 * eps / 5, steps=5)(b.x, b.y))


def test_settings_without_a_step_size_are_resolved_already():
    for settings in (FGSMSettings(eps=0.2), APGDSettings(eps=0.2)):
        assert settings.resolved() is settings


@each
def test_pgd_in_the_same_ball(name):
    settings = ATTACKS[name](norm="L2", eps=0.5, bounds=(-1.0, 2.0), loss="margin", validate=False)
    assert settings.pgd(20) == PGDSettings(norm="L2", eps=0.5, bounds=(-1.0, 2.0), steps=20)
    assert settings.pgd(20, seed=7).resolved().alpha == 2.5 * 0.5 / 20
    assert settings.pgd(20, seed=7).seed == 7


def test_a_precision_that_is_none_is_full_where_an_attack_stands_alone():
    assert PGD(network()).precision == PGDSettings().build(network()).precision == "fp32"
    assert PGDSettings(precision="bf16").build(network()).precision == "bf16"
    assert PGDSettings().precision is None


class Keeping(nn.Module):
    """A model that attacks itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.asked = network(), []

    def forward(self, x):
        return self.inner(x)

    def attacked(self, settings, batch, target, start):
        self.asked.append((settings, batch, target, start))
        return batch.x + 1


def test_a_model_that_keeps_attacks_is_asked_for_them():
    model, b, settings = Keeping(), batch(), PGDSettings(loss="kl")
    target, start = torch.zeros(6, 4), b.x.clone()
    assert isinstance(model, KeepsAttacks)
    assert not isinstance(network(), KeepsAttacks)
    assert settings(model, b, target=target, start=start).equal(b.x + 1)
    assert model.asked == [(settings, b, target, start)]


def test_target_and_start_reach_the_attack():
    b = batch()
    target, start = network()(b.x).detach().flip(0), (b.x + 0.01).clamp(max=1)
    found = PGDSettings(loss="kl", eps=0.1)(network(), b, target=target, start=start)
    assert found.equal(PGD(network(), loss="kl", eps=0.1, alpha=0.025)(b.x, target=target, start=start))
    assert not found.equal(PGDSettings(loss="kl", eps=0.1)(network(), b, start=start))


def own_loss(outputs, target):
    return outputs.square().sum(1)


@pytest.mark.parametrize(
    "settings",
    [PGDSettings(eps=torch.tensor(0.1), loss=own_loss), APGDSettings(loss=own_loss, n_restarts=2), FGSMSettings()],
)
def test_settings_can_be_copied_sent_and_taken_apart(settings):
    for other in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), dataclasses.replace(settings)):
        assert type(other) is type(settings)
        assert other == settings
        assert other is not settings
    assert dict(settings) == {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    with pytest.raises(KeyError):
        settings["build"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.eps = 0.2


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, {"norm": "L7"}) for name in CLASSES),
        *((name, {"eps": -0.1}) for name in CLASSES),
        *((name, {"loss": "mse"}) for name in CLASSES),
        *((name, {"precision": "fp8"}) for name in CLASSES),
        *((name, {"batchnorm": "frozen"}) for name in CLASSES),
        *((name, {"bounds": (1.0, 0.0)}) for name in CLASSES),
        *((name, {"targeted": True, "loss": "dlr"}) for name in CLASSES),
        *((name, {"outputs": "features"}) for name in CLASSES),
        *((name, {"outputs": "layers"}) for name in CLASSES),
        *((name, {"validate": 1}) for name in CLASSES),
        *((name, {"chunk_size": 0}) for name in CLASSES),
        *((name, {"steps": -1}) for name in ("pgd", "mim", "apgd")),
        *((name, {"alpha": "0.1"}) for name in ("pgd", "mim")),
        *(("pgd", wrong) for wrong in ({"seed": -1}, {"random_start": 1}, {"init": "normal"}, {"start_scale": 0.1})),
        ("pgd", {"init": "gaussian", "random_start": False}),
        ("pgd", {"init": "gaussian", "start_scale": -1.0}),
        ("mim", {"decay": -1.0}),
        *(("apgd", wrong) for wrong in ({"rho": 1.5}, {"n_restarts": 0}, {"eot_iter": 0}, {"early_stop": "no"})),
    ],
)
def test_settings_check_themselves_as_the_attack_does(name, wrong):
    with pytest.raises((InputError, InputTypeError)) as by_attack:
        CLASSES[name](network(), **wrong)
    with pytest.raises(type(by_attack.value)) as by_settings:
        ATTACKS[name](**wrong)
    assert str(by_settings.value) == str(by_attack.value)


def test_attacks_by_name():
    named = {name: attack_named(name) for name in ("pgd", "apgd", "fgsm", "mim")}
    assert named == {"pgd": PGDSettings, "apgd": APGDSettings, "fgsm": FGSMSettings, "mim": MIMSettings}
    with pytest.raises(InputError, match=f"attack is 'cw'; allowed are {', '.join(ATTACKS)}"):
        attack_named("cw")


def test_settings_of_no_attack_are_none():
    with pytest.raises(TypeError, match="abstract"):
        AttackSettings()
