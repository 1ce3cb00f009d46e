"""Images normalised inside of a network: the same function, the same weights, radii in the images' own units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from afd.attacks import APGD, PGD
from afd.errors import InputError
from afd.execution import Execution
from afd.methods import AFD, AT
from afd.nn import Normalized, build_model, split
from afd.nn.normalized import IMAGENET, stats_in
from afd.training import CheckpointError, Trainer, load_weights, save_weights
from afd.training.weights import facts_of

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(54, 4),
    )  # fmt: skip


class ByHand(nn.Module):
    """The same function, written out."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        mean, std = (torch.tensor(one, dtype=x.dtype)[:, None, None] for one in (MEAN, STD))
        return self.inner((x - mean) / std)


@pytest.mark.parametrize("channels_last", [False, True])
def test_it_is_the_function_of_hand_normalised_images(channels_last):
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    model, by_hand = Normalized(network(), MEAN, STD).eval(), ByHand(network()).eval()
    assert torch.equal(model(x), by_hand(x))
    assert torch.equal(torch.compile(model, backend="eager")(x), by_hand(x))
    one = Normalized(network(), 0.5, 0.25).eval()
    torch.testing.assert_close(one(x), network().eval()((x - 0.5) / 0.25))


@pytest.mark.parametrize(("attack", "norm", "eps"), [(PGD, "Linf", 8 / 255), (APGD, "L2", 0.5)])
def test_an_attack_is_that_on_the_hand_normalised_function_and_keeps_to_pixels(attack, norm, eps):
    models = Normalized(network(), MEAN, STD), ByHand(network())
    x_adv, by_hand = (attack(model, norm=norm, eps=eps, steps=5)(X, Y) for model in models)
    torch.testing.assert_close(x_adv, by_hand)
    length = (x_adv - X).flatten(1).norm(dim=1, p=float("inf") if norm == "Linf" else 2)
    assert (length <= eps + 1e-6).all()
    assert (length > 0.9 * eps).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_layers_are_joined_in_attacks_as_without():
    attack = PGD(Normalized(network(), MEAN, STD), eps=8 / 255, steps=2)
    attack(X, Y)
    assert len(attack._joining.pairs) == 2


def test_its_state_dict_is_the_models_own():
    plain, model = network(), Normalized(network(), MEAN, STD)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for one in plain.parameters():
            one.add_(1)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in model.state_dict().items())
    plain.load_state_dict(copy.deepcopy(model).state_dict())
    inside = nn.Sequential(model, nn.Softmax(1))
    assert inside.state_dict().keys() == nn.Sequential(plain, nn.Softmax(1)).state_dict().keys()
    inside.load_state_dict(nn.Sequential(plain, nn.Softmax(1)).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: one for name, one in plain.state_dict().items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**plain.state_dict(), "other": torch.zeros(1)})


def test_statistics_move_with_it():
    model = Normalized(network(), MEAN, STD).double()
    assert model(X.double()).dtype == torch.float64
    assert {one.dtype for one in (model.mean, model.std)} == {torch.float64}


def test_it_is_split_where_the_model_inside_is():
    model = split(Normalized(network(), MEAN, STD)).eval()
    z, logits = model.features_and_logits(X)
    assert model.feature_layer == "model.7"
    assert z.shape == (6, 54)
    torch.testing.assert_close(logits, ByHand(network()).eval()(X))
    named = split(Normalized(network(), MEAN, STD), feature_layer="model.7")
    assert named.num_classes == 4


@pytest.mark.parametrize("method", [AFD, AT])
@pytest.mark.parametrize("normalize", [None, True])
def test_it_is_trained_saved_and_loaded_as_the_model_that_it_holds(method, normalize, tmp_path):
    model = Normalized(network(), MEAN, STD)
    Trainer(model, method(lr=0.01, validation_attack=None), normalize=normalize).fit([(X, Y)], [(X, Y)])
    save_weights(tmp_path / "model.pt", model)
    assert facts_of(model)["input_stats"] == {"mean": [*MEAN], "std": [*STD]}
    model.eval()
    for fresh in (Normalized(network(), MEAN, STD), network()):  # a plain one is put into such a module
        loaded = load_weights(tmp_path / "model.pt", fresh).eval()
        torch.testing.assert_close(loaded(X), model(X))
    with pytest.raises(
        CheckpointError, match=r"takes images normalised by 0.4,.* and this one takes them normalised by 0,1"
    ):
        load_weights(tmp_path / "model.pt", Normalized(network(), 0, 1))
    if normalize is None:
        plain = network()
        plain.load_state_dict(torch.load(tmp_path / "model.pt"))
        torch.testing.assert_close(plain.eval()((X - model.mean[:, None, None]) / model.std[:, None, None]), model(X))


def test_afds_own_networks_are_normalised_before_their_encoder():
    torch.manual_seed(0)
    model = build_model("resnet18", (3, 8, 8), 4, 2, input_stats=(MEAN, STD)).eval()
    torch.manual_seed(0)
    plain = build_model("resnet18", (3, 8, 8), 4, 2).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    torch.testing.assert_close(model(X), plain((X - mean) / std))
    assert Execution().prepare(model)(X).shape == (6, 4)


def test_words_for_means_and_deviations():
    assert stats_in("imagenet", 3) == IMAGENET
    assert stats_in("0.5,0.25", 3) == ((0.5,) * 3, (0.25,) * 3)
    assert stats_in("1/2,1/4", 1) == ((0.5,), (0.25,))
    assert stats_in("0.1,0.2,0.3,1,2,3", 3) == ((0.1, 0.2, 0.3), (1, 2, 3))
    for text, told in {
        "imagenets": "input-stats is 'imagenets'; allowed are imagenet, MEAN,STD, or 3 means and then 3 deviations",
        "1,2,3": "input-stats is '1,2,3', 3 numbers",
        "0,0": "deviations above 0",
        "inf,1": "must be finite",
    }.items():
        with pytest.raises(InputError, match=told):
            stats_in(text, 3)
    for mean, std, told in (
        ((0.1, 0.2), 1.0, "mean has 2 numbers and std 1"),
        (0.0, 0.0, "std is 0; each must be abo"),
    ):
        with pytest.raises(InputError, match=told):
            Normalized(network(), mean, std)


class Tuned(nn.Module):
    """A network around another, called model as often, with a layer of its own that is called as one of the other's."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("fc", nn.Linear(12, 5))
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(self.model(x.flatten(1)))


def test_no_name_of_the_model_takes_anothers_place():
    plain = Tuned()
    around = Normalized(copy.deepcopy(plain), 0.5, 0.25)
    state = around.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in state.items())
    fresh = Normalized(Tuned(), 0.5, 0.25)
    fresh.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(fresh(x), plain((x - 0.5) / 0.25))
    twice = Normalized(Normalized(Tuned(), 0.5, 0.25), 0.5, 0.25)
    twice.load_state_dict(state)
    assert all(torch.equal(one, state[name]) for name, one in twice.state_dict().items())


@pytest.mark.parametrize("mean", [np.array([0.1, 0.2, 0.3]), torch.tensor(0.5), (0.1, 0.2, 0.3), 0.5])
def test_means_may_be_numbers_in_any_form(mean):
    std = np.ones_like(np.asarray(mean))
    assert Normalized(network(), mean, std).stats[0] == pytest.approx(np.asarray(mean).reshape(-1).tolist())


@pytest.mark.parametrize("mean", [None, "imagenet", ["a"]])
def test_what_is_no_number_is_said(mean):
    with pytest.raises(InputError, match=r"mean is .*; it must be numbers"):
        Normalized(network(), mean, 0.5)
