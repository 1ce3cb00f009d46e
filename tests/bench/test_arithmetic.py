"""FLOPs by hand, and settings that are put back."""

import pytest
import torch
from torch import nn

from afd.bench import arithmetic
from afd.bench.memory import peak_bytes
from afd.errors import out_of_memory

CPU = torch.device("cpu")


def test_flops_of_a_pass_are_those_of_forward_and_input_gradient():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x, y = torch.rand(7, 3, 4, 4), torch.zeros(7, dtype=torch.long)
    forward = 2 * (8 * 3 * 9 * 16 + 8 * 16 * 5)  # a multiplication and an addition each
    assert arithmetic.pass_flops(model, x, y) == 7 * 2 * forward
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert arithmetic.pass_flops(model, x[:1], y[:1]) == 2 * forward


def test_the_matrix_rate_follows_the_clock(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(ticks) * 0.5)
    monkeypatch.setattr(arithmetic, "SMALLEST", 8)
    monkeypatch.setitem(arithmetic.SIZES, "cpu", 8)
    assert arithmetic.matmul_rate("fp32", CPU) == 2 * 8**3 / 0.5


def test_the_products_are_as_large_as_can_be_waited_for(monkeypatch):
    """A product takes eight times as long as one half as large."""
    asked = []

    def seconds(size, *_):
        asked.append(size)
        return size**3 / rate

    monkeypatch.setattr(arithmetic, "_product_seconds", seconds)
    for rate, largest in ((1e12, 2048), (1e10, 1024), (1e6, 256)):
        asked.clear()
        assert arithmetic.matmul_rate("bf16", CPU) == pytest.approx(2 * rate)
        assert asked[-1] == largest


def test_tf32_is_as_it_was_afterwards():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for allowed, precision in ((False, "highest"), (True, "high")):
        with arithmetic.tf32(allowed):
            assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (allowed, precision)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_peak_memory_is_that_of_the_worst_moment(capfd):
    def call():
        first = torch.empty(1000)
        del first
        return torch.empty(2000), torch.empty(500)

    assert peak_bytes(call, CPU) == 4 * 2500
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory of the past"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, out):
    assert out_of_memory(error) is out


def test_the_allocator_says_it_as_expected():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert out_of_memory(raised.value)
