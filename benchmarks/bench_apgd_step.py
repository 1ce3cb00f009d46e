"""apgd_step beside the eager reference and the copy of as many bytes.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd.ops import backend

SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_apgd_step(benchmark, which, shape, grad_dtype):
    benchmark.group = f"apgd_step {shape}"
    x_adv, x_adv_old, x = (torch.rand(shape) for _ in range(3))
    grad, step = torch.randn(shape).to(grad_dtype), torch.full(shape[:1], 2 / 255)
    with backend.use(which):
        benchmark(ops.apgd_step_, x_adv, x_adv_old, x, grad, step=step, eps=8 / 255)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"apgd_step {shape}"
    source = torch.rand(3, *shape)  # four tensors read and two written: as many bytes as three copied
    benchmark(torch.zeros_like(source).copy_, source)
