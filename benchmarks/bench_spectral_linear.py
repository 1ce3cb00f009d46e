"""A spectral-normalised layer, forward and backward, beside the reference and the plain layer that is its floor.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afd import ops
from afd.ops import backend

WIDTH = 512


def layer(batch):
    x, weight, bias = torch.randn(batch, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    u, v = (F.normalize(torch.randn(WIDTH), dim=0) for _ in range(2))
    (spectrum,) = ops.spectral_norm([weight], [u], [v])
    return [t.requires_grad_() for t in (x, weight, bias)], spectrum, torch.randn(batch, WIDTH)


@pytest.mark.parametrize("batch", [128, 1024])
@pytest.mark.parametrize("which", ["native", "reference"])
def test_spectral_linear(benchmark, which, batch):
    benchmark.group = f"spectral_linear {batch}"
    inputs, spectrum, grad = layer(batch)

    def call():
        out = ops.spectral_linear(*inputs, spectrum, negative_slope=0.2)
        torch.autograd.grad(out, inputs, grad)

    with backend.use(which):
        benchmark(call)


@pytest.mark.parametrize("batch", [128, 1024])
def test_plain(benchmark, batch):
    benchmark.group = f"spectral_linear {batch}"
    inputs, _, grad = layer(batch)
    benchmark(lambda: torch.autograd.grad(F.leaky_relu(F.linear(*inputs), 0.2), inputs, grad))
