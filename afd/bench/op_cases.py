"""The work that each op is timed at and checked at, and the ways to do it.

`timed` has what ``afd bench kernels`` and benchmarks/bench_ops.py run, `small` what benchmarks/smoke.py does: every
kernel once, at odd shapes, dtypes, layouts and addresses. "eager" is the best formulation in PyTorch; in L2 and L1 the
references are exact rather than fast, and are a way of their own. Nothing is imported but torch and the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import ops
from afd.bench import eager
from afd.ops import backend, reference

Call = Callable[[], Any]
BOX = (0.0, 1.0)
EXACT, DRAW, BALL, LAYER = 0.0, 2e-6, 1e-5, 2e-5  # tolerances, as shares of the largest value, or of 1
SLOPE = 0.2
LONG_FOR_EXACT = 1 << 20  # elements for which the references of L2 and L1 take seconds


@dataclass(frozen=True)
class Batch:
    """Where a work gets its tensors: drawn each time the same, then placed and laid out."""

    shape: tuple[int, ...]  # of images, or of features
    layout: str = ""  # or "per sample" (settings), "channels last", "misaligned", "side stream"
    grad: torch.dtype = torch.float32  # of gradients
    device: torch.device | str = "cpu"
    drawn_on: str | None = "cpu"  # the same for every device; None: where they live

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.grad).removeprefix('torch.')} {self.layout}".strip()

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor where the work wants it."""
        if self.layout == "misaligned":  # by one element
            return tensor.new_empty(tensor.numel() + 1, device=self.device)[1:].view(tensor.shape).copy_(tensor)
        last = self.layout == "channels last" and tensor.dim() == 4 and tensor.is_floating_point()
        return tensor.to(self.device, memory_format=torch.channels_last if last else torch.contiguous_format)

    def uniform(self, seed: int, *shape: int) -> Tensor:
        """Of values in [0, 1), by default of the batch's shape."""
        return self.put(self._drawn(torch.rand, seed, shape))

    def normal(self, seed: int, *shape: int) -> Tensor:
        """Of the gradients' dtype, by default of the batch's shape."""
        return self.put(self._drawn(torch.randn, seed, shape).to(self.grad))

    def _drawn(self, draw: Callable[..., Tensor], seed: int, shape: tuple[int, ...]) -> Tensor:
        where = self.drawn_on or self.device
        return draw(shape or self.shape, generator=torch.Generator(where).manual_seed(seed), device=where)

    def setting(self, value: float) -> float | Tensor:
        """A number, or one for each sample."""
        return self.put(value * torch.linspace(0.5, 1, self.shape[0])) if self.layout == "per sample" else value


@dataclass(frozen=True)
class Work:
    """One op on tensors of its own, and the ways to do it."""

    native: Call  # through `afd.ops`
    eager: Call  # the same in plain PyTorch, and what torch.compile is given
    footprint: int  # bytes that it finds in memory when it begins, whether to read or to write in place
    bytes_moved: int | None = None  # read and written, where the floor is a copy of as many
    plain: Call | None = None  # the floor otherwise: a layer without its spectral norm
    compiles: bool = True  # in seconds, not minutes
    exact: bool = False  # whether the reference is another formulation than the eager one
    written: tuple[Tensor, ...] = ()  # what it works on in place
    zeroed: tuple[Tensor, ...] = ()  # and what of that must be zero before it does the same again

    def floor(self, device: torch.device) -> Call:
        """torch's own way to do the least that must be done."""
        source = torch.rand((self.bytes_moved or 0) // 8, device=device)  # float32: half of the bytes; the others are
        target = torch.zeros_like(source)  # written
        return self.plain or partial(target.copy_, source)

    def results(self) -> list[Tensor]:
        """All that the native call computes, in place or not."""
        made = self.native()
        return list(self.written) or _tensors(made)


def _tensors(made: Any) -> list[Tensor]:
    return [made.detach()] if isinstance(made, Tensor) else [tensor for one in made for tensor in _tensors(one)]


def held(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def pgd_step(b: Batch, norm: str, eps: float, alpha: float) -> Work:
    """In place: reads x_adv, x and grad and writes x_adv."""
    x_adv, x, grad = b.uniform(1), b.uniform(2), b.normal(3)
    stride, radius = b.setting(alpha), b.setting(eps)
    return Work(
        lambda: ops.pgd_step_(x_adv, x, grad, alpha=stride, eps=radius, norm=norm),
        lambda: x_adv.copy_(eager.pgd_step(x_adv, x, grad, alpha, eps, norm)),
        held(x, x_adv, grad),
        (3 * 4 + b.grad.itemsize) * x.numel(),
        compiles=norm != "L1",  # whose passes are unrolled
        exact=norm != "Linf" and x.numel() <= LONG_FOR_EXACT,
        written=(x_adv,),
    )


def project(b: Batch, norm: str, eps: float) -> Work:
    """Into a new tensor, which counts: reads x_adv and x and writes the result."""
    x_adv, x, radius = b.uniform(1), b.uniform(2), b.setting(eps)
    return Work(
        lambda: ops.project(x_adv, x, eps=radius, norm=norm),
        lambda: eager.project(x_adv, x, eps, norm),
        held(x, x_adv),
        3 * 4 * x.numel(),
        compiles=norm != "L1",
        exact=norm != "Linf" and x.numel() <= LONG_FOR_EXACT,
    )


def project_plane(b: Batch, norm: str, share: float) -> Work:
    """Into a new tensor, which counts: reads x, w and where the plane is counted from, and writes the result.

    A share of all that images and weights could move the value is what it is off by.
    """
    x, w, at = b.uniform(1), b.normal(2), b.uniform(3)
    value = share * w.float().flatten(1).abs().sum(1)
    return Work(
        lambda: ops.project_plane(x, w, value, at=at, norm=norm),
        lambda: eager.project_plane(x, w, value, at, norm),
        held(x, w, at),
        (3 * 4 + b.grad.itemsize) * x.numel(),
        compiles=norm != "L1",
        exact=x.numel() <= LONG_FOR_EXACT,
    )


def random_start(b: Batch, norm: str, eps: float, seed: int = 1, as_tensor: bool = False, first: int = 0) -> Work:
    """Into another tensor: reads x and writes x_adv. Bound by its random numbers, not by memory."""
    x, x_adv, radius, key = b.uniform(1), b.uniform(2), b.setting(eps), b.put(torch.tensor(seed)) if as_tensor else seed
    return Work(
        lambda: ops.random_start_(x_adv, x, eps=radius, seed=key, first_sample=first, norm=norm),
        lambda: x_adv.copy_(reference.random_start(x, eps, *BOX, seed)),
        held(x, x_adv),
        2 * 4 * x.numel(),
        written=(x_adv,),
    )


def apgd_step(b: Batch, eps: float, step: float, each: bool = False) -> Work:
    """In place: reads x_adv, x_adv_old, x and grad and writes the first two; a step for each sample if asked for."""
    x_adv, x_adv_old, x, grad = b.uniform(1), b.uniform(2), b.uniform(3), b.normal(4)
    steps, radius = b.put(torch.full(b.shape[:1], step)), b.setting(eps)
    stride = steps if each else b.setting(step)

    def by_hand() -> None:
        stepped = reference.apgd_step(x_adv, x_adv_old, x, grad, 0.0, eps, 0.75, *BOX, steps)
        x_adv_old.copy_(x_adv)
        x_adv.copy_(stepped)

    return Work(
        lambda: ops.apgd_step_(x_adv, x_adv_old, x, grad, step=stride, eps=radius),
        by_hand,
        held(x, x_adv, x_adv_old, grad),
        (5 * 4 + b.grad.itemsize) * x.numel(),
        written=(x_adv, x_adv_old),
    )


def apgd_update(b: Batch, share: float | None = None) -> Work:
    """In place. Where a share of the rows improves (on a best loss of 0): reads x_adv and grad, writes them elsewhere.

    Without a share: the start point, a step and a checkpoint, at random losses.
    """
    n, best = b.shape[0], -torch.inf if share is None else 0.0
    first = {"loss_best": best, "loss_last": torch.inf, "loss_at_check": 0.0, "step": 0.1}
    state: dict[str, Any] = {name: b.put(torch.full((n,), value)) for name, value in first.items()}
    state |= {"reduced": b.put(torch.ones(n, dtype=torch.bool)), "broken": b.put(torch.zeros(n, dtype=torch.bool))}
    state |= {"increases": b.put(torch.zeros(n, dtype=torch.int32)), "moves": b.put(torch.zeros(n, dtype=torch.uint8))}
    state |= {"x_best": b.uniform(1), "grad_best": b.normal(2), "x_best_adv": b.uniform(3)}
    calls = []
    for call, interval in enumerate((0, 0, 2) if share is None else (0,)):
        loss = b.uniform(call, n) if share is None else b.put(torch.where(torch.arange(n) < share * n, 1.0, -1.0))
        fooled = loss > 0.5 if share is None else torch.zeros_like(loss, dtype=torch.bool)
        calls.append((b.uniform(10 + call), b.normal(20 + call), loss, fooled, interval))

    def native() -> None:
        for *tensors, interval in calls:
            ops.apgd_update_(*tensors, **state, interval=interval)

    moved = int(2 * 2 * 4 * (share or 0) * calls[0][0].numel())
    return Work(
        native,
        lambda: reference.apgd_update(*calls[0][:-1], **state, interval=0, rho=0.75),
        moved,
        moved,
        written=(*(tensor for x_adv, grad, *_ in calls for tensor in (x_adv, grad)), *state.values()),
        zeroed=(state["loss_best"],),
    )


def square_step(b: Batch, norm: str, eps: float, loss: str = "margin", side: int = 5) -> Work:
    """A query in place, of which no proposal is accepted: restores a window and writes another one, in Linf.

    In L2 and L1 it reads x_best and x and writes x_tried. What it moves is counted without the logits.
    """
    x, n, values = b.uniform(1), b.shape[0], b.uniform(1).numel()
    x_best, pattern = b.uniform(3).mul_(0.01).add_(x).clamp_(*BOX), ops.square_pattern(side, norm).to(x)
    x_tried = b.uniform(4).copy_(x_best)
    y, rows, state = b.put(torch.arange(n) % 10), b.put(torch.arange(n)), b.put(torch.ones(n, dtype=torch.uint8))
    logits, loss_best = b.uniform(2, n, 10).scatter(1, y[:, None], 2.0), b.put(torch.full((n,), 100.0))
    settings: dict[str, Any] = {"query": 3, "side": side, "last_side": side, "seed": 7, "norm": norm, "loss": loss}
    settings |= {"pattern": pattern, "loss_best": loss_best, "state": state, "rows": rows, "eps": b.setting(eps)}

    step = partial(ops.square_step_, x_tried, x_best, x, logits, y, **settings)
    moved = 2 * 2 * 4 * side * side * x.shape[:2].numel() if norm == "Linf" else 3 * 4 * values
    least, written = moved if norm == "Linf" else held(x, x_best, x_tried), (x_tried, x_best, loss_best, state)
    return Work(step, backend.use("reference")(step), least, moved, compiles=False, written=written)


def load_batch(b: Batch, sets: int = 1, draws: Sequence[int] | None = None, index: Sequence[int] = ()) -> Work:
    """Into a new tensor, cropped and mirrored if there are draws: reads a byte and writes a float an element."""
    pixels = b.put((b.uniform(1, sets * b.shape[0], *b.shape[1:]) * 256).byte())
    rows = b.put(torch.tensor(index) if index else torch.randperm(len(pixels))[: b.shape[0]])
    drawn = b.put(torch.tensor(draws)) if draws else None
    if sets > 1:
        drawn = torch.randint(2**62, (len(pixels),), device=b.device)
    elements, last = len(rows) * pixels[0].numel(), b.layout == "channels last"
    return Work(
        lambda: ops.load_batch(pixels, rows, draws=drawn, padding=4, flip=True, channels_last=last),
        lambda: reference.load_batch(pixels, rows, drawn, 255.0, 4, True, False),
        elements,  # bytes, too
        5 * elements,
    )


def spectral_norm(b: Batch, shapes: Sequence[tuple[int, int]], scale: float = 1.0, **settings: Any) -> Work:
    """Power iterations of a group of matrices, each read once."""
    weights = [b.put(scale * b.normal(3, *shape)) for shape in shapes]
    us, vs = ([_unit(b, shape[side]) for shape in shapes] for side in (0, 1))
    by_hand, moved = partial(eager.spectral_norms, weights, us, vs), held(*weights)
    return Work(lambda: ops.spectral_norm(weights, us, vs, **settings), by_hand, moved, moved)


def spectral_linear(b: Batch, rows: int) -> Work:
    """A layer with bias and LeakyReLU, forward and backward."""
    x, weight, bias = inputs = _wanted(b, b.shape, (rows, b.shape[1]), (rows,))
    spectrum, grad = _spectrum(b, weight), b.normal(9, b.shape[0], rows)

    def layer(weight: Tensor) -> tuple[Tensor, ...]:
        return _passes(F.leaky_relu(F.linear(x, weight, bias), SLOPE), inputs, grad)

    return Work(
        lambda: _passes(ops.spectral_linear(x, weight, bias, spectrum, negative_slope=SLOPE), inputs, grad),
        lambda: layer(eager.normalised(weight, spectrum)),
        held(*inputs, grad),
        plain=lambda: layer(weight),
    )


def projection_logits(b: Batch, classes: int, labels: bool = True) -> Work:
    """The projection head, forward and backward."""
    n, width = b.shape
    h, w, bias, e = inputs = _wanted(b, b.shape, (1, width), (1,), (classes, width))
    of_w, of_e, y, grad = _spectrum(b, w), _spectrum(b, e), b.put(torch.arange(n) * 31 % classes), b.normal(9, n)

    def head(w: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return _passes(F.linear(h, w, bias).squeeze(1) + (F.embedding(y, e) * h).sum(1), inputs, grad)

    return Work(
        lambda: _passes(
            ops.projection_logits(h, w, bias, of_w, *((y, e, of_e) if labels else ())), inputs[: 3 + labels], grad
        ),
        lambda: head(eager.normalised(w, of_w), eager.normalised(e, of_e)),
        held(*inputs, grad),
        plain=lambda: head(w, e),
    )


def _wanted(b: Batch, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [b.normal(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]


def _passes(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs, grad)


def _unit(b: Batch, length: int) -> Tensor:
    return b.put(torch.full((length,), length**-0.5))


def _spectrum(b: Batch, weight: Tensor) -> ops.Spectrum:
    rows, columns = weight.shape
    return ops.spectral_norm([weight.detach()], [_unit(b, rows)], [_unit(b, columns)])[0]


class OpCase(NamedTuple):
    """An op at one size: its name, what else it is called, its work, on which tensors, and how exact it must be."""

    op: str
    label: str
    work: Callable[[Batch], Work]
    batch: Batch
    tolerance: float = EXACT

    @property
    def name(self) -> str:
        """Op, norm, size, dtype and layout."""
        return f"{self.op} {self.label}".strip()

    def on(self, device: torch.device | str) -> Work:
        """The work on tensors of a device."""
        return self.work(replace(self.batch, device=device))


SIZES = {"cifar": (128, 3, 32, 32), "imagenet": (64, 3, 224, 224)}
FEATURES = {"cifar": (128, 512), "imagenet": (1024, 512)}
GROUP = ((512, 512), (512, 512), (1, 512), (100, 512))  # the discriminator's matrices
ODD_GROUP = ((1, 7), (100, 512), (129, 257), (3, 4096))
RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}  # AutoAttack's for CIFAR-10
STRIDES = {"Linf": 2 / 255, "L2": 0.1, "L1": 1.0}
OPS = ("pgd_step", "project", "project_plane", "random_start", "apgd_step", "apgd_update", "square_step", "load_batch",
       "spectral_norm", "spectral_linear", "projection_logits")  # fmt: skip


def timed(size: str) -> Iterator[OpCase]:
    """The cases whose speed is measured, of images of a size ("cifar" or "imagenet"), or of as many features."""
    shape, of_layer = "x".join(map(str, SIZES[size])), " x ".join(map(str, FEATURES[size]))
    images, features = Batch(SIZES[size], drawn_on=None), Batch(FEATURES[size], drawn_on=None)
    typed = {"fp32": images, "bf16": replace(images, grad=torch.bfloat16)}
    for norm, eps in RADII.items():
        step = partial(pgd_step, norm=norm, eps=eps, alpha=STRIDES[norm])
        yield from (OpCase("pgd_step", f"{norm} {shape} {word}", step, b) for word, b in typed.items())
    for norm, eps in RADII.items():
        yield OpCase("project", f"{norm} {shape}", partial(project, norm=norm, eps=eps), images)
    for norm, share in {"Linf": 0.02, "L2": 0.002, "L1": 0.002}.items():
        yield OpCase("project_plane", f"{norm} {shape}", partial(project_plane, norm=norm, share=share), images)
    yield OpCase("random_start", f"Linf {shape}", partial(random_start, norm="Linf", eps=RADII["Linf"]), images)
    step = partial(apgd_step, eps=RADII["Linf"], step=STRIDES["Linf"], each=True)
    yield from (OpCase("apgd_step", f"Linf {shape} {word}", step, b) for word, b in typed.items())
    yield OpCase("apgd_update", shape, partial(apgd_update, share=0.5), images)
    for norm, eps in RADII.items():
        yield OpCase("square_step", f"{norm} {shape}", partial(square_step, norm=norm, eps=eps), images, BALL)
    yield OpCase("load_batch", shape, partial(load_batch, sets=8), images)
    if size == "cifar":  # the same whatever the images' size
        yield OpCase("spectral_norm", "512, 512, 1, 100 x 512", partial(spectral_norm, shapes=GROUP), features)
    yield OpCase("spectral_linear", of_layer, partial(spectral_linear, rows=512), features)
    yield OpCase("projection_logits", of_layer, partial(projection_logits, classes=100), features)


def small() -> Iterator[OpCase]:
    """The cases that are checked: each kernel once, where it goes element by element, on chip, and over many blocks."""
    sizes = ((1, 33), (3, 3072), (3, 12289))
    plain = [*map(Batch, sizes), Batch((0, 33)), Batch((3, 33), "per sample"), Batch((3, 3072), "per sample")]
    plain += [Batch((3, 3, 32, 32), "channels last"), Batch((3, 3072), "misaligned"), Batch((3, 3072), "side stream")]
    typed = [*plain, *(Batch(size, grad=kind) for size in sizes for kind in (torch.bfloat16, torch.float16))]
    for norm, eps, step, draw in (("Linf", 0.3, EXACT, EXACT), ("L2", 3.0, BALL, DRAW), ("L1", 3.0, BALL, DRAW)):
        walk, fall = partial(pgd_step, norm=norm, eps=eps, alpha=eps / 2), partial(project, norm=norm, eps=eps)
        begin = partial(random_start, norm=norm, eps=eps, first=2**32 - 1)
        yield from (OpCase("pgd_step", f"{norm} {b}", walk, b, step) for b in typed)
        yield from (OpCase("project", f"{norm} {b}", fall, b, step) for b in plain)
        yield from (
            OpCase("project_plane", f"{norm} {b}", partial(project_plane, norm=norm, share=0.02), b, BALL)
            for b in typed
        )
        yield from (OpCase("random_start", f"{norm} {b}", partial(begin, seed=7), b, draw) for b in plain)
        keyed = partial(begin, seed=2**62 + 5, as_tensor=True)
        yield OpCase("random_start", f"{norm} seed tensor", keyed, Batch((3, 33)), draw)
    for b in (*typed, Batch((3, 33), grad=torch.float64)):
        yield OpCase("apgd_step", f"{b}", partial(apgd_step, eps=0.3, step=0.1), b)
        yield OpCase("apgd_update", f"{b}", apgd_update, b)
    for norm, loss in (("Linf", "margin"), ("L2", "ce"), ("L1", "margin")):
        query = partial(square_step, norm=norm, eps=0.3 if norm == "Linf" else 3.0, loss=loss)
        for b in (Batch((3, 3, 7, 9), layout) for layout in ("", "per sample", "channels last", "misaligned")):
            yield OpCase("square_step", f"{norm} {b}", query, b, EXACT if norm == "Linf" else BALL)
        yield OpCase("square_step", f"{norm} 3x150528", partial(query, side=1), Batch((3, 150_528)), BALL)
    augmented = partial(load_batch, index=(2, 0, 1, 1), draws=(2**40 + 7, -5, 2**61 + 12))
    for shape in ((3, 3, 7, 33), (3, 1, 28, 28), (3, 3, 32, 32)):
        for b in (Batch(shape, layout) for layout in ("", "channels last", "misaligned", "side stream")):
            yield OpCase("load_batch", f"{b}", partial(load_batch, index=(2, 0, 1, 1)), b)
            yield OpCase("load_batch", f"augmented {b}", augmented, b)
    for settings in ({}, {"n_iter": 0}, {"n_iter": 3}, {"first": "v"}, {"scale": 2.0**70}):
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        yield OpCase("spectral_norm", words, partial(spectral_norm, shapes=ODD_GROUP, **settings), Batch(()), LAYER)
    for b in (Batch((1, 33)), Batch((129, 65)), Batch((33, 512), "misaligned"), Batch((33, 512), "side stream")):
        yield OpCase("spectral_linear", f"{b}", partial(spectral_linear, rows=130), b, LAYER)
        for words, labels in (("", False), ("with labels ", True)):
            head = partial(projection_logits, classes=7, labels=labels)
            yield OpCase("projection_logits", f"{words}{b}", head, b, LAYER)
