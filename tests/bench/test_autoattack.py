"""AutoAttack's bench end to end on a tiny network: what is counted, what the floor is made of, what is left."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from afd.bench.autoattack import FLOOR, OURS, PEER, Attacked, AutoAttackBench, Counted, PassCost
from afd.bench.base import run
from afd.bench.results import read
from afd.errors import InputError


@pytest.fixture
def digits_net(monkeypatch):
    """A factory of a network for 8x8 digits: `digits_factory:make`."""
    module = types.ModuleType("digits_factory")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    module.make = make
    monkeypatch.setitem(sys.modules, "digits_factory", module)
    return "digits_factory:make"


def test_the_model_is_counted_and_the_floor_is_its_best_way(digits_net, tmp_path, console):
    asked = AutoAttackBench(
        model=digits_net, images=12, eps="0.001", parts="apgd-ce", repeats=2, out=tmp_path / "a.json"
    )
    document = run(asked, console)
    assert read(tmp_path / "a.json", "autoattack") == document
    assert list(document.cases) == ["apgd-ce, Linf"]
    for case in document.cases.values():
        ours, floor, peer = (case.candidates[name] for name in (OURS, FLOOR, PEER))
        assert ours.figures["gradients"] > 0
        assert peer.figures["gradients"] > 0
        costs = [floor.figures[f"{kind}_us_an_image"] * 1e-6 for kind in ("forwards", "gradients")]
        passes = [12 * ours.figures[kind] for kind in ("forwards", "gradients")]
        assert floor.median == pytest.approx(sum(cost * count for cost, count in zip(costs, passes, strict=True)))
        assert ours.figures["over_floor"] == pytest.approx(ours.median / floor.median)
        assert 0 <= ours.figures["least_left"] <= ours.figures["accuracy_left"] <= ours.figures["most_left"] <= 1
    assert document.settings["model"] == digits_net
    shown = console.export_text()
    assert all(word in shown for word in ("floor", "pyautoattack", "apgd-ce, Linf"))


def test_images_are_counted_with_and_without_a_gradient():
    counted = Counted(nn.Linear(3, 2))
    counted(torch.rand(4, 3))
    counted(torch.rand(5, 3, requires_grad=True))
    with torch.no_grad():
        counted(torch.rand(2, 3, requires_grad=True))
    assert dict(counted.images) == {"forwards": 6, "gradients": 5}


def test_the_best_of_layouts_and_batches_is_the_floor():
    attacked = Attacked(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(20, 3, 2, 2), torch.zeros(20).long(), "Linf", 0.1
    )
    cost = PassCost(attacked, "fp32")
    cost.measure()
    assert {way[2] for way in cost.taken} == {16, 20}
    cost.taken = {way: [9.0] for way in cost.taken} | {("forwards", "NCHW", 16): [1.0, 2.0, 3.0]}
    assert cost.best("forwards") == (2.0, "NCHW", 16)
    assert cost.seconds({"forwards": 10, "gradients": 2}) == 10 * 2.0 + 2 * 9.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": ""}, "model is missing"),
        ({"norm": "L2"}, "norm L2 has no usual radius"),
        ({"norm": "L7"}, "norm is 'L7'"),
        ({"parts": "fab"}, "parts is 'fab'"),
        ({"images": 0}, "images"),
    ],
)
def test_options_that_are_not_allowed(changes, told):
    with pytest.raises(InputError, match=told):
        AutoAttackBench(**{"model": "a:b", **changes}).check()
