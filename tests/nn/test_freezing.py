"""Parameters that stay as they are, by patterns, and BatchNorm layers that stay with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT
from afd.nn import Normalized, freeze
from afd.nn.freezing import synchronised
from afd.nn.modes import evaluating
from afd.training import Trainer

X = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def test_a_pattern_names_parameters_of_the_network_itself():
    assert freeze(network(), ["0.*", "1.weight"]) == ["0.weight", "0.bias", "1.weight"]
    model = Normalized(network(), 0.5, 0.5)
    assert freeze(model, ["?.weight"]) == ["0.weight", "1.weight", "3.weight", "4.weight", "6.weight"]
    assert not model.model[3].weight.requires_grad
    assert freeze(network(), []) == []


def test_what_matches_nothing_or_all_is_named():
    with pytest.raises(InputError, match=r"freeze is 'layer1\.\*', which no parameter is called; near names are "):
        freeze(network(), ["0.*", "layer1.*"])
    named = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer2": nn.Linear(2, 2)})
    with pytest.raises(InputError, match=r"near names are layer1\.bias"):
        freeze(named, ["layer1.bais"])
    with pytest.raises(InputError, match=r"freeze is \*, which are all parameters, and leaves nothing to train"):
        freeze(network(), ["*"])


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("method", [AT, AFD])
def test_frozen_norms_keep_their_statistics_and_others_do_not(method, ema):
    model = network()
    before = copy.deepcopy(model.state_dict())
    freeze(model, ["0.*", "1.*", "4.weight"])
    Trainer(model, method(lr=0.01), epochs=2, ema=ema, ema_buffers="averaged" if ema is None else "recomputed").fit(
        [(X, Y)], [(X, Y)]
    )
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in moved if name.startswith(("0.", "1."))} | (moved & {"4.weight"})
    assert {"3.weight", "4.bias", "4.running_mean", "4.num_batches_tracked", "6.weight"} <= moved


def test_a_frozen_norm_stays_in_evaluation_mode_and_so_does_its_copy():
    model = network()
    freeze(model, ["1.*"])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.train()
        assert [layer.training for layer in one] == [True, False, True, True, True, True, True]
        with evaluating(one):
            assert not one[3].training
        assert [layer.training for layer in one] == [True, False, True, True, True, True, True]
    assert twin[1].train.layer is twin[1]
    plain = network()
    plain[1].requires_grad_(False)
    assert plain.train()[1].training  # by hand, the mode is the user's


def test_a_frozen_model_is_pickled_and_its_layers_stay_as_they_were():
    model = network()
    freeze(model, ["0.*", "1.*"])
    again = pickle.loads(pickle.dumps(model))
    assert not again.train()[1].training
    assert again[4].training
    assert model.train()[4].training


def test_synchronised_norms_stay_frozen():
    model = network()
    freeze(model, ["0.*", "1.*"])
    layers = synchronised(model).train()
    assert [type(layers[place]) for place in (1, 4)] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert [layers[place].training for place in (1, 4)] == [False, True]


def test_a_weight_that_two_layers_share_has_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    assert freeze(model, ["1.*"]) == ["1.weight", "1.bias"]
    assert not model[0].weight.requires_grad


def test_one_pattern_is_a_list_of_it_and_two_calls_do_not_freeze_all():
    with pytest.raises(InputTypeError, match="patterns is '0"):
        freeze(network(), "0.*")
    model = network()
    freeze(model, ["[0-4].*"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(model, ["6.*"])
