"""What every op asks of its arguments, whichever backend serves it. No tensor value is read: nothing synchronises."""

from __future__ import annotations

import operator
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, one_of

NORMS = ("Linf", "L2", "L1")
ITERATE_DTYPES = (torch.float32, torch.float64)
FLOAT32 = torch.finfo(torch.float32).max
LARGEST = {torch.float32: FLOAT32, torch.float64: sys.float_info.max}
GRAD_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def norm(name: str) -> None:
    """Accepts the norms that the ops know."""
    if name not in NORMS:
        if not isinstance(name, str):
            raise InputTypeError(f"norm is {described(name)}; it must be a string")
        one_of("norm", name, NORMS)


def images(name: str, x: Tensor) -> None:
    """A floating tensor [N, ...] that an iterate can live in."""
    if x.dtype not in ITERATE_DTYPES:
        raise InputTypeError(f"{name} is {x.dtype}; allowed are torch.float32 and torch.float64")
    if x.dim() < 1:
        raise InputError(f"{name} has no batch dimension; it must have shape [N, ...]")


def same_as(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` has the shape and device of x."""
    if tensor.shape != x.shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must match x, {list(x.shape)}")
    if tensor.device != x.device:
        raise InputError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")


def iterate(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` is like x in shape, device and dtype."""
    same_as(name, tensor, x)
    if tensor.dtype != x.dtype:
        raise InputTypeError(f"{name} is {tensor.dtype}; it must have x's dtype, {x.dtype}")


def gradient(grad: Tensor, x: Tensor) -> None:
    """A gradient of x, possibly in lower precision."""
    same_as("grad", grad, x)
    if grad.dtype not in GRAD_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in GRAD_DTYPES)
        raise InputTypeError(f"grad is {grad.dtype}; allowed are {allowed}")


def planes(x: Tensor, w: Tensor, b: Tensor, at: Tensor | None) -> None:
    """Planes of points x: w in any float type, at like it but in x's dtype, b a value for each, in x's dtype."""
    count = w.shape[0] if w.dim() else 0
    if w.dim() != x.dim() or w.shape[1:] != x.shape[1:] or (x.shape[0] % count if count else x.shape[0]):
        raise InputError(
            f"w has shape {list(w.shape)}; it must be one plane for each point of x, {list(x.shape)}, or for every "
            "N-th of them"
        )
    if w.dtype not in GRAD_DTYPES:
        raise InputTypeError(f"w is {w.dtype}; allowed are {', '.join(map(str, GRAD_DTYPES))}")
    for name, tensor, shape in (("b", b, w.shape[:1]), ("at", at, w.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise InputError(f"{name} has shape {list(tensor.shape)}; beside w it must be {list(shape)}")
        if tensor.dtype != x.dtype:
            raise InputTypeError(f"{name} is {tensor.dtype}; it must have x's dtype, {x.dtype}")
    for name, tensor in (("w", w), ("b", b), ("at", at)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")


def written(name: str, out: Tensor, **inputs: Tensor | None) -> None:
    """`out` can be written in place: no two of its elements, and no element of an input, lie in one place."""
    without_overlap(name, out)
    apart(name, out, **inputs)


def without_overlap(name: str, out: Tensor) -> None:
    """No two elements of `out` lie in one place, as those of an expanded tensor do."""
    if not out.is_contiguous() and _overlaps(out):
        raise InputError(
            f"{name} has shape {list(out.shape)} and stride {out.stride()}, so that elements of it lie in one place; "
            "it is written in place: pass a clone"
        )


def apart(written: str, out: Tensor, **inputs: Tensor | None) -> None:
    """No input shares memory with `out`, which an op writes while it reads them."""
    storage = out.untyped_storage().data_ptr()
    for name, tensor in inputs.items():
        if tensor is None or tensor.untyped_storage().data_ptr() != storage:
            continue
        (first, end), (other_first, other_end) = _memory(out), _memory(tensor)
        if first < other_end and other_first < end:
            raise InputError(f"{name} shares memory with {written}, which is written in place; pass a clone of {name}")


def setting(name: str, value: float, values: Tensor | None, x: Tensor, *, signed: bool = False) -> None:
    """A step or radius: one finite number, or a tensor [N] of them in x's dtype and on its device."""
    if values is None:
        if (not -FLOAT32 <= value <= FLOAT32 and not abs(value) <= LARGEST[x.dtype]) or (value < 0 and not signed):
            raise InputError(f"{name} is {value}; it must be a finite number{'' if signed else ' >= 0'} of {x.dtype}")
        return
    if values.shape != (x.shape[0],):
        raise InputError(f"{name} has shape {list(values.shape)}; per-sample values need [{x.shape[0]}]")
    if not values.is_contiguous():
        raise InputError(f"{name} has stride {values.stride()}; per-sample values must be contiguous")
    if values.dtype != x.dtype or values.device != x.device:
        raise InputTypeError(f"{name} is {values.dtype} on {values.device}; it must be {x.dtype} on {x.device}, like x")


def share(name: str, value: float, values: Tensor | None, x: Tensor) -> None:
    """A share of the elements: one number in (0, 1], or a tensor [N] of them in x's dtype and on its device."""
    setting(name, value, values, x, signed=True)
    if values is None and not 0 < value <= 1:
        raise InputError(f"{name} is {value}; it must be in (0, 1]")


def bounds(low: float, high: float) -> None:
    """The box that images live in."""
    if not low < high:
        raise InputError(f"bounds are ({low}, {high}); low must be less than high")


def box(low: float, high: float, x: Tensor) -> None:
    """Bounds in the range of x's dtype; a side may be infinite."""
    bounds(low, high)
    if low >= -FLOAT32 and high <= FLOAT32:
        return
    largest = LARGEST[x.dtype]
    if (low < -largest and low != -torch.inf) or (high > largest and high != torch.inf):
        raise InputError(f"bounds are ({low}, {high}); they must be numbers of {x.dtype}")


def counter(name: str, value: int) -> None:
    """A seed or index of the random generator."""
    if not 0 <= value < 2**63:
        raise InputError(f"{name} is {value}; it must be in [0, 2**63)")


def key(name: str, value: Tensor | None, x: Tensor) -> None:
    """A seed that lies on the device; its value is not looked at."""
    if value is None:
        return
    if value.dtype != torch.int64 or value.device != x.device:
        raise InputTypeError(f"{name} is {value.dtype} on {value.device}; it must be torch.int64 on {x.device}, like x")
    if value.dim():
        raise InputError(f"{name} has shape {list(value.shape)}; as a tensor it must be a single number, of shape []")


def _memory(x: Tensor) -> tuple[int, int]:
    """First and one past last byte that x touches."""
    if not x.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _overlaps(x: Tensor) -> bool:
    """Whether two elements of x lie in one place."""
    steps = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each dimension steps over all that the smaller ones hold
    if not x.numel():
        return False
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in steps:
        places = (places[..., None] + stride * torch.arange(size, dtype=torch.int64, device="cpu")).flatten()
    return len(places.unique()) < len(places)


# --- Settings: one number for the batch or one per sample, and how the schemas carry them ---------------------------

Setting = float | Tensor
Bounds = tuple[float, float]


def detached(x: Any) -> Any:
    """x as autograd's bystander: same memory, same version counter. Cheaper than entering no_grad."""
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def split_setting(name: str, setting: Setting) -> tuple[float, Tensor | None]:
    """A setting as the pair the schemas carry: one number, or one per sample.

    Raises:
        InputTypeError: it is neither a number nor a tensor.
    """
    if type(setting) is float:
        return setting, None
    if isinstance(setting, Tensor):
        return 0.0, detached(setting)
    return number(name, setting, "a number, or a tensor with one for each sample"), None


def number(name: str, value: Any, allowed: str = "a number") -> float:
    """A real number of Python's or NumPy's as a float.

    Raises:
        InputTypeError: it is something else; True and False are no numbers.
        InputError: it is an integer beyond all floats.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} is {_kind(value)}; it must be {allowed}")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{name} is an integer that no float holds; it must be a finite number") from error


def integer(name: str, value: Any) -> int:
    """An integer of Python's or NumPy's.

    Raises:
        InputTypeError: it is something else; True and False are no numbers.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputTypeError(f"{name} is {_kind(value)}; it must be an integer")
    return operator.index(value)


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, bool | float) else described(value)


def split_bounds(bounds: Bounds) -> tuple[float, float]:
    """The lowest and highest value of an image.

    Raises:
        InputTypeError, InputError: `bounds` is not a pair of numbers.
    """
    if type(bounds) is tuple and len(bounds) == 2 and type(bounds[0]) is float and type(bounds[1]) is float:
        return bounds
    if not isinstance(bounds, tuple | list):
        raise InputTypeError(f"bounds are {described(bounds)}; they must be a pair of numbers (low, high)")
    if len(bounds) != 2:
        raise InputError(f"bounds are {len(bounds)} values; they must be a pair of numbers (low, high)")
    return number("the low bound", bounds[0]), number("the high bound", bounds[1])


def described(value: object) -> str:
    """A value of a type that is not allowed, in an error."""
    return "None" if value is None else f"a {type(value).__name__}"
