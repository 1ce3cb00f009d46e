"""How an op is made known to torch, and how it is called: the one way for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from afd.errors import AfdError, InputError, InputTypeError
from afd.ops import ambient

LIBRARY = torch.library.Library("afd", "DEF")  # lives as long as the process


def define(
    name: str, arguments: str, results: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Any = None
) -> None:
    """Registers ``name(arguments) -> results`` on CPU and CUDA.

    Args:
        name: of the op.
        arguments: with their types, as schemas have them.
        results: their types.
        kernel: what serves it; runs out of reach of ambient modes.
        fake: what stands for it where tensors hold no memory.
        autograd: what runs above it where gradients are wanted.
    """
    LIBRARY.define(f"{name}({arguments}) -> {results}")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, ambient.unaffected(kernel), device)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    op = getattr(torch.ops.afd, name).default
    if op._schema.is_mutable:
        for key in ("Negative", "Conjugate"):
            LIBRARY.impl(name, _without_lazy_signs(op), key)

    def on_one_device(*given: Any) -> Any:
        _one_device(op, given)
        return fake(*given)

    torch.library.register_fake(f"afd::{name}", on_one_device, lib=LIBRARY)


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments); where torch cannot take them, the error names the argument.

    Raises:
        InputTypeError, InputError: of the op, or in the place of torch's own words.
    """
    try:
        return op(*arguments)
    except AfdError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # None passes for a tensor with torch
        _blame(op, arguments, error)
        raise


def _without_lazy_signs(op: Any) -> Callable[..., Any]:
    """The op for views whose memory holds other numbers than they do: torch's own fallback would write to a copy."""

    def run(*given: Any) -> Any:
        resolved = []
        for argument, value in zip(op._schema.arguments, given, strict=False):
            if isinstance(value, Tensor) and (value.is_neg() or value.is_conj()):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    raise InputError(
                        f"{argument.name} is a view with a lazy sign; it is written in place: pass a clone"
                    )
                value = value.resolve_neg().resolve_conj()
            resolved.append(value)
        return op(*resolved)

    return run


# --- Whose fault it is ----------------------------------------------------------------------------------------------

_ALLOWED = {
    "Tensor": (Tensor, "a torch.Tensor"),
    "float": (float | int, "a number"),
    "number": (float | int, "a number"),
    "int": (int, "an integer"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
}


def _one_device(op: Any, given: tuple[Any, ...]) -> None:
    (first, tensor), *others = _tensors(op, given)
    for name, other in others:
        if other.device != tensor.device:
            raise InputError(f"{name} is on {other.device}; it must be on {first}'s device, {tensor.device}")


def _named(op: Any, given: tuple[Any, ...]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and type of each argument, those in lists one by one."""
    for argument, value in zip(op._schema.arguments, given, strict=False):
        kind = str(argument.type)
        if kind.startswith("Optional["):
            if value is None:
                continue
            kind = kind.removeprefix("Optional[").removesuffix("]")
        if kind.startswith("List[") and isinstance(value, list | tuple):
            kind = kind.removeprefix("List[").removesuffix("]")
            yield from ((f"{argument.name}[{i}]", entry, kind) for i, entry in enumerate(value))
        else:
            yield argument.name, value, kind


def _tensors(op: Any, given: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value, _ in _named(op, given) if isinstance(value, Tensor)]


def _blame(op: Any, given: tuple[Any, ...], error: Exception) -> None:
    """Raises what the user can mend, if that is what `error` comes from."""
    for name, value, kind in _named(op, given):
        allowed, words = _ALLOWED.get(kind, (list, "a list"))
        if not isinstance(value, allowed):
            raise InputTypeError(f"{name} is {described(value)}; it must be {words}") from error
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{name} is {value}; it must be an integer of 64 bits") from error
    tensors = _tensors(op, given)
    for name, tensor in tensors:
        if odd := _oddity(tensor):
            raise InputTypeError(f"{name} is {odd}; it must be an ordinary, dense tensor") from error
    blame_inference(error, tensors)


def blame_inference(error: Exception, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises InputError if `error` is torch's about a tensor made in inference mode; the message names it."""
    if "nference" not in str(error):
        return
    made = [name for name, tensor in tensors if tensor is not None and tensor.is_inference()]
    if made:
        raise InputError(
            f"{made[0]} was made in torch.inference_mode; outside of it no gradient goes through such a tensor and "
            "nothing is written to it: make it elsewhere, or pass a clone"
        ) from error


def _oddity(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"laid out as {tensor.layout}"
    return f"quantised ({tensor.dtype})" if tensor.is_quantized else ""


def described(value: object) -> str:
    """A value of a type that is not allowed, in an error."""
    return "None" if value is None else f"a {type(value).__name__}"
