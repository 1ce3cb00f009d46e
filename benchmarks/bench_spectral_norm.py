"""The power iteration of the paper's group beside the reference and torch's steps, and beside the bytes' copy.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afd import ops
from afd.ops import backend

GROUP = ((512, 512), (512, 512), (1, 512), (100, 512))


def group():
    weights = [torch.randn(shape) for shape in GROUP]
    us, vs = ([F.normalize(torch.randn(shape[side]), dim=0) for shape in GROUP] for side in (0, 1))
    return weights, us, vs


def torchs(weights, us, vs):
    """As torch.nn.utils.parametrizations.spectral_norm does it, and its sigma."""
    for weight, u, v in zip(weights, us, vs, strict=True):
        F.normalize(torch.mv(weight, v), dim=0, out=u)
        F.normalize(torch.mv(weight.T, u), dim=0, out=v)
        torch.dot(u, torch.mv(weight, v))


@pytest.mark.parametrize("first", ["u", "v"])
@pytest.mark.parametrize("which", ["native", "reference"])
def test_spectral_norm(benchmark, which, first):
    benchmark.group = "spectral_norm"
    weights, us, vs = group()
    with backend.use(which):
        benchmark(ops.spectral_norm, weights, us, vs, first=first)


def test_torch(benchmark):
    benchmark.group = "spectral_norm"
    benchmark(torchs, *group())


def test_copy(benchmark):
    benchmark.group = "spectral_norm"
    source = torch.rand(sum(rows * columns for rows, columns in GROUP) // 2)  # read once: half read, half written
    benchmark(torch.zeros_like(source).copy_, source)
