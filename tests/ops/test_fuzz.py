"""Random calls of every op: the formula in float64, or an error of afd's; never another error, never a write elsewhere.

A case is one number. ``AFD_FUZZ_CASES`` sets how many are tried (of all ops together), ``AFD_FUZZ_FIRST`` which comes
first: to repeat a failure, set them to 1 and to the number that it prints.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from afd import ops
from afd.errors import AfdError
from afd.ops import backend

FIRST = int(os.environ.get("AFD_FUZZ_FIRST", "0"))
IMAGE_DTYPES = [torch.float32] * 12 + [torch.float64, torch.float64, torch.float16, torch.int64]
GRAD_DTYPES = [torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.float64, torch.uint8]
PATTERN = 0xA5


class Memory:
    """Tensors that lie somewhere in a larger memory of a known pattern, which tells afterwards who wrote where."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.places: list[tuple[Tensor, Tensor, Tensor]] = []  # memory, its bytes before the call, the tensor there

    def hold(self, values: Tensor, plain: bool = False) -> Tensor:
        """The values in a random layout at a random place."""
        shape, draw = list(values.shape), self.draw
        order = list(range(len(shape)))
        kind = "dense" if plain else draw.choice(["dense"] * 5 + ["last", "any order", "gaps", "expanded"])
        if kind == "last" and len(shape) == 4:
            order = [0, 2, 3, 1]
        elif kind == "any order":
            draw.shuffle(order)
        strides, step = [0] * len(shape), draw.choice([2, 3]) if kind == "gaps" else 1
        for axis in reversed(order):
            strides[axis] = step
            step *= max(shape[axis], 1)
        if kind == "expanded" and shape and shape[0] > 1:
            strides[0] = 0
            values = values[:1].expand(values.shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.numel() else 0
        before, after = draw.randrange(20), 16 + draw.randrange(20)
        size = values.element_size()
        memory = torch.full(((before + reach + after) * size,), PATTERN, dtype=torch.uint8)
        tensor = memory.view(values.dtype).as_strided(shape, strides, before)
        if kind == "expanded" and shape and shape[0] > 1:
            tensor[:1].copy_(values[:1])
        elif values.numel():
            tensor.copy_(values)
        self.places.append((memory, memory.clone(), tensor))
        return tensor

    def check(self, written: list[Tensor]) -> None:
        """Nothing has changed but the tensors that were to be written."""
        for memory, before, tensor in self.places:
            allowed = torch.zeros_like(memory, dtype=torch.bool)
            for out in written:
                if out.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr() and out.numel():
                    spans = allowed.as_strided((len(allowed) // out.element_size(), out.element_size()),
                                               (out.element_size(), 1))  # fmt: skip
                    places = torch.zeros(len(spans), dtype=torch.bool)
                    places.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
                    spans[places] = True
            assert torch.equal(memory[~allowed], before[~allowed]), f"a write outside of {list(tensor.shape)}"


class Case:
    """What the draws of one case have in common."""

    def __init__(self, number: int) -> None:
        self.draw = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.memory = Memory(self.draw)
        self.strange = False  # values or a setting that the formula in float64 cannot be asked about

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def shape(self) -> list[int]:
        dims = self.draw.choice([1, 2, 2, 3, 4, 4, 4, 5])
        rest = [self.draw.choice([1, 1, 2, 3, 5, 7, 8, 17]) for _ in range(dims - 1)]
        shape = [self.draw.choice([1, 2, 3, 4, 9]), *rest]
        if self.chance(0.06):
            shape[self.draw.randrange(dims)] = 0
        if self.chance(0.05):
            shape = [self.draw.choice([1, 2, 3]), self.draw.choice([63, 1025, 4099])]
        return shape

    def numbers(self, shape: list[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
        values = low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        values = values.to(dtype).clamp(low, high)
        if self.chance(0.06) and dtype.is_floating_point and values.numel():
            self.strange = True
            values.view(-1)[self.draw.randrange(values.numel())] = self.draw.choice([math.nan, math.inf, -math.inf])
        return values

    def gradient(self, shape: list[int]) -> Tensor:
        dtype = self.draw.choice(GRAD_DTYPES)
        values = torch.randn(shape, generator=self.generator)
        if self.chance(0.3):
            values = values.round()  # ties and zeros
        return self.memory.hold(values.to(dtype))

    def setting(self, samples: int, dtype: torch.dtype, high: float) -> object:
        if self.chance(0.35):
            length = samples if self.chance(0.93) else samples + 1
            values = self.numbers([length], 0.0, high, dtype if dtype.is_floating_point else torch.float32)
            return self.memory.hold(values, plain=self.chance(0.9))
        if self.chance(0.06):
            self.strange = True
            return self.draw.choice(
                [-0.1, math.nan, math.inf, 1e300, 10**400, None, "0.1", [0.1], True, np.ones(3), torch.tensor(0.1)]
            )
        return self.draw.choice([0.0, 1, np.float32(0.25), high, high * self.draw.random()])

    def bounds(self) -> tuple[object, float, float]:
        """Bounds as they are passed, and those that images keep."""
        if self.chance(0.05):
            self.strange = True
            wrong = [(1, 0), (0.0, math.nan), None, 0.5, (0.0,), (0, 1, 2), ("0", "1"), (-1e300, 1e300), torch.ones(2)]
            return self.draw.choice(wrong), 0.0, 1.0
        return self.draw.choice(
            [((0.0, 1.0), 0.0, 1.0), ((0, 1), 0.0, 1.0), ([-1.0, 1.5], -1.0, 1.5), ((-math.inf, math.inf), 0.0, 1.0)]
        )

    def other(self, tensor: Tensor) -> Tensor:
        """Sometimes another tensor than was meant: of another shape, kind, dtype or memory."""
        if not self.chance(0.04):
            return tensor
        self.strange = True
        wrong: list[Callable[[], object]] = [
            lambda: None, lambda: tensor.tolist(), lambda: tensor.float().numpy(), lambda: tensor.to_sparse(),
            lambda: tensor.to("meta"), lambda: tensor[None], lambda: tensor[:1], lambda: tensor.double(),
            lambda: tensor.bool(), lambda: tensor.to(torch.complex64).conj(),
            lambda: torch._neg_view(tensor.float()), lambda: torch.nested.nested_tensor([tensor]),
        ]  # fmt: skip
        with torch.autocast("cpu", enabled=False):  # under which torch cannot nest float64
            return self.draw.choice(wrong)()  # type: ignore[return-value]

    def shared(self, tensor: Tensor, target: Tensor) -> Tensor:
        """Sometimes a tensor in the very memory that is written."""
        if not self.chance(0.05) or tensor.dtype != target.dtype:
            return tensor
        self.strange = True
        return target if self.chance(0.5) else target[:1].expand(target.shape)


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def agree(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for ours, exact in zip(got, want, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(ours, exact)


def step_case(case: Case, name: str) -> None:
    """project, pgd_step, random_start and apgd_step, functional and in place."""
    shape, dtype = case.shape(), case.draw.choice(IMAGE_DTYPES)
    bounds, low, high = case.bounds()
    x = case.memory.hold(case.numbers(shape, low, high, dtype))
    x_adv = case.memory.hold(case.numbers(shape, low - 0.2, high + 0.2, dtype))
    settings: dict[str, object] = {"eps": case.setting(shape[0], dtype, 0.5), "bounds": bounds}
    tensors = [x_adv, x]
    in_place = name.endswith("_")
    if name.startswith("pgd"):
        tensors.append(case.gradient(shape))
        settings |= {"alpha": case.setting(shape[0], dtype, 0.3)}
        settings |= {"sparsity": case.setting(shape[0], dtype, 1.0)} if case.chance(0.5) else {}
    elif name.startswith("apgd"):
        old = case.memory.hold(case.numbers(shape, low, high, dtype))
        tensors = [x_adv, old, x, case.gradient(shape)]
        settings |= {"step": case.setting(shape[0], dtype, 0.3), "a": case.draw.choice([0.75, 1.0, 0.5, 1] * 5 + [2.0])}
    elif name.startswith("random"):
        tensors = tensors if in_place else [x]
        seeds = [3, 2**63 - 1, np.int64(5), torch.tensor(9)]
        if case.chance(0.1):
            seeds = [2**63, -1, True, 1.5, None, 2**70]
        settings |= {
            "seed": case.draw.choice(seeds),
            "first_sample": case.draw.choice([0, 3, np.int32(2), 2**62] * 5 + [-1]),
        }
    if not name.startswith("apgd"):
        settings |= {"norm": case.draw.choice(["Linf", "L2", "L1"] * 8 + ["l2", None])}
    tensors = [tensors[0], *(case.other(t) for t in tensors[1:])] if in_place else [case.other(t) for t in tensors]
    if in_place:
        tensors[1:] = [t if not isinstance(t, Tensor) else case.shared(t, x_adv) for t in tensors[1:]]
    exact = [t.double().clone() if t.is_floating_point() else t for t in tensors] if not case.strange else []
    wanted = {key: double(value) for key, value in settings.items()}
    exact = exact[name == "random_start_" :]
    got = getattr(ops, name)(*tensors, **settings)
    if exact and dtype.is_floating_point:
        with backend.use("reference"):
            want = getattr(ops, name.removesuffix("_"))(*exact, **wanted)
        spread = 2.0 if high - low > 1 else 1.0
        agree([got], [want], 5e-5 * spread if dtype == torch.float32 else 1e-6)
    case.memory.check(tensors[: (2 if name == "apgd_step_" else 1)] if in_place else [])


def plane_case(case: Case, _: str) -> None:
    shape, dtype = case.shape(), case.draw.choice(IMAGE_DTYPES)
    bounds, low, high = case.bounds()
    copies = case.draw.choice([1, 1, 2, 3])
    x = case.memory.hold(case.numbers([copies * shape[0], *shape[1:]], low, high, dtype))
    b = case.memory.hold(case.numbers(shape[:1], -1.0, 1.0, dtype))
    at = case.memory.hold(case.numbers(shape, low, high, dtype))
    tensors = [case.other(t) for t in (x, case.gradient(shape), b)]
    centre = case.other(at) if case.chance(0.7) else None
    settings = {"bounds": bounds, "norm": case.draw.choice(["Linf", "L2", "L1"] * 8 + ["l2", None])}
    got = ops.project_plane(*tensors, at=centre, **settings)
    if not case.strange and dtype.is_floating_point:
        exact = [double(t) for t in tensors]
        with backend.use("reference"):
            want = ops.project_plane(*exact, at=double(centre), **settings)
        if settings["norm"] == "L1":  # where two weights tie but for rounding, another of them may go: as far in all
            got, want = got[1:], want[1:]
        agree(list(got), list(want), 1e-3 if dtype == torch.float32 else 1e-6)
    case.memory.check([])


def update_case(case: Case, _: str) -> None:
    shape = case.shape()
    samples, grad = shape[:1], case.gradient(shape)
    dtype = case.draw.choice(IMAGE_DTYPES[:14])
    rows = [case.memory.hold(case.numbers(shape, 0, 1, dtype), case.chance(0.7)) for _ in range(3)]
    grads = [grad, case.memory.hold(grad.clone() if grad.numel() == 0 else grad.flip(0).contiguous())]
    plain = case.chance(0.93)
    values = [case.memory.hold(case.numbers(samples, 0, 1, dtype), plain) for _ in range(5)]
    flags = [case.memory.hold(torch.rand(samples, generator=case.generator) > 0.5, plain) for _ in range(3)]
    counts = [case.memory.hold(torch.zeros(samples, dtype=t), plain) for t in (torch.int32, torch.uint8)]
    names = ("x_best", "grad_best", "x_best_adv", "loss_best", "loss_last", "loss_at_check", "step", "increases",
             "reduced", "broken", "moves")  # fmt: skip
    named = [rows[1], grads[1], rows[2], *values[1:], counts[0], flags[1], flags[2], counts[1]]
    tensors = [rows[0], grads[0], values[0], flags[0]]
    written = [rows[0], grads[0], *named]
    given = [case.other(t) for t in named] if case.chance(0.3) else named
    given = [case.shared(t, rows[0]) if isinstance(t, Tensor) else t for t in given]
    arguments = dict(zip(names, given, strict=True))
    numbers = {
        "interval": case.draw.choice([0, 0, 3, 22, 3, 22] * 4 + [-1, 2**31, 1.0]),
        "rho": case.draw.choice([0.75, 1, 0.0] * 5 + [2]),
    }
    copies = [t.clone() if isinstance(t, Tensor) else t for t in (*tensors, *given)]
    ops.apgd_update_(*tensors, **arguments, **numbers)
    with backend.use("reference"):
        ops.apgd_update_(*copies[:4], **dict(zip(names, copies[4:], strict=True)), **numbers)
    agree([*tensors, *given], copies, 0.0)
    case.memory.check(written)


def square_case(case: Case, _: str) -> None:
    """Beside a reference that is given the same strange tensors: a search's own are held to float64 elsewhere."""
    draw, shape = case.draw, case.shape()
    dtype = draw.choice([torch.float32] * 10 + [torch.float64, torch.float16])
    samples, count = shape[0], draw.randrange(shape[0] + 1)
    height, width = shape[2:] if len(shape) == 4 else (1, math.prod(shape[1:]))
    most, norm = min(height, width), draw.choice(["Linf", "L2", "L1"] * 8 + ["l2"])
    sides = [draw.randrange(most + 1) for _ in range(2)] if case.chance(0.95) else [most + 1, -1]
    plain = case.chance(0.9)
    x = case.memory.hold(case.numbers(shape, 0, 1, dtype), plain)
    x_best = case.memory.hold((x + 0.1 * torch.rand(shape, generator=case.generator)).clamp(0, 1).to(dtype), plain)
    rows = torch.randperm(samples, generator=case.generator)[:count] + (2 if case.chance(0.1) else 0)
    x_tried = case.memory.hold(case.numbers([count, *shape[1:]], 0, 1, dtype), plain)
    logits = None if case.chance(0.2) else case.memory.hold(case.numbers([count, 5], -1, 1, dtype).round(decimals=1))
    y = case.memory.hold(torch.randint(5 + case.chance(0.05), (samples,), generator=case.generator))
    loss_best = case.memory.hold(case.numbers([samples], -1, 1, dtype), plain)
    state = case.memory.hold(torch.randint(3, (samples,), generator=case.generator).to(torch.uint8), plain)
    rows = case.memory.hold(rows, plain=True)  # no two the same
    pattern = None
    if norm in ("L2", "L1") and sides[0] > 0:
        pattern = case.memory.hold(ops.square_pattern(sides[0], norm).to(dtype))
    settings = {
        "query": draw.choice([0, 1, 9, 5000] * 5 + [-1]), "side": sides[0], "last_side": sides[1], "norm": norm,
        "eps": 0.3 if case.chance(0.6) else case.setting(samples, dtype, 0.5), "seed": draw.choice([3, 2**63 - 1]),
        "first_sample": draw.choice([0, 2**62]), "loss": draw.choice(["margin", "ce"]),
    }  # fmt: skip
    given = [x_tried, x_best, case.other(x), logits, y, loss_best, state, rows, pattern]
    given[2] = case.shared(given[2], x_best) if isinstance(given[2], Tensor) else given[2]
    copies = [t.clone() if isinstance(t, Tensor) else t for t in given]

    def step(x_tried, x_best, x, logits, y, loss_best, state, rows, pattern):
        ops.square_step_(
            x_tried, x_best, x, logits, y, loss_best=loss_best, state=state, rows=rows, pattern=pattern, **settings
        )

    step(*given)
    with backend.use("reference"):
        step(*copies)
    if not case.strange:
        agree([given[i] for i in (0, 1, 5, 6)], [copies[i] for i in (0, 1, 5, 6)], 0.0 if norm == "Linf" else 5e-5)
    case.memory.check([x_tried, x_best, loss_best, state])


def load_case(case: Case, _: str) -> None:
    draw = case.draw
    images, channels, height, width = (draw.choice([1, 2, 3, 5, 8, 0 if case.chance(0.1) else 4]) for _ in range(4))
    pixels = (255 * torch.rand(images, channels, height, width, generator=case.generator)).to(torch.uint8)
    count, end = draw.choice([0, 1, 4, 9]), images + (1 if case.chance(0.1) else 0)
    index = torch.randint(0, max(end, 1), (count,), generator=case.generator)
    draws = torch.randint(-(2**62), 2**62, (images,), generator=case.generator) if case.chance(0.7) else None
    pixels, index = case.memory.hold(pixels, plain=case.chance(0.9)), case.memory.hold(index)
    settings = {"scale": draw.choice([255.0, 1, 16, 0.0, 256, math.nan, None]) if case.chance(0.2) else 255.0,
                "padding": draw.choice([0, 1, 4, 40, -1, 2**40, 1.5]) if case.chance(0.6) else 2,
                "flip": draw.choice([True, False]), "channels_last": draw.choice([True, False])}  # fmt: skip
    held = None if draws is None else case.memory.hold(draws)
    tensors = case.other(pixels), case.other(index)
    got = ops.load_batch(*tensors, draws=held, **settings)
    if not case.strange:
        with backend.use("reference"):
            want = ops.load_batch(*tensors, draws=held, **settings)
        agree([got], [want], 0.0)
    case.memory.check([])


def spectral_case(case: Case, name: str) -> None:
    """A layer or a head with its spectrum, and the gradients of all of its inputs."""
    draw, dtype = case.draw, case.draw.choice([torch.float32] * 10 + [torch.float64, torch.float16])
    samples, columns, rows = draw.choice([1, 2, 7, 33]), draw.choice([1, 2, 5, 16, 31, 70]), draw.choice([1, 3, 8, 19])
    samples = 0 if case.chance(0.03) else samples
    rows = rows if name != "projection_logits" or case.chance(0.1) else 1

    def held(*shape: int, plain: bool = False) -> Tensor:
        return case.memory.hold(case.numbers(list(shape), -1, 1, dtype), plain or case.chance(0.9))

    x, weight, bias = held(samples, columns), held(rows, columns), held(rows)
    table, y = held(4, columns), case.memory.hold(torch.randint(0, 4 + case.chance(0.05), (samples,),
                                                                generator=case.generator))  # fmt: skip
    us, vs = [held(len(w)) for w in (weight, table)], [held(columns) for _ in range(2)]
    if case.strange:
        return None  # what a power iteration makes of them has no formula; refused on the CPU, see test_spectral_norm
    n_iter = draw.choice([0, 1, 3]) if case.chance(0.95) else draw.choice([-1, 2**31, 1.5, True])
    settings = {"n_iter": n_iter, "first": draw.choice("uv")}
    spectra = ops.spectral_norm([weight, table], us, vs, **settings)
    with backend.use("reference"):
        exact = ops.spectral_norm([weight.double(), table.double()], [u.double() for u in us],
                                  [v.double() for v in vs], **settings)  # fmt: skip
    if n_iter:
        agree([s.sigma for s in spectra], [s.sigma for s in exact], 1e-3)
    inputs = [x, weight, bias] if name == "spectral_linear" else [x, weight, bias, table]
    if min(abs(float(s.sigma)) for s in spectra) < 0.05 or name == "spectral_norm":
        return case.memory.check([])
    inputs = [case.other(t) for t in inputs]
    if case.chance(0.03):
        y = case.other(y)
    slope = draw.choice([1.0, 0.2, 1, 0.0, math.nan, 2]) if case.chance(0.2) else 0.2

    def run(inputs: list[Tensor], spectra: list[ops.Spectrum]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
        if name == "spectral_linear":
            out = ops.spectral_linear(*leaves, spectra[0], negative_slope=slope)
        else:
            h, w, b, e = leaves
            out = ops.projection_logits(h, w, b, spectra[0], y, e, spectra[1])
        if not (out.requires_grad and torch.is_grad_enabled()):
            return [out]
        return [out.detach(), *torch.autograd.grad(out.sum(), [t for t in leaves if isinstance(t, Tensor)])]

    got = run(inputs, spectra)
    if not case.strange and all(t.dtype == dtype for t in inputs):
        with backend.use("reference"):
            want = run([t.double() for t in inputs], [ops.Spectrum(*(t.double() for t in s)) for s in spectra])
        largest = max(1.0, *(float(t.abs().max()) for t in want))
        agree([t / largest for t in got[:1]], [t / largest for t in want[:1]], 1e-5)
        agree([t / largest for t in got[1:]], [t / largest for t in want[1:]], 1e-3)
    return case.memory.check([])


STEPS = ("project", "project_", "pgd_step", "pgd_step_", "random_start", "random_start_", "apgd_step", "apgd_step_")
CASES: dict[str, Callable[[Case, str], None]] = dict.fromkeys(STEPS, step_case)
CASES |= {
    "project_plane": plane_case,
    "apgd_update_": update_case,
    "square_step_": square_case,
    "load_batch": load_case,
}
CASES |= dict.fromkeys(("spectral_norm", "spectral_linear", "projection_logits"), spectral_case)
MODES: list[Callable[[], contextlib.AbstractContextManager[object]]] = [
    *[contextlib.nullcontext] * 3, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
]  # fmt: skip


def fuzz(name: str, count: int) -> int:
    """Tries the cases, and returns how many were served."""
    served = 0
    for number in range(FIRST, FIRST + count):
        case = Case(number)
        mode = case.draw.choice(MODES)
        try:
            with mode():
                CASES[name](case, name)
            served += 1
        except AfdError:
            case.memory.check([])  # what is refused has not been touched
        except Exception as error:
            error.add_note(f"case {number} of {name}: AFD_FUZZ_FIRST={number} AFD_FUZZ_CASES={len(CASES)}")
            raise
    return served


@pytest.mark.parametrize("name", CASES)
def test_random_calls_agree_with_the_formula_or_are_refused(name):
    count = int(os.environ.get("AFD_FUZZ_CASES", "650")) // len(CASES)
    served = fuzz(name, count)
    assert served > count / 4 or count < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_random_calls_agree_with_the_formula_or_are_refused(name):
    fuzz(name, 1000)


def test_every_op_is_tried():
    assert {op for op in ops.__all__ if hasattr(torch.ops.afd, op)} == set(CASES)
