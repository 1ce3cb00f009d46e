"""The projection head, forward and backward, beside the reference and the plain head that is its floor.

Run with: pytest benchmarks --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afd import ops
from afd.ops import backend

WIDTH = 512


def head(batch, classes):
    h, w, bias, e = torch.randn(batch, WIDTH), torch.randn(1, WIDTH), torch.randn(1), torch.randn(classes, WIDTH)
    us, vs = [torch.ones(1), F.normalize(torch.randn(classes), dim=0)], [F.normalize(torch.randn(WIDTH), dim=0)] * 2
    spectra = ops.spectral_norm([w, e], us, vs)
    return [t.requires_grad_() for t in (h, w, bias, e)], torch.randint(classes, (batch,)), spectra, torch.randn(batch)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("batch", [128, 1024])
@pytest.mark.parametrize("which", ["native", "reference", "plain"])
def test_projection_logits(benchmark, which, batch, classes):
    benchmark.group = f"projection_logits {batch} {classes}"
    (h, w, bias, e), y, (of_w, of_e), grad = head(batch, classes)

    def ours():
        return ops.projection_logits(h, w, bias, of_w, y, e, of_e)

    def plain():
        return F.linear(h, w, bias).squeeze(1) + (F.embedding(y, e) * h).sum(1)

    score = plain if which == "plain" else ours
    with backend.use("native" if which == "plain" else which):
        benchmark(lambda: torch.autograd.grad(score(), (h, w, bias, e), grad))
