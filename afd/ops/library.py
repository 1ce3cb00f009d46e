"""How an op is made known to torch, how it is called, and how its results are kept out of what a call stands in.

A kernel is handed addresses, so what torch functions make on the way to it must be what they make everywhere. Every op
is registered through `unaffected` (by `define`), as is whatever runs outside of an op: the passes of autograd and the
fused network. The default dtype and device cannot be shut out; whoever makes a tensor names both.
"""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from afd.errors import AfdError, InputError, InputTypeError
from afd.ops.checks import described, detached

LIBRARY = torch.library.Library("afd", "DEF")  # lives as long as the process
_kernels: dict[str, Callable[..., Any]] = {}  # by name, as they are registered


def define(
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    *,
    like: Callable[..., Any] | None = None,
) -> None:
    """Registers ``torch.ops.afd.NAME`` on CPU and CUDA, with the schema that its kernel's signature tells.

    Args:
        kernel: what serves it, called NAME or _NAME; runs out of reach of ambient modes.
        fake: what stands for it where tensors hold no memory.
        autograd: what runs above it where gradients are wanted.
        like: whose signature to take in place of the kernel's own.
    """
    name = kernel.__name__.removeprefix("_")
    signature = inspect.signature(like or kernel, eval_str=True)
    defaults = [parameter.default for parameter in signature.parameters.values()]
    LIBRARY.define(name + schema(signature))
    _kernels[name] = run = unaffected(kernel, defaults)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
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


Written = Annotated[Tensor, "written in place"]
_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[bool]: "bool[]", list[str]: "str[]",
    float: "float", int: "int", bool: "bool", str: "str",
}  # fmt: skip


def schema(signature: inspect.Signature) -> str:
    """A signature in torch's words: ``(Tensor(a!) x, float eps=0.1) -> ()``.

    `Written` stands for a tensor that is written in place, ``Annotated[list[bool], 3]`` for a list of that length.
    """
    arguments, marks = [], iter(string.ascii_lowercase)
    for name, parameter in signature.parameters.items():
        kind, default = parameter.annotation, parameter.default
        if kind == Written:
            words = f"Tensor({next(marks)}!)"
        elif get_origin(kind) is Annotated:
            of, length = get_args(kind)
            words = f"{_KINDS[of].removesuffix(']')}{length}]"
        else:
            words = _KINDS[kind]
        if default is not parameter.empty:
            name = f'{name}="{default}"' if isinstance(default, str) else f"{name}={default}"
        arguments.append(f"{words} {name}")
    results = signature.return_annotation
    if get_origin(results) is tuple:
        returned = f"({', '.join(_KINDS[of] for of in get_args(results))})"
    else:
        returned = "()" if results is None else _KINDS[results]
    return f"({', '.join(arguments)}) -> {returned}"


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


# --- Calls ----------------------------------------------------------------------------------------------------------

Arguments = tuple[Any, ...]  # of an op, in its schema's order
_NUMBERS = {float, int, bool, str, type(None)}
Parameters = list[inspect.Parameter]
P = ParamSpec("P")
Q = ParamSpec("Q")


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments); where torch cannot take them, the error names the argument.

    Raises:
        InputTypeError, InputError: of the op, or in the place of torch's own words.
    """
    try:
        return op(*arguments)
    except Exception as error:
        _blame(op, arguments, error)
        raise


def functional(arguments: Callable[P, Arguments]) -> Callable[P, Tensor]:
    """The function that calls ``torch.ops.afd.NAME``, from NAME, which makes its arguments of what a caller gives."""
    return _caller(arguments.__name__, arguments, _parameters(arguments), arguments.__doc__)


def in_place(function: Callable[P, Tensor], doc: str) -> Callable[P, Tensor]:
    """The same for ``torch.ops.afd.NAME_``: takes what `function` takes, and returns its first argument."""
    arguments: Callable[P, Arguments] = function.__wrapped__  # type: ignore[attr-defined]
    return _caller(f"{function.__name__}_", arguments, _parameters(function), doc)


def into(function: Callable[P, Tensor], doc: str) -> Callable[Concatenate[Tensor, P], Tensor]:
    """The same with an x_adv, which is only written, in front of what `function` takes."""
    read: Callable[P, Arguments] = function.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(read)
    def arguments(x_adv: Tensor, *given: P.args, **settings: P.kwargs) -> Arguments:
        return detached(x_adv), *read(*given, **settings)

    x_adv = inspect.Parameter("x_adv", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
    shown = [x_adv, *_parameters(function)]
    return _caller(f"{function.__name__}_", arguments, shown, doc)  # type: ignore[return-value]  # x_adv may be named


def _caller(name: str, arguments: Callable[Q, Arguments], shown: Parameters, doc: str | None) -> Callable[Q, Tensor]:
    """The function of that name, with what `help` shows of it.

    Where nobody looks on, it calls the kernel itself: torch's way there takes as long as a small batch's step.
    """
    op, kernel, first = getattr(torch.ops.afd, name).default, _kernels[name], shown[0].name
    writes = op._schema.is_mutable

    @functools.wraps(arguments)
    def run(*given: Q.args, **settings: Q.kwargs) -> Tensor:
        found = arguments(*given, **settings)
        try:  # as `call` does, with a frame less in every step
            made = (kernel if unseen(found) else op)(*found)
        except Exception as error:
            _blame(op, found, error)
            raise
        out: Any = made if not writes else given[0] if given else settings[first]
        return out  # type: ignore[no-any-return]

    run.__name__ = run.__qualname__ = name
    run.__doc__ = doc
    run.__signature__ = inspect.Signature(shown, return_annotation="Tensor")  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown} | {"return": "Tensor"}
    return run


def _parameters(function: Callable[..., Any]) -> Parameters:
    return list(inspect.signature(function).parameters.values())


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
    """Raises what the user can mend, if that is what `error` comes from and it does not say so itself."""
    kinds = (AttributeError, TypeError, ValueError, RuntimeError)  # None passes for a tensor with torch
    if isinstance(error, AfdError) or not isinstance(error, kinds):
        return
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


# --- Ambient modes: autocast, modes of torch, transforms ------------------------------------------------------------

Result = TypeVar("Result")

# Asked at every call, so found once.
_autocast = torch._C._is_any_autocast_enabled
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_profiled, _traced = torch._C._autograd._profiler_enabled, torch._C._get_tracing_state
_transforms, _keys_of = torch._C._functorch.peek_interpreter_stack, torch._C._dispatch_keys


def unaffected(function: Callable[..., Result], defaults: Sequence[Any] = ()) -> Callable[..., Result]:
    """The function, out of reach of autocast and of modes that intercept torch functions (a default device is one).

    Torch leaves out the last arguments of a call that are as the schema has them: they are taken from `defaults`, which
    holds one for each argument.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        if len(arguments) < len(defaults):
            arguments = (*arguments, *defaults[len(arguments) :])
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
    return not _observed() and all(map(_holds_memory, tensors))


def unseen(arguments: Arguments) -> bool:
    """Whether an op of these arguments need not be dispatched either: they are `plain`, and no profiler looks on."""
    if _observed() or _function_modes() or _profiled() or _traced():
        return False
    for value in arguments:  # by their types: asking whether something is a Tensor takes long where it is none
        if type(value) not in _NUMBERS and not (
            _holds_memory(value) and not value.is_inference() and not value.is_quantized
        ):
            return False
    return True


def _observed() -> bool:
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or transformed()


def _holds_memory(x: Any) -> bool:
    """By a tensor's properties: a network has many, and asking for their keys takes thrice as long."""
    kind = type(x)
    if not (kind is Tensor or kind is Parameter) or x.layout is not torch.strided or x.is_neg():
        return False
    return (x.is_cpu or x.is_cuda) and not x.is_nested


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
