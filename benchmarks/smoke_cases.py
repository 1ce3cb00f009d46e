"""What `smoke` runs: every op and each of its kernels once, at odd shapes, dtypes, layouts and addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd import ops

EXACT, DRAW, BALL, LAYER = 0.0, 2e-6, 1e-5, 2e-5  # tolerances, as shares of the largest value, or of 1
EPS = {"Linf": 0.3, "L2": 3.0, "L1": 3.0}


@dataclass(frozen=True)
class Batch:
    """Where a case gets its tensors: drawn on the CPU, each time the same, then placed and laid out."""

    shape: tuple[int, ...]
    layout: str = ""
    grad: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.grad).removeprefix('torch.')} {self.layout}".strip()

    def put(self, tensor: Tensor) -> Tensor:
        if self.layout == "misaligned":  # by one element
            return tensor.new_empty(tensor.numel() + 1, device=self.device)[1:].view(tensor.shape).copy_(tensor)
        last = self.layout == "channels last" and tensor.dim() == 4 and tensor.is_floating_point()
        return tensor.to(self.device, memory_format=torch.channels_last if last else torch.contiguous_format)

    def uniform(self, seed: int, *shape: int) -> Tensor:
        return self.put(torch.rand(shape or self.shape, generator=torch.Generator().manual_seed(seed)))

    def normal(self, seed: int, *shape: int) -> Tensor:
        return self.put(torch.randn(shape or self.shape, generator=torch.Generator().manual_seed(seed)).to(self.grad))

    def setting(self, value: float) -> float | Tensor:
        return self.put(value * torch.linspace(0.5, 1, self.shape[0])) if self.layout == "per sample" else value


def pgd_step(b: Batch, norm: str) -> list[Tensor]:
    alpha, eps = b.setting(EPS[norm] / 2), b.setting(EPS[norm])
    return [ops.pgd_step(b.uniform(1), b.uniform(2), b.normal(3), alpha=alpha, eps=eps, norm=norm)]


def project(b: Batch, norm: str) -> list[Tensor]:
    return [ops.project(b.uniform(1), b.uniform(2), eps=b.setting(EPS[norm]), norm=norm)]


def random_start(b: Batch, norm: str, key: int | None = None) -> list[Tensor]:
    seed = 7 if key is None else b.put(torch.tensor(key))
    return [ops.random_start(b.uniform(1), eps=b.setting(EPS[norm]), seed=seed, first_sample=2**32 - 1, norm=norm)]


def apgd_step(b: Batch) -> list[Tensor]:
    x_adv, x_adv_old, x, grad = b.uniform(1), b.uniform(2), b.uniform(3), b.normal(4)
    return [ops.apgd_step(x_adv, x_adv_old, x, grad, step=b.setting(0.1), eps=b.setting(0.3))]


def apgd_update(b: Batch) -> list[Tensor]:
    n, x_adv, grad = b.shape[0], b.uniform(1), b.normal(2)
    first = {"loss_best": -torch.inf, "loss_last": torch.inf, "loss_at_check": 0.0, "step": 0.1}
    state: dict[str, Any] = {name: b.put(torch.full((n,), value)) for name, value in first.items()}
    state |= {"reduced": b.put(torch.ones(n, dtype=torch.bool)), "broken": b.put(torch.zeros(n, dtype=torch.bool))}
    state |= {"increases": b.put(torch.zeros(n, dtype=torch.int32)), "moves": b.put(torch.zeros(n, dtype=torch.uint8))}
    state |= {"x_best": b.uniform(3), "grad_best": b.normal(4), "x_best_adv": b.uniform(5)}
    for call, interval in enumerate((0, 0, 2)):  # the start point, a step, a checkpoint
        loss = b.uniform(call, n)
        ops.apgd_update_(x_adv.mul_(0.5), grad.add_(1), loss, loss > 0.5, **state, interval=interval)
    return [x_adv, grad, *state.values()]


def load_batch(b: Batch, augmented: bool) -> list[Tensor]:
    pixels = b.put((torch.rand(b.shape, generator=torch.Generator().manual_seed(1)) * 256).byte())
    index = b.put(torch.tensor([2, 0, 1, 1]))
    draws = b.put(torch.tensor([2**40 + 7, -5, 2**61 + 12])) if augmented else None
    return [ops.load_batch(pixels, index, draws=draws, padding=3, flip=True, channels_last=b.layout == "channels last")]


def spectra(b: Batch, weights: Sequence[Tensor], **settings: Any) -> list[ops.Spectrum]:
    us, vs = ([b.put(torch.full((w.shape[side],), w.shape[side] ** -0.5)) for w in weights] for side in (0, 1))
    return ops.spectral_norm(weights, us, vs, **settings)


def spectral_norm(b: Batch, scale: float = 1.0, **settings: Any) -> list[Tensor]:
    weights = [b.put(scale * b.normal(3, *shape)) for shape in ((1, 7), (100, 512), (129, 257), (3, 4096))]
    return [tensor / scale ** (tensor.dim() == 0) for s in spectra(b, weights, **settings) for tensor in s]


def spectral_linear(b: Batch) -> list[Tensor]:
    x, w, bias = (b.normal(i, *s).requires_grad_() for i, s in enumerate((b.shape, (130, b.shape[1]), (130,))))
    out = ops.spectral_linear(x, w, bias, *spectra(b, [w.detach()]), negative_slope=0.2)
    return [out.detach(), *torch.autograd.grad(out, (x, w, bias), b.normal(9, *out.shape))]


def projection_logits(b: Batch, labels: bool) -> list[Tensor]:
    n, width = b.shape
    h, w, bias, e = (b.normal(i, *s).requires_grad_() for i, s in enumerate((b.shape, (1, width), (1,), (7, width))))
    of_w, of_e = spectra(b, [w.detach(), e.detach()])
    out = ops.projection_logits(h, w, bias, of_w, *((b.put(torch.arange(n) % 7), e, of_e) if labels else ()))
    return [out.detach(), *torch.autograd.grad(out, (h, w, bias, e)[: 3 + labels], b.normal(9, n))]


class Case(NamedTuple):
    """A call, what it is called, where its tensors come from and how far its results may be off."""

    name: str
    tolerance: float
    batch: Batch
    op: Callable[[Batch], list[Tensor]]


def cases() -> Iterator[Case]:
    """All of them; each name begins with its op's."""
    sizes = ((1, 33), (3, 3072), (3, 12289))  # element by element, on chip, more than one block holds
    plain = [*map(Batch, sizes), Batch((0, 33)), Batch((3, 33), "per sample"), Batch((3, 3072), "per sample")]
    plain += [Batch((3, 3, 32, 32), "channels last"), Batch((3, 3072), "misaligned"), Batch((3, 3072), "side stream")]
    typed = [*plain, *(Batch(size, grad=kind) for size in sizes for kind in (torch.bfloat16, torch.float16))]
    for norm, step, draw in (("Linf", EXACT, EXACT), ("L2", BALL, DRAW), ("L1", BALL, DRAW)):
        yield from (Case(f"pgd_step {norm} {b}", step, b, partial(pgd_step, norm=norm)) for b in typed)
        yield from (Case(f"project {norm} {b}", step, b, partial(project, norm=norm)) for b in plain)
        yield from (Case(f"random_start {norm} {b}", draw, b, partial(random_start, norm=norm)) for b in plain)
        keyed = partial(random_start, norm=norm, key=2**62 + 5)
        yield Case(f"random_start {norm} seed tensor", draw, Batch((3, 33)), keyed)
    for b in (*typed, Batch((3, 33), grad=torch.float64)):
        yield Case(f"apgd_step {b}", EXACT, b, apgd_step)
        yield Case(f"apgd_update {b}", EXACT, b, apgd_update)
    for shape in ((3, 3, 7, 33), (3, 1, 28, 28), (3, 3, 32, 32)):
        for b in (Batch(shape, layout) for layout in ("", "channels last", "misaligned", "side stream")):
            yield Case(f"load_batch {b}", EXACT, b, partial(load_batch, augmented=False))
            yield Case(f"load_batch augmented {b}", EXACT, b, partial(load_batch, augmented=True))
    for settings in ({}, {"n_iter": 0}, {"n_iter": 3}, {"first": "v"}, {"scale": 2.0**70}):
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        yield Case(f"spectral_norm {words}".strip(), LAYER, Batch(()), partial(spectral_norm, **settings))
    for b in (Batch((1, 33)), Batch((129, 65)), Batch((33, 512), "misaligned"), Batch((33, 512), "side stream")):
        yield Case(f"spectral_linear {b}", LAYER, b, spectral_linear)
        yield Case(f"projection_logits {b}", LAYER, b, partial(projection_logits, labels=False))
        yield Case(f"projection_logits with labels {b}", LAYER, b, partial(projection_logits, labels=True))
