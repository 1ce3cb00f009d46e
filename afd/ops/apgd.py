"""The two ops behind Auto-PGD (Croce & Hein 2020): its momentum step, and its bookkeeping per sample."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, one_of
from afd.ops import backend, checks, native, reference
from afd.ops.checks import Bounds, Setting, detached, integer, number, split_bounds, split_setting
from afd.ops.library import Arguments, Written, call, define, functional, in_place
from afd.ops.steps import Inputs, define_variants

STEP_NORMS = ("Linf",)

# --- apgd_step ------------------------------------------------------------------------------------------------------


def _apgd_step(
    x_adv: Tensor,
    x_adv_old: Tensor,
    x: Tensor,
    grad: Tensor,
    step: float,
    eps: float,
    a: float,
    low: float,
    high: float,
    steps: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> Inputs:
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.iterate("x_adv_old", x_adv_old, x)
    checks.gradient(grad, x)
    checks.setting("step", step, steps, x, signed=True)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)
    _share("a", a)
    return {"x": x, "grad": grad, "step": steps, "eps": epsilons}


def _made(x_adv: Tensor, x_adv_old: Tensor, *rest: Any) -> Tensor:
    _apgd_step(x_adv, x_adv_old, *rest)
    if not backend.serves_natively(x_adv):
        return reference.apgd_step(x_adv, x_adv_old, *rest)
    out = x_adv.clone()
    native.apgd_step(out, x_adv_old.clone(), *rest)
    return out


def _written(x_adv: Tensor, x_adv_old: Tensor, *rest: Any) -> None:
    read = _apgd_step(x_adv, x_adv_old, *rest)
    checks.written("x_adv", x_adv, x_adv_old=x_adv_old, **read)
    checks.written("x_adv_old", x_adv_old, **read)
    if backend.serves_natively(x_adv):
        return native.apgd_step(x_adv, x_adv_old, *rest)
    x_new = reference.apgd_step(x_adv, x_adv_old, *rest)
    x_adv_old.copy_(x_adv)
    x_adv.copy_(x_new)
    return None


define_variants(_apgd_step, _made, _written, written=2)


@functional
def apgd_step(
    x_adv: Tensor,
    x_adv_old: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step: Setting,
    eps: Setting,
    a: float = 0.75,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Arguments:
    """The step of Auto-PGD: along the gradient, with momentum (Croce & Hein 2020, Algorithm 1).

    ``z = P(x_adv + step * sign(grad))``, then ``P(x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old))``, where P
    clamps to ``x -+ eps`` and then to the bounds. Zero and NaN gradients have no sign: only momentum moves them.

    Args:
        x_adv: current iterate, float32 (float64 is served by the reference), [N, ...].
        x_adv_old: the iterate before it, like x_adv.
        x: clean images, like x_adv.
        grad: gradient of the loss at x_adv, same shape; float32, float16, bfloat16 or float64.
        step: step size in units of the image, a float or one per sample [N].
        eps: radius of the ball, a float >= 0 or one per sample [N].
        a: weight of the gradient step, in [0, 1]; 1 for no momentum (the first step).
        bounds: lowest and highest value of an image.
        norm: "Linf". In another norm, compose: a plain step and projection give z, `momentum_point` mixes, and its
            result is projected again.

    Returns:
        The next iterate, a new tensor like x_adv.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that disagree, eps < 0, a out of range, reversed bounds, unknown norm.
    """
    one_of("norm", norm, STEP_NORMS)
    (size, sizes), (radius, radii) = split_setting("step", step), split_setting("eps", eps)
    tensors = detached(x_adv), detached(x_adv_old), detached(x), detached(grad)
    return *tensors, size, radius, number("a", a), *split_bounds(bounds), sizes, radii


apgd_step_ = in_place(
    apgd_step,
    """`apgd_step` in place: x_adv_old becomes x_adv, x_adv the next iterate, which is returned; one pass over the data.

    Neither may share memory with the other, with x or with grad.
    """,
)


def momentum_point(x_adv: Tensor, x_adv_old: Tensor, z: Tensor, a: float = 0.75) -> Tensor:
    """``x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old)``, in plain PyTorch.

    With it, Auto-PGD's step in any norm is ``project(momentum_point(x_adv, x_adv_old, z, a))``, where z is the
    projected step along the gradient.
    """
    with torch.no_grad():
        return reference.momentum_point(x_adv, x_adv_old, z, a)


def _share(name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise InputError(f"{name} is {value}; it must be in [0, 1]")


# --- apgd_update ----------------------------------------------------------------------------------------------------


def apgd_update_(
    x_adv: Tensor,
    grad: Tensor,
    loss: Tensor,
    fooled: Tensor,
    *,
    x_best: Tensor,
    grad_best: Tensor,
    x_best_adv: Tensor,
    loss_best: Tensor,
    loss_last: Tensor,
    loss_at_check: Tensor,
    step: Tensor,
    increases: Tensor,
    reduced: Tensor,
    broken: Tensor,
    moves: Tensor,
    interval: int = 0,
    rho: float = 0.75,
) -> None:
    """Auto-PGD's bookkeeping once the loss and gradient at x_adv are known (Croce & Hein 2020, Algorithm 1), in place.

    Per sample: where the loss beats loss_best, x_adv, grad and loss become the best; where the model is fooled, x_adv
    becomes x_best_adv. With ``interval > 0`` this iteration is a checkpoint: where the loss rose at most
    ``rho * interval`` times since the last one, or where the step was not halved there and the best loss has not
    improved since, the step is halved, and x_adv and grad go back to the best. A NaN loss never becomes the best.

    To begin, set loss_best to -inf, loss_last to +inf, increases to 0, reduced to True and broken to False, and call
    once for the start point: it becomes the best.

    Args:
        x_adv: current iterate [N, ...], float32 (float64 is served by the reference); where the step is halved, it is
            set back to x_best.
        grad: gradient at x_adv, same shape; float32, float16, bfloat16 or float64; set back with x_adv.
        loss: loss at x_adv, [N], x_adv's dtype. As are all of the following but x_best, grad_best and x_best_adv.
        fooled: whether x_adv fools the model, bool.
        x_best: point of the highest loss so far, like x_adv.
        grad_best: gradient there, like grad.
        x_best_adv: last point that fooled the model, like x_adv.
        loss_best: highest loss so far.
        loss_last: loss one iteration ago.
        loss_at_check: loss_best at the last checkpoint.
        step: step sizes.
        increases: how often the loss rose since the last checkpoint, int32.
        reduced: whether the step was halved at the last checkpoint, bool.
        broken: whether the model was fooled at least once, bool.
        moves: what this call did, uint8: 1 for a new best, plus 2 for fooled, plus 4 for a halved step.
        interval: iterations since the last checkpoint if this iteration is one, else 0. The host knows it, so a run
            can be captured in a graph.
        rho: share of the interval's iterations in which the loss must rise, in [0, 1].

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes, devices or layouts that are not as described; shared memory; interval or rho out of range.
    """
    with torch.no_grad():
        call(
            torch.ops.afd.apgd_update_.default,
            x_adv, grad, loss, fooled, x_best, grad_best, x_best_adv, loss_best, loss_last, loss_at_check, step,
            increases, reduced, broken, moves, integer("interval", interval), number("rho", rho),
        )  # fmt: skip


_SIGNATURE = inspect.signature(reference.apgd_update, eval_str=True).parameters
_TENSORS = list(_SIGNATURE)[:-2]
_UPDATED = [name for name in _TENSORS if _SIGNATURE[name].annotation == Written]
_ROWS = ("x_adv", "grad", "x_best", "grad_best", "x_best_adv")  # [N, ...]
_KINDS = {"grad": "grad", "grad_best": "grad", "fooled": torch.bool, "reduced": torch.bool, "broken": torch.bool,
          "increases": torch.int32, "moves": torch.uint8}  # fmt: skip
_EXPECTED: list[tuple[str, bool, Any]] = [(name, name in _ROWS, _KINDS.get(name, "x_adv")) for name in _TENSORS]


def _check_update(*arguments: Any) -> None:
    *given, interval, rho = arguments
    x_adv, grad = given[:2]
    checks.images("x_adv", x_adv)
    if grad.dtype not in checks.GRAD_DTYPES:
        raise InputTypeError(f"grad is {grad.dtype}; allowed are {', '.join(map(str, checks.GRAD_DTYPES))}")
    images, device = x_adv.shape, x_adv.device
    samples, dtypes = images[:1], {"x_adv": x_adv.dtype, "grad": grad.dtype}
    for (name, of_image, kind), tensor in zip(_EXPECTED, given, strict=True):
        shape, dtype = images if of_image else samples, dtypes.get(kind, kind)
        if tensor.shape != shape:
            raise InputError(f"{name} has shape {list(tensor.shape)}; beside x_adv it must be {list(shape)}")
        if tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}; it must be on x_adv's device, {device}")
        if tensor.dtype != dtype:
            raise InputTypeError(f"{name} is {tensor.dtype}; it must be {dtype}")
        if not (of_image or tensor.is_contiguous()):
            raise InputError(f"{name} has stride {tensor.stride()}; per-sample values must be contiguous")
    shared = len({tensor.untyped_storage().data_ptr() for tensor in given}) < len(given)
    if shared or not all(map(Tensor.is_contiguous, given)):
        tensors: dict[str, Tensor] = dict(zip(_TENSORS, given, strict=True))
        for name in _UPDATED:
            checks.written(name, tensors[name], **{other: t for other, t in tensors.items() if other != name})
    if not 0 <= interval < 2**31:
        raise InputError(f"interval is {interval}; it must be 0 (no checkpoint) or the iterations since the last one")
    _share("rho", rho)


def _apgd_update_(*arguments: Any) -> None:
    _check_update(*arguments)
    (native if backend.serves_natively(arguments[0]) else reference).apgd_update(*arguments)


define(_apgd_update_, lambda *_: None, like=reference.apgd_update)
