"""The work that each op is timed at, and the ways to do it; `afd bench kernels` runs it.

"eager" is the best formulation in PyTorch; in L2 and L1 the references are exact rather than fast, and are a way of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from afd import ops
from afd.attacks.apgd_state import APGDState
from afd.bench import eager
from afd.bench.timing import Call
from afd.bench.work import Work, copying, held
from afd.ops import backend, reference
from afd.ops.loading import reference as loading

SIZES = {"cifar": (128, 3, 32, 32), "imagenet": (64, 3, 224, 224)}
GRADIENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}  # AutoAttack's for CIFAR-10
STRIDES = {"Linf": 2 / 255, "L2": 0.1, "L1": 1.0}
SPARSITY = 0.05
BOX = (0.0, 1.0)
SETS = 8  # batches in a data set
MOVED = 0.5  # share of the rows that an update of Auto-PGD moves


def pgd_step(size: str, device: torch.device) -> Iterator[Work]:
    """In place: reads x_adv, x and grad and writes x_adv."""
    for norm in RADII:
        for label, dtype in GRADIENTS.items():
            yield _pgd_step(size, device, norm, label, dtype)


def _pgd_step(size: str, device: torch.device, norm: str, label: str, dtype: torch.dtype) -> Work:
    x, x_adv, grad = _images(size, device, dtype)
    alpha, eps, moved = STRIDES[norm], RADII[norm], (3 * 4 + dtype.itemsize) * x.numel()

    def native() -> None:
        ops.pgd_step_(x_adv, x, grad, alpha=alpha, eps=eps, bounds=BOX, norm=norm, sparsity=SPARSITY)

    def by_hand() -> None:
        x_adv.copy_(eager.pgd_step(x_adv, x, grad, alpha, eps, *BOX, norm, SPARSITY))

    return Work(
        f"pgd_step {norm} {_shown(x)} {label}",
        native,
        by_hand,
        copying(moved, device),
        held(x, x_adv, grad),
        moved,
        compiles=norm != "L1",  # whose passes are unrolled
        reference=_exact(native, norm, x),
        written=(x_adv,),
    )


def project(size: str, device: torch.device) -> Iterator[Work]:
    """Into a new tensor, which counts: reads x_adv and x and writes the result."""
    for norm in RADII:
        yield _project(size, device, norm)


def _project(size: str, device: torch.device, norm: str) -> Work:
    x, x_adv, _ = _images(size, device)
    moved = 3 * 4 * x.numel()

    def native() -> Tensor:
        return ops.project(x_adv, x, eps=RADII[norm], bounds=BOX, norm=norm)

    return Work(
        f"project {norm} {_shown(x)}",
        native,
        lambda: eager.project(x_adv, x, RADII[norm], *BOX, norm),
        copying(moved, device),
        held(x, x_adv),
        moved,
        compiles=norm != "L1",
        reference=_exact(native, norm, x),
    )


def random_start(size: str, device: torch.device) -> Iterator[Work]:
    """Into another tensor: reads x and writes x_adv. Bound by its random numbers, not by memory."""
    x, x_adv, _ = _images(size, device)
    eps, moved = RADII["Linf"], 2 * 4 * x.numel()
    yield Work(
        f"random_start Linf {_shown(x)}",
        lambda: ops.random_start_(x_adv, x, eps=eps, seed=1, bounds=BOX),
        lambda: x_adv.copy_(reference.random_start(x, eps, *BOX, 1)),
        copying(moved, device),
        held(x, x_adv),
        moved,
        written=(x_adv,),
    )


def apgd_step(size: str, device: torch.device) -> Iterator[Work]:
    """In place: reads x_adv, x_adv_old, x and grad and writes the first two."""
    for label, dtype in GRADIENTS.items():
        yield _apgd_step(size, device, label, dtype)


def _apgd_step(size: str, device: torch.device, label: str, dtype: torch.dtype) -> Work:
    x, x_adv, grad = _images(size, device, dtype)
    x_adv_old, step, eps = x_adv.clone(), torch.full(x.shape[:1], STRIDES["Linf"], device=device), RADII["Linf"]
    moved = (5 * 4 + dtype.itemsize) * x.numel()

    def by_hand() -> None:
        stepped = reference.apgd_step(x_adv, x_adv_old, x, grad, 0.0, eps, 0.75, *BOX, step)
        x_adv_old.copy_(x_adv)
        x_adv.copy_(stepped)

    return Work(
        f"apgd_step Linf {_shown(x)} {label}",
        lambda: ops.apgd_step_(x_adv, x_adv_old, x, grad, step=step, eps=eps, bounds=BOX),
        by_hand,
        copying(moved, device),
        held(x, x_adv, x_adv_old, grad),
        moved,
        written=(x_adv, x_adv_old),
    )


def apgd_update(size: str, device: torch.device) -> Iterator[Work]:
    """In place, where half of the rows improve: reads their x_adv and grad and writes them elsewhere.

    They improve on a best loss of 0, which is to be restored, or only the first call would find work to do.
    """
    x, x_adv, grad = _images(size, device)
    state = vars(APGDState.before_start(x_adv, torch.full(x.shape[:1], STRIDES["Linf"], device=device)))
    fooled = torch.zeros(len(x), dtype=torch.bool, device=device)
    loss = torch.where(torch.arange(len(x), device=device) < MOVED * len(x), 1.0, -1.0)

    best = state["loss_best"].zero_()
    moved = int(2 * 2 * 4 * MOVED * x.numel())
    yield Work(
        f"apgd_update {_shown(x)}",
        lambda: ops.apgd_update_(x_adv, grad, loss, fooled, **state),
        lambda: reference.apgd_update(x_adv, grad, loss, fooled, **state, interval=0, rho=0.75),
        copying(moved, device),
        moved,
        moved,
        written=(x_adv, grad, *state.values()),
        zeroed=(best,),
    )


def load_batch(size: str, device: torch.device) -> Iterator[Work]:
    """Into a new tensor, cropped and mirrored: reads a byte and writes a float an element."""
    samples, *image = SIZES[size]
    pixels = torch.randint(256, (SETS * samples, *image), dtype=torch.uint8, device=device)
    index = torch.randperm(len(pixels), device=device)[:samples]
    draws = torch.randint(2**62, (len(pixels),), device=device)
    elements = samples * pixels[0].numel()
    yield Work(
        f"load_batch {'x'.join(map(str, SIZES[size]))}",
        lambda: ops.load_batch(pixels, index, draws=draws, padding=4, flip=True),
        lambda: loading.load_batch(pixels, index, draws, 255.0, 4, True, False),
        copying(5 * elements, device),
        elements,  # bytes, too
        5 * elements,
    )


def _images(size: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, x_adv = torch.rand(2, *SIZES[size], device=device)
    return x, x_adv, torch.randn(SIZES[size], device=device).to(dtype)


def _exact(native: Call, norm: str, x: Tensor) -> Call | None:
    """The reference through the same call, unless it is the eager formulation, or takes seconds on a large batch."""
    return None if norm == "Linf" or x.numel() > 1 << 20 else backend.use("reference")(native)


def _shown(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
