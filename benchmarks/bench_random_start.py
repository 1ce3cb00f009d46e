"""random_start beside the eager reference and the copy of as many bytes.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd.ops import backend

SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_random_start(benchmark, which, shape):
    benchmark.group = f"random_start {shape}"
    x = torch.rand(shape)
    with backend.use(which):
        benchmark(ops.random_start_, torch.empty_like(x), x, eps=8 / 255, seed=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"random_start {shape}"
    source = torch.rand(shape)
    benchmark(torch.zeros_like(source).copy_, source)
