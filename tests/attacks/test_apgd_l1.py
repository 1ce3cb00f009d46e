"""APGD in L1 against the scheme of "Mind the box" (Croce & Hein, ICML 2021) written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from afd import ops
from afd.attacks import APGD


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 4)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(9, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(9) % 4


def project(point, x, eps):
    return ops.project(point[None], x[None], norm="L1", eps=eps)[0]  # held to an exact solver in tests/ops


def stage(model, x, label, start, eps, steps, resumed):
    """One run in a ball of one radius: its iterates, best point, and last fooling point."""
    size = x.numel()

    def f(point):
        point = point.clone().requires_grad_()
        logits = model(point[None])[0]
        value = torch.logsumexp(logits, 0) - logits[label]
        return value.item(), torch.autograd.grad(value, point)[0], logits.argmax().item() != label

    moved = (start != x).sum().item() if resumed else size
    share = moved / size / 1.5 if resumed else 0.2
    current, step, iterates = start, eps, [start]
    value, gradient, fooled = f(current)
    best, best_value, best_gradient = current, value, gradient
    fooling = current if fooled else None
    for k in range(1, steps + 1):
        count = max(1, round(share * size))
        smallest = gradient.abs().flatten().topk(count).values[-1]
        moves = (gradient.abs() >= smallest) & (gradient != 0)
        current = project(current + step / moves.sum() * gradient.sign() * moves, x, eps)
        iterates.append(current)
        value, gradient, fooled = f(current)
        if fooled:
            fooling = current
        if value > best_value:
            best, best_value, best_gradient = current, value, gradient
        if k % max(int(0.04 * steps), 1) == 0:
            now = (best != x).sum().item()
            if now / moved < 0.95:
                step, current, gradient = eps, best, best_gradient
            else:
                step = max(step / 1.5, eps / 10)
            share, moved = now / size / 1.5, now
    return iterates, best, fooling


@pytest.mark.parametrize("steps", [3, 10, 60])
def test_equals_the_scheme_at_every_iteration(batch, steps):
    model, (x, y), eps = net(), batch, 1.5
    seen = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach().clone()))
    got = APGD(model, norm="L1", eps=eps, steps=steps, seed=5)(x, y)
    handle.remove()
    parts = [math.ceil(0.3 * steps)] * 2
    parts.append(steps - sum(parts))
    starts = ops.random_start(x, norm="L1", eps=3 * eps, seed=5)
    wrong = model(x).argmax(1) != y
    for i in range(len(x)):
        points, point = [], starts[i]
        for number, (radius, count) in enumerate(zip((3, 2, 1), parts, strict=True)):
            start = project(point, x[i], radius * eps) if number else point
            iterates, point, fooling = stage(model, x[i], y[i].item(), start, radius * eps, count, number > 0)
            points += iterates
        assert len(seen) == len(points) + 1  # and x itself before all
        for k, want in enumerate(points):
            torch.testing.assert_close(seen[k + 1][i], want, atol=1e-6, rtol=0, msg=f"sample {i}, evaluation {k}")
        want = fooling if fooling is not None else x[i] if wrong[i] else point
        torch.testing.assert_close(got[i], want, atol=1e-6, rtol=0)


def test_stays_in_ball_and_box(batch):
    x, y = batch
    eps = torch.linspace(0, 3, 9, dtype=torch.float64)
    x_adv = APGD(net(), norm="L1", eps=eps, steps=20)(x, y)
    assert ((x_adv - x).flatten(1).abs().sum(1) <= eps * (1 + 1e-6)).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert torch.equal(x_adv[0], x[0])
