"""pgd_step beside the eager reference and the copy of as many bytes.

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
def test_pgd_step(benchmark, which, shape, grad_dtype):
    benchmark.group = f"pgd_step {shape}"
    x = torch.rand(shape)
    x_adv, grad = x.clone(), torch.randn(shape).to(grad_dtype)
    with backend.use(which):
        benchmark(ops.pgd_step_, x_adv, x, grad, alpha=2 / 255, eps=8 / 255)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"pgd_step {shape}"
    source = torch.rand(2, *shape)  # two tensors read and two written: what the step moves with float32 gradients
    benchmark(torch.zeros_like(source).copy_, source)
