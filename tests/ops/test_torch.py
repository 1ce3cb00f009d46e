"""The ops as torch sees them: schemas, autograd and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from afd import ops

PER_SAMPLE = torch.tensor([0.1, 0.2])
PGD = (0.1, 0.2, 0.0, 1.0)
START = (0.2, 0.0, 1.0, 7, 3)
CALLS = {  # tensors, settings, and how many of these may be per sample
    "pgd_step": (3, PGD, 2),
    "pgd_step_": (3, PGD, 2),
    "project": (2, PGD[1:], 1),
    "project_": (2, PGD[1:], 1),
    "random_start": (1, START, 1),
    "random_start_": (2, START, 1),
}


def images(device: torch.device, **kwargs) -> Tensor:
    return torch.rand(2, 3, 4, 5, device=device).to(**kwargs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(device, name, norm, per_sample, memory_format):
    tensors, settings, by_sample = CALLS[name]
    values = [PER_SAMPLE.to(device) if per_sample else None] * by_sample
    args = [images(device, memory_format=memory_format) for _ in range(tensors)]
    torch.library.opcheck(getattr(torch.ops.afd, name).default, (*args, *settings, *values, norm))


def test_result_is_detached_though_the_iterate_requires_grad(device):
    x_adv, x = images(device).requires_grad_(), images(device)
    out = ops.pgd_step(x_adv, x, x, alpha=0.1, eps=0.2)
    assert not out.requires_grad
    assert not ops.random_start(x_adv, eps=0.2, seed=0).requires_grad
    assert ops.pgd_step_(x_adv, x, x, alpha=0.1, eps=0.2) is x_adv  # the usual loop: the iterate stays a leaf
    assert x_adv.requires_grad
    assert x_adv.is_leaf
    assert torch.equal(x_adv, out)
    ops.random_start_(x_adv, x_adv, eps=0.2, seed=0)  # one tensor still, though it is detached twice
    assert x_adv.is_leaf


@pytest.mark.parametrize("name", ["alpha", "eps"])
def test_result_is_detached_though_a_setting_requires_grad(device, name):
    x = images(device)
    settings = {"alpha": 0.1, "eps": 0.2, name: PER_SAMPLE.to(device).clone().requires_grad_()}
    assert not ops.pgd_step(x, x, x, **settings).requires_grad


def test_writing_over_a_saved_tensor_is_noticed(device):
    x_adv, x = images(device), images(device)
    weight = torch.ones_like(x).requires_grad_()
    loss = (weight * x_adv).sum()
    ops.pgd_step_(x_adv, x, x, alpha=0.1, eps=0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["pgd_step", "project", "random_start"])
def test_backward_says_what_to_do_instead(device, name):
    x = images(device).requires_grad_()
    tensors, settings, _ = CALLS[name]
    out = getattr(torch.ops.afd, name)(x, *[x.detach()] * (tensors - 1), *settings)
    with pytest.raises(RuntimeError, match="not differentiable; differentiate the model at their result instead"):
        out.sum().backward()


def attack(x: Tensor, grad: Tensor) -> Tensor:
    """Every op, functional and in place, with both kinds of settings."""
    x_adv = ops.random_start(x, eps=0.2, seed=5)
    x_adv = ops.pgd_step(x_adv, x, grad, alpha=PER_SAMPLE.to(x.device), eps=0.2)
    ops.random_start_(x_adv, x_adv, eps=0.01, seed=6)
    x_adv = ops.project(x_adv, x, eps=0.15, norm="L2")
    ops.project_(x_adv, x, eps=PER_SAMPLE.to(x.device), norm="L1")
    return ops.pgd_step_(x_adv, x, -grad, alpha=0.05, eps=0.1) * 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same(device, compiler):
    torch.compiler.reset()
    x, grad = images(device), torch.randn(2, 3, 4, 5, device=device)
    compiled = torch.compile(attack, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(x, grad), attack(x, grad))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_place_step_writes_its_argument(device, compiler, requires_grad):
    torch.compiler.reset()
    x_adv, x, grad = (images(device) for _ in range(3))
    x_adv.requires_grad_(requires_grad)
    want = ops.pgd_step(x_adv, x, grad, alpha=0.1, eps=0.2)

    @torch.compile(fullgraph=True, backend=compiler)
    def step(x_adv: Tensor) -> None:
        ops.pgd_step_(x_adv, x, grad, alpha=0.1, eps=0.2)

    step(x_adv)
    assert torch.equal(x_adv, want)


def test_an_op_is_dispatched_where_somebody_looks_on():
    """Elsewhere a call goes straight to its kernel; here each onlooker must see the op itself."""
    x = torch.rand(3, 5)

    def step(x_adv: Tensor) -> Tensor:
        return ops.project(x_adv, x, eps=0.1)

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatched, Called):
        seen: list[str] = []
        with mode():
            step(x + 1)
        assert "afd.project.default" in seen, mode
    with torch.profiler.profile() as profile:
        step(x + 1)
    assert "afd::project" in {event.name for event in profile.events()}
    assert "afd::project" in str(torch.jit.trace(step, x + 1, check_trace=False).graph)
    assert torch.equal(step(x + 1), torch.ops.afd.project(x + 1, x, 0.1, 0.0, 1.0))
