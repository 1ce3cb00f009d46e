"""project beside the reference, the best eager formulation and the copy of as many bytes.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd.bench import eager
from afd.ops import backend

SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]
RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("which", ["native", "reference", "eager"])
def test_project(benchmark, which, norm, shape):
    benchmark.group = f"project {norm} {shape}"
    x, x_adv = torch.rand(2, *shape)
    if which == "eager":
        benchmark(eager.project, x_adv, x, RADII[norm], 0.0, 1.0, norm)
        return
    with backend.use(which):
        benchmark(ops.project, x_adv, x, eps=RADII[norm], norm=norm)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"project {shape}"
    source = torch.rand(3 * torch.Size(shape).numel() // 2)  # two tensors read and one written, as one copy
    benchmark(torch.zeros_like(source).copy_, source)
