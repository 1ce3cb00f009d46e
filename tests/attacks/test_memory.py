"""What an attack holds at its worst moment, and after many calls."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import APGD, FAB, PGD
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


@pytest.mark.parametrize(
    ("kind", "norm", "images"),
    [(PGD, "Linf", 5), (PGD, "L2", 5), (PGD, "L1", 5), (APGD, "Linf", 10), (FAB, "L2", 8), (FAB_T, "Linf", 8)],
)
def test_the_peak_is_that_of_the_model_and_a_few_images(setting, kind, norm, images):
    """APGD has to remember the best point, its gradient, the last point and the point that fooled the model."""
    model, x, y = setting
    attack = kind(model, norm=norm, eps=0.1, steps=3, chunk_size=32)
    bare(model, x, y), attack(x, y)  # what is made once
    model_alone = peak_bytes(lambda: bare(model, x, y), CPU)
    assert model_alone > 4 * x.nbytes
    assert peak_bytes(lambda: attack(x, y), CPU) <= model_alone + images * x.nbytes + 65536


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("kind", [PGD, APGD, FAB, FAB_T])
def test_two_hundred_calls_leave_nothing_behind(setting, kind):
    model, x, y = setting
    attack = kind(model, eps=0.1, steps=1)
    attack(x[:4], y[:4])
    before = tensors_alive()
    for seed in range(200):
        attack(x[:4], y[:4], seed=seed)
    assert tensors_alive() == before
