"""State dictionaries in three forms: each converts to each, torch's modules load theirs, ours loads all."""

from __future__ import annotations

import itertools

import pytest
import torch

from afd.errors import InputError
from afd.nn import ProjectionDiscriminator, convert_spectral_state

FORMS = ("afd", "parametrized", "hooked")


@pytest.fixture
def ours():
    torch.manual_seed(0)
    return ProjectionDiscriminator(6, 4, hidden=5)


@pytest.mark.parametrize(("start", "end"), list(itertools.permutations(FORMS, 2)))
def test_every_form_converts_to_every_other_and_back(ours, start, end):
    state = convert_spectral_state(ours.state_dict(), start)
    there = convert_spectral_state(state, end)
    assert there.keys() != state.keys()
    back = convert_spectral_state(there, start)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)


@pytest.mark.parametrize("form", ["parametrized", "hooked"])
def test_torchs_modules_load_it_and_score_alike(ours, torchs, form):
    theirs = torchs.beside(ours, form)
    z, y = torch.rand(3, 6), torch.tensor([0, 1, 3])
    torch.testing.assert_close(ours.eval()(z, y), theirs.eval()(z, y))


@pytest.mark.parametrize("form", ["parametrized", "hooked"])
def test_our_module_loads_torchs_state_as_it_is(ours, torchs, form):
    """So do checkpoints of earlier versions."""
    fresh = ProjectionDiscriminator(6, 4, hidden=5)
    fresh.load_state_dict(torchs.beside(ours, form).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), ours.state_dict().values(), strict=True))


def test_parameters_have_the_order_of_the_parametrized_module(ours, torchs):
    """Optimizers number parameters by it: their state must fit an earlier checkpoint's."""
    theirs = torchs.beside(ours, "parametrized")
    shapes = [p.shape for p in theirs.parameters()]
    assert [p.shape for p in ours.parameters()] == shapes


def test_other_keys_stay_as_they_are(ours):
    state = {"step": 3, "head.weight": 1, "head.bias": 2, "weight_u": 5, **ours.state_dict()}
    assert [key for key in convert_spectral_state(state, "hooked") if key in state] == [
        "step", "head.weight", "head.bias", "weight_u", "layers.0.bias", "layers.1.bias", "w.bias",
    ]  # fmt: skip


def test_a_missing_vector_is_an_error_as_ever(ours):
    state = convert_spectral_state(ours.state_dict(), "parametrized")
    del state["w.parametrizations.weight.0._u"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(state)


def test_unknown_forms_are_named(ours):
    with pytest.raises(InputError, match="form is 'old'; allowed are afd, parametrized, hooked"):
        convert_spectral_state(ours.state_dict(), "old")
