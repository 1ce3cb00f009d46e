"""What equals what among the things that a module may hold."""

import enum
import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from afd.python_state import LARGEST, _Keys, changed, flags, in_place, key_of, named, places, snapshot, state_of


class Mode(enum.Enum):
    A = 1
    B = 2


class Name(str):
    __slots__ = ()


class Bound:
    def method(self):
        return self


BOUND = Bound()
SAME = [
    (1, 1), (float("nan"), float("nan")), ("a", "a"), ([1, {"a": (2.0,)}], [1, {"a": (2.0,)}]), ({1, 2}, {2, 1}),
    (np.float32(2), np.float32(2)), (np.arange(3), np.arange(3)), (Mode.A, Mode.A), (BOUND.method, BOUND.method),
    (len, len), (torch.ones(3), torch.zeros(4)), ([], []),
]  # fmt: skip
DIFFERENT = [
    (1, True), (1, 1.0), (0.0, -0.0), (1.0, 2.0), ("a", b"a"), (None, 0), ([1], (1,)), ([1, 2], [2, 1]), ([], [0]),
    ({"a": 1}, {"a": 2}), (np.float32(2), np.float64(2)), (np.arange(3), np.arange(1, 4)), (Mode.A, Mode.B),
    (Bound().method, Bound().method), (lambda: 1, lambda: 1), (torch.float32, torch.float16),
    (list(range(LARGEST + 1)), list(range(LARGEST + 2))), (functools.partial(len), functools.partial(len)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_no_code_could_tell_apart_is_equal(one, other):
    assert key_of(one) == key_of(other)
    assert hash(key_of(one)) == hash(key_of(other))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_is_not(one, other):
    assert key_of(one) != key_of(other)


def test_containers_that_hold_themselves_and_large_ones_end():
    loop: list[object] = []
    loop.append(loop)
    assert key_of(loop) == key_of(loop)
    module = nn.Identity()
    module.itself, module.large = module, np.zeros(10**6)
    assert state_of(module) == state_of(module)


def test_objects_in_containers_are_followed_too_and_a_class_that_is_exchanged_is_seen():
    module = nn.Sequential(nn.ReLU())
    module.blocks = [SimpleNamespace(width=1)]
    states = {state_of(module)}
    module.blocks[0].width = 2
    states.add(state_of(module))
    module[0].__class__ = nn.Tanh
    states.add(state_of(module))
    assert len(states) == 3


def test_what_cannot_be_asked_is_taken_as_itself():
    class Held:
        pass

    @dataclass
    class Size:
        width: int

    class Sizes(Size, enum.Enum):
        SMALL = 1

    proxy = weakref.proxy(Held())
    for value in (proxy, Sizes.SMALL, Name("a")):
        assert key_of(value) == key_of(value)
    assert key_of(Name("a")) == key_of(Name("a"))


def test_containers_in_containers_share_one_budget():
    nested = [[list(range(100)) for _ in range(100)] for _ in range(100)]
    keys = _Keys(tensors=False)
    keys.of(nested)
    assert keys.left < 0
    asked = []

    class Counting(list):
        def __iter__(self):
            asked.append(1)
            return super().__iter__()

    key_of([Counting(range(1000)) for _ in range(1000)])
    assert len(asked) < 10


def test_a_snapshot_puts_back_objects_and_what_containers_held():
    module = nn.BatchNorm1d(2)
    module.count, module.seen, module.kept = 1, [1], torch.ones(2)
    before, kept, seen, buffer = state_of(module, tensors=True), module.kept, module.seen, module.running_mean
    restore = snapshot(module)
    module.count, module.kept, module.running_mean = 2, torch.zeros(2), torch.ones(2)
    module.seen.append(2)
    module.new = 1
    restore()
    assert state_of(module, tensors=True) == before
    assert module.kept is kept
    assert module.seen is seen
    assert module.running_mean is buffer


def test_tensors_that_are_replaced_stay_where_they_are():
    module = nn.BatchNorm1d(2)
    module.kept, module.other = torch.ones(2), torch.ones(2)
    kept, buffer = module.kept, module.running_mean
    with in_place(module):
        module.kept, module.running_mean, module.other = module.kept * 3, torch.full((2,), 5.0), torch.ones(3)
    assert module.kept is kept
    assert kept.tolist() == [3, 3]
    assert module.running_mean is buffer
    assert buffer.tolist() == [5, 5]
    assert module.other.shape == (3,), "it is of another form"


def test_an_object_is_followed_one_step_into_its_attributes():
    module = nn.Identity()
    module.config = SimpleNamespace(heads=4, inner=SimpleNamespace(deep=1), sizes=[1, 2])
    before = state_of(module)
    module.config.inner.deep = 2
    assert state_of(module) == before
    module.config.sizes.append(3)
    assert {named(one) for one in changed(before, state_of(module))} == {"the attribute 'config' of the model"}


def test_modes_hooks_children_and_attributes_are_part_of_a_state_and_weights_are_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    states = [state_of(model)]
    handle = model[0].register_forward_hook(lambda *_: None)
    states.append(state_of(model))
    handle.remove()
    assert state_of(model) == states[0]
    model[1].eval()
    states.append(state_of(model))
    model[1].p = 0.1
    states.append(state_of(model))
    model[1] = nn.Dropout(0.1).eval()
    states.append(state_of(model))
    assert len(set(states)) == len(states)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert state_of(model) == states[-1]
    before = places(model)
    model[0].weight.data = model[0].weight.data.clone()
    assert places(model) != before


def test_players_are_told_apart():
    one, two = nn.Dropout(), nn.Dropout()
    before = state_of(one, two)
    two.eval()
    assert {named(attribute) for attribute in changed(before, state_of(one, two))} == {
        "the attribute 'training' of player 1"
    }


def test_flags_do_not_ask_what_newer_torch_refuses_to_tell():
    """Once told by its newer names, torch raises where the older ones are read."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older names only")
    before, told = flags(), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert flags() != before
    finally:
        matmul.fp32_precision = told
    assert flags() == before
