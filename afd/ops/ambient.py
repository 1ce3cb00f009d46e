"""What a call stands in (autocast, modes of torch, transforms), and how afd's results are kept out of it.

A kernel is handed addresses, so what torch functions make on the way to it must be what they make everywhere. Every op
is registered through `unaffected` (by `afd.ops.library`), as is whatever runs outside of an op: the passes of autograd
and the fused network. The default dtype and device cannot be shut out; whoever makes a tensor names both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

Result = TypeVar("Result")

# Asked at every call, so found once.
_autocast = torch._C._is_any_autocast_enabled
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_transforms, _keys_of = torch._C._functorch.peek_interpreter_stack, torch._C._dispatch_keys


def unaffected(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, out of reach of autocast and of modes that intercept torch functions (a default device is one)."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        if not (_autocast() or _function_modes()):
            return function(*arguments)
        with torch._C._DisableAutocast(), torch._C.DisableTorchFunction():
            return function(*arguments)

    return run


def room(like: Tensor, *shape: int) -> Tensor:
    """Memory for a kernel to write, beside `like` and of its dtype, whatever mode looks on."""
    if not _dispatch_modes():
        return like.new_empty(shape)
    with _disable_current_modes():
        return like.new_empty(shape)


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it."""
    if x.is_contiguous():
        return x
    return room(x, *x.shape).copy_(x)


def widened(x: Any, weight: Tensor) -> Any:
    """Half-precision x in the weight's precision, if autocast made it; x itself otherwise.

    Torch's own float32-only functions do the same under autocast, and nobody outside of it.
    """
    if not (_autocast() and isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return x
    wide = weight.dtype in (torch.float32, torch.float64) and x.dtype in (torch.float16, torch.bfloat16)
    return x.to(weight.dtype) if wide and torch.is_autocast_enabled(x.device.type) else x


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, which only formulas can follow."""
    if torch.compiler.is_compiling():
        return False
    return _transforms() is not None or forward_ad._current_level >= 0


# --- Tensors that hold memory ---------------------------------------------------------------------------------------


def _keys(device: torch.device) -> set[int]:
    """Dispatch keys of an ordinary tensor, and of one made in inference mode."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_keys_of(torch.empty(0, dtype=torch.float32, device=device)).raw_repr())
    return found


_ordinary = _keys(torch.device("cpu"))


def plain(*tensors: Tensor) -> bool:
    """Whether these hold memory and nobody looks on: their op need not be dispatched."""
    if torch.compiler.is_compiling() or _dispatch_modes() or transformed():
        return False
    for x in tensors:  # by their properties: a network has many, and asking for their keys takes thrice as long
        kind = type(x)
        if not (kind is Parameter or kind is Tensor) or x.layout is not torch.strided or x.is_neg():
            return False
        if not (x.is_cpu or x.is_cuda) or x.is_nested:
            return False
    return True


def ordinary(x: Tensor) -> bool:
    """Whether this is a dense tensor with memory of its own on CPU or GPU, in no disguise.

    Sparse, nested, quantised and meta tensors, those of transforms, views with a lazy sign and zeros without memory are
    not.
    """
    if type(x) is not Tensor and type(x) is not Parameter:
        return False
    return _keys_of(x).raw_repr() in _ordinary or (x.is_cuda and _ordinary_on_gpu(x))


def _ordinary_on_gpu(x: Tensor) -> bool:
    _ordinary.update(_keys(x.device))
    return _keys_of(x).raw_repr() in _ordinary
