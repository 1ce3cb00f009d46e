"""Each op beside eager PyTorch, its reference and its floor, under pytest-benchmark.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch

from afd.bench.kernels import AGAINST, ways
from afd.bench.op_cases import SIZES, timed
from afd.ops import backend

CASES = [case for size in SIZES for case in timed(size)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way", ["native", "eager", "reference", "floor"])
def test_op(benchmark, case, way):
    benchmark.group = case.name
    with backend.use("native"):
        found = ways([case.on("cpu")], torch.device("cpu"), set(AGAINST) - {"compiled"}, print)
        if way not in found:
            pytest.skip("the reference is the eager formulation, or takes seconds")
        benchmark(found[way].once)
