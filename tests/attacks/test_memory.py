"""What an attack holds at its worst moment, and after many calls."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import APGD, FAB, PGD, AutoAttack, Square
from afd.attacks.autoattack import BUILD
from afd.bench.metering import peak_bytes

CPU = torch.device("cpu")
FAB_T = functools.partial(FAB, n_target_classes=2)


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 1024, 10)).eval()
    return model.requires_grad_(False), torch.rand(32, 3, 32, 32), torch.arange(32) % 10


def bare(model, x, y):
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)


def test_peak_bytes_counts_what_is_held_and_not_what_was():
    def call():
        first = torch.ones(1000)
        del first
        second, third = torch.ones(2000), torch.ones(500)
        return second, third

    assert peak_bytes(call, CPU) == pytest.approx(4 * 2500, abs=512)


def apgd_t(model, **settings):
    """APGD-T as AutoAttack has it."""
    return APGD(model, early_stop=True, loss="dlr-targeted", n_target_classes=2, **settings)


@pytest.mark.parametrize(
    ("kind", "norm", "images"),
    [
        (kind, norm, images)
        # untargeted FAB keeps the activations through the backwards of all classes, so it takes more than FAB-T
        for kind, images in ((PGD, 5), (APGD, 8), (apgd_t, 8), (FAB, 10), (FAB_T, 8))
        for norm in ("Linf", "L2", "L1")
    ],
)
def test_the_peak_is_that_of_the_model_and_a_few_images(setting, kind, norm, images):
    """APGD has to remember the best point, its gradient, the last point and the point that fooled the model."""
    model, x, y = setting
    attack = kind(model, norm=norm, eps=0.1, steps=3, chunk_size=32)
    with torch.no_grad():
        y = model(x).argmax(1)
    bare(model, x, y), attack(x, y)  # what is made once
    model_alone = peak_bytes(lambda: bare(model, x, y), CPU)
    assert model_alone > 4 * x.nbytes
    assert peak_bytes(lambda: attack(x, y), CPU) <= model_alone + images * x.nbytes + 65536


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_autoattack_holds_its_own_result_beside_what_a_part_holds(setting, part):
    """And what the part was given, for it sees what is left."""
    model, x, y = setting
    with torch.no_grad():
        y = model(x).argmax(1)
    settings = {"queries": 3} if part == "square" else {"steps": 3}
    attack = AutoAttack(model, eps=1e-4, attacks={part: settings}, chunk_size=32)
    alone = BUILD[part](model, **attack.told[part], eps=1e-4, chunk_size=32)
    y[0] = (y[0] + 1) % 10
    attack(x, y), alone(x, y)  # what is made once
    assert peak_bytes(lambda: attack(x, y), CPU) <= peak_bytes(lambda: alone(x, y), CPU) + 2 * x.nbytes + 65536


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("broken", [0, 16])
def test_the_peak_of_square_is_that_of_a_forward_and_a_few_images(setting, norm, broken):
    """The images, the best points, what is tried, what the model is shown, and the result."""
    model, x, _ = setting
    y = model(x).argmax(1)
    y[:broken] = (y[:broken] + 1) % 10
    x = x.contiguous(memory_format=torch.channels_last)
    attack = Square(model, norm=norm, eps=1e-3, queries=20, chunk_size=32)
    attack(x, y)
    with torch.no_grad():
        model_alone = peak_bytes(lambda: model(x), CPU)
    assert peak_bytes(lambda: attack(x, y), CPU) <= model_alone + 5 * x.nbytes + 65536


@pytest.mark.parametrize("kind", [PGD, APGD, FAB, FAB_T, Square])
def test_two_hundred_calls_leave_nothing_behind(setting, kind):
    model, x, y = setting
    attack = kind(model, eps=0.1, **({"queries": 1} if kind is Square else {"steps": 1}))
    attack(x[:4], y[:4])
    before = tensors_alive()
    for seed in range(200):
        attack(x[:4], y[:4], seed=seed)
    assert tensors_alive() == before
