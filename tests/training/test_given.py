"""Settings and attacks that cannot be meant: named in one line, before or in the first step."""

import numpy as np
import pytest
import torch
from torch import nn

from afd.attacks import PGD, PGDSettings
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT, Natural
from afd.methods.attacking import GivenAttack
from afd.training import Trainer

X = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4
BATCHES = [(X, Y)] * 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "afd"}, "method is 'afd'; it must be a training method, such as AFD"),
        ({"method": AFD}, "method is the class AFD; it must have settings: AFD"),
        ({"execution": "auto"}, "execution is 'auto'; it must be an afd.methods.Execution"),
        ({"method": AFD(validation_attack="pgd")}, "validation_attack is 'pgd'; allowed are 'pgd-N' for N steps"),
        (
            {"method": Natural(validation_attack="pgd-20")},
            "validation_attack is 'pgd-20', in the ball of the method's attack, which is none",
        ),
        (
            {"method": AFD(attack=GivenAttack(print))},
            "validation_attack is 'pgd-20', in the ball of the method's attack, which is a GivenAttack",
        ),
        (
            {"method": Natural(validation_attack=GivenAttack(lambda _: None, "validation_attack"))},
            "validation_attack made a NoneType of the model",
        ),
        ({"epochs": "3"}, "epochs is '3', a str; it must be a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5, a float; it must be a whole number"),
        ({"ema": "0.9"}, "ema is '0.9', a str; it must be a number"),
        ({"eps_warmup": "1"}, "eps_warmup is '1', a str; it must be a number"),
        ({"seed": "1"}, "seed is '1', a str; it must be a whole number"),
        ({"callbacks": print}, "callbacks is a builtin_function_or_method; it must be a list of functions"),
        ({"callbacks": [3]}, "callbacks is a list; it must be a list of functions"),
        ({"normalize": "yes"}, "normalize is 'yes'; it must be True, False or None"),
        ({"folder": 3}, "folder is a int; it must be a path"),
        ({"config": 3}, "config is a int; it must be a dict"),
        ({"model": network().to("meta")}, "the model's 0.weight is on the device meta, where tensors hold no values"),
    ],
)
def test_a_setting_of_another_kind_is_named(settings, message):
    with pytest.raises((InputTypeError, InputError), match=message):
        Trainer(**{"model": network(), "method": AFD(lr=0.01), **settings})


@pytest.mark.parametrize("kind", [AFD, AT])
@pytest.mark.parametrize("attack", [None, "pgd", 3, PGD.partial(eps=0.1), PGD(network()), PGDSettings])
def test_an_attack_of_a_methods_that_is_none_is_named_before_training(attack, kind):
    with pytest.raises((InputTypeError, InputError), match=r"^attack is "):
        Trainer(network(), kind(attack=attack, validation_attack=None))


@pytest.mark.parametrize("attack", [3, PGD.partial(eps=0.1), PGD(network()), PGDSettings])
def test_a_validation_attack_of_a_methods_that_is_none_is_named_before_training(attack):
    with pytest.raises((InputTypeError, InputError), match=r"^validation_attack is "):
        Trainer(network(), Natural(validation_attack=attack))


def test_numbers_of_numpy_are_numbers():
    Trainer(network(), Natural(), epochs=np.int64(1), ema=np.float64(0.5)).fit(BATCHES, BATCHES)


@pytest.mark.parametrize("name", ["train", "validation"])
@pytest.mark.parametrize("loader", [3, None])
def test_what_is_no_loader_is_named(name, loader):
    with pytest.raises(InputError if name == "train" else InputTypeError, match=f"{name} is a {type(loader).__name__}"):
        Trainer(network(), Natural()).fit(**{"train": BATCHES, "validation": BATCHES, name: loader})


def test_images_that_hold_no_values_are_named():
    with pytest.raises(InputError, match="x is on the device meta"):
        Trainer(network(), Natural()).fit([(X.to("meta"), Y)], BATCHES)


@pytest.mark.parametrize(("factor", "told"), [("a", "is 'a'; it must be a number"), (float("nan"), "is nan; it must")])
def test_a_factor_of_the_rates_that_is_no_number_is_named(factor, told):
    trainer = Trainer(network(), Natural(), schedule=lambda progress: factor if progress else 1.0)
    with pytest.raises((InputError, InputTypeError), match=rf"schedule\(0.5\) {told}"):
        trainer.fit(BATCHES, BATCHES)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_logits_that_are_not_finite_are_named_whatever_the_schedule(schedule):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) * (torch.nan if self.training else 1)

    method = AFD(lr=0.01, schedule=schedule, attack=PGDSettings(steps=1), validation_attack=None)
    trainer = Trainer(Broken(), method, feature_layer="inner.2")
    with pytest.raises(Exception, match="the loss 'task' became nan"):
        trainer.fit(BATCHES, BATCHES)


# --- What somebody else's attack returns -----------------------------------------------------------------------------


def against(factory):
    """The game against an attack that is none of afd's."""
    return AFD(lr=0.01, attack=GivenAttack(factory), validation_attack=None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda _: None, "the attack returned a NoneType"),
        (lambda x: x.numpy(), "the attack returned a ndarray"),
        (lambda x: (x,), "the attack returned a tuple"),
        (lambda x: x.double(), "float64"),
        (lambda x: x[:, :3], r"shape \[6, 3\]"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
        (lambda x: x + 2, r"the attack returned 6 of 6 images out of \[0, 1\] or not finite"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "the attack returned 1 of 6 images"),
    ],
)
def test_what_an_attack_should_not_return_is_named(returned, message):
    attack = lambda _model: lambda x, _y, **_settings: returned(x)  # noqa: E731
    with pytest.raises((InputError, InputTypeError), match=message):
        Trainer(network(), against(attack)).fit(BATCHES, BATCHES)


def test_an_attack_that_cannot_be_called_as_attacks_are_is_named():
    with pytest.raises(InputTypeError, match=r"cannot be called as attack\(x, y, seed=..., first_sample=...\)"):
        Trainer(network(), against(lambda _model: lambda x, _y: x)).fit(BATCHES, BATCHES)


@pytest.mark.parametrize("made", [None, 3, nn.Linear])
def test_a_function_that_makes_no_attack_is_named(made):
    with pytest.raises(InputTypeError, match=r"attack made a \w+ of the model; it must make an attack"):
        Trainer(network(), against(lambda _model: made)).fit(BATCHES, BATCHES)


def test_an_attack_that_writes_to_its_batch_leaves_the_users_as_it_was():
    def factory(_model):
        def attack(x, y, **_settings):
            y.zero_()
            return x.zero_()

        return attack

    x, y = X.clone(), Y.clone()
    Trainer(network(), against(factory)).fit([(x, y)], [(x, y)])
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
