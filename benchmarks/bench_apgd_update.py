"""apgd_update beside the eager reference, for iterations that move no row, half of the rows, or all of them.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd.attacks.apgd_state import APGDState
from afd.ops import backend

SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_apgd_update(benchmark, which, shape, share):
    benchmark.group = f"apgd_update {shape}, {share:.0%} of the rows improve"
    x_adv, grad = torch.rand(shape), torch.randn(shape)
    state = vars(APGDState.before_start(x_adv, 8 / 255))
    improves, fooled = torch.arange(shape[0]) < share * shape[0], torch.zeros(shape[0], dtype=torch.bool)
    loss = torch.where(improves, 1.0, -1.0)

    def iteration():
        state["loss_best"].zero_()  # or only the first call would improve
        ops.apgd_update_(x_adv, grad, loss, fooled, **state)

    with backend.use(which):
        benchmark(iteration)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark, shape):
    benchmark.group = f"apgd_update {shape}, 100% of the rows improve"
    source = torch.rand(2, *shape)  # x_adv and grad
    benchmark(torch.zeros_like(source).copy_, source)
