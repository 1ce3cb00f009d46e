"""load_batch beside what it replaces, and the floor: as many bytes read and written by a copy.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd.ops import backend

SETS = [(60_000, 1, 28, 28), (50_000, 3, 32, 32)]
BATCH = 128


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("shape", SETS, ids=str)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_load_batch(benchmark, which, shape, augmented):
    benchmark.group = f"load_batch {BATCH} of {shape}"
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    order = torch.randperm(len(pixels)).split(BATCH)
    settings = {"draws": torch.randint(2**62, shape[:1]), "padding": 4, "flip": True} if augmented else {}
    served = iter(range(10**9))
    with backend.use(which):
        benchmark(lambda: ops.load_batch(pixels, order[next(served) % (len(order) - 1)], **settings))


@pytest.mark.parametrize("shape", SETS, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"load_batch {BATCH} of {shape}"
    moved = 5 * BATCH * shape[1] * shape[2] * shape[3]  # a byte read and a float written an element
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8)
    benchmark(lambda: source.clone())
