"""What a device's arithmetic could do at most: its rate at large matrix products, and what a model asks of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afd.attacks import engine

SMALLEST, SIZES = 256, {"cpu": 2048, "cuda": 8192}  # powers of two
TRIES, LONGEST = 10, 0.5  # products of a size; and seconds that one may take
COUNTED_IMAGES = 2  # FLOPs are counted on so many: they grow with the batch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may multiply float32 with ten bits of mantissa; by default torch does so in convolutions alone."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with cudnn.flags(**flags, allow_tf32=allowed):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_rate(kind: str, device: torch.device) -> float:
    """Floating-point operations a second of the fastest of a few large square matrix products.

    They are as large as `SIZES` says, or as can be waited for: some builds of torch emulate bfloat16 on a CPU.

    Args:
        kind: fp32, tf32 or bf16.
        device: where.
    """
    size = SMALLEST
    while True:
        seconds = _product_seconds(size, kind, device)
        if size == SIZES[device.type] or 8 * seconds > LONGEST:
            return 2 * size**3 / seconds
        size *= 2


def _product_seconds(size: int, kind: str, device: torch.device) -> float:
    """Of the fastest of a few products of two matrices of that size."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with tf32(kind == "tf32"):
        for _ in range(TRIES):
            _wait(device)
            begin = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pass_flops(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Operations of one forward and input gradient: those of matrix products and convolutions, as torch counts them."""
    counted = min(COUNTED_IMAGES, len(x))
    images = x[:counted].clone().requires_grad_()
    with engine.evaluating(model), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(F.cross_entropy(model(images), y[:counted], reduction="sum"))
    return float(counter.get_total_flops()) * len(x) / counted
