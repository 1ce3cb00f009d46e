"""Key of all that torch's flags and a model hold in Python, where a captured CUDA graph does not see it change.

A replay runs no Python. So a graph is captured for one state of all that a model's code could branch on or bake in:
torch's flags, and of every module its mode, its hooks and its plain attributes (numbers, strings, booleans, None,
containers of these, and those of the objects that it holds, such as a config). What lies outside of a model, in
globals, closures and classes, is not seen here.
"""

from __future__ import annotations

import copy
import enum
import functools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

State = frozenset[tuple[tuple[str, str], Hashable]]  # of modules' attributes and what they are

ELSEWHERE = {  # tensors, which `places` has, and what no forward runs
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip
ATOMS = {bool, int, str, bytes, type(None), complex, torch.dtype, torch.device, torch.layout}
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
LARGEST = 4096  # values that one attribute may hold in all; what is more is taken as itself
DEEPEST = 8  # containers within containers, likewise


class Same:
    """Equal to what stands for the very same object, which it keeps alive, so that no other takes its address."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def flags() -> tuple[Hashable, ...]:
    """torch's own settings that decide what a model's code launches, ambient modes included."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return (
        _float32_precision(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        (torch.get_default_dtype(), torch.get_default_device()),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()),
        tuple(key_of(hooks) for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_")),
    )


def places(*modules: nn.Module) -> tuple[int, ...]:
    """Where every weight and buffer lies in memory."""
    return tuple(tensor.data_ptr() for module in modules for tensor in (*module.parameters(), *module.buffers()))


def state_of(*modules: nn.Module, tensors: bool = False) -> State:
    """Mode, class, hooks, submodules and plain attributes of modules and of all that is in them.

    Args:
        modules: whose.
        tensors: whether tensors that are plain attributes count, by their place in memory; many models keep an
            activation so.
    """
    found: list[tuple[tuple[str, str], Hashable]] = []
    for number, module in enumerate(modules):
        for name, layer in module.named_modules(prefix=f"player {number}" if number else ""):
            found.append(((name, ""), (Same(layer), type(layer))))
            found += [
                ((name, attribute), key_of(value, tensors=tensors))
                for attribute, value in vars(layer).items()
                if attribute not in ELSEWHERE
            ]
    return frozenset(found)


def changed(before: State, after: State) -> set[tuple[str, str]]:
    """The modules' attributes in which two states differ."""
    return {name for name, _ in before ^ after}


def named(attribute: tuple[str, str]) -> str:
    """A module's attribute in words."""
    module, name = attribute
    return f"the attribute {name!r} of {module or 'the model'}"


def key_of(value: Any, *, tensors: bool = False) -> Hashable:
    """What equals that of another value only if no code could tell the two apart; most objects are taken as themselves.

    An object that is met on the way, such as a config, is followed one step, into its attributes.
    """
    kind = type(value)
    if kind in ATOMS:
        return kind, value
    if kind is OrderedDict and not value:  # most of what a module holds: hooks that nobody has registered
        return kind, ()
    return _Keys(tensors).of(value)


class _Keys:
    """The keys of all that one value holds.

    Args:
        tensors: whether tensors differ by their place in memory, or are all alike.
    """

    def __init__(self, tensors: bool) -> None:
        self.tensors, self.left = tensors, LARGEST

    def of(self, value: Any, depth: int = 0, follow: bool = True) -> Hashable:
        """The key of a value that lies so deep; `follow`: into an object's attributes."""
        kind: Any = type(value)
        if kind in ATOMS:
            return kind, value
        if kind is float:
            return kind, repr(value)  # NaN equals itself, 0 is not -0
        if kind in PROXIES:  # of which nothing may be asked
            return Same(value)
        if isinstance(value, CONTAINERS):
            return self._of_container(kind, value, depth, follow)
        if isinstance(value, enum.Enum):
            return Same(value)
        if isinstance(value, int | float | str | bytes):  # of a class of its own
            return kind, repr(value)
        if isinstance(value, Tensor):
            return place_of(value) if self.tensors else Tensor
        if isinstance(value, np.ndarray | np.generic):
            self.left -= value.size
            return (kind, value.shape, value.dtype.str, value.tobytes()) if self.left > 0 else Same(value)
        if isinstance(value, MethodType):  # made anew whenever it is asked for
            return Same(value.__self__), Same(value.__func__)
        if follow and not isinstance(value, nn.Module | FunctionType | ModuleType | type):
            attributes = getattr(value, "__dict__", {})
            return Same(value), self._of_container(dict, attributes, depth, follow=False)
        return Same(value)

    def _of_container(self, kind: Any, value: Any, depth: int, follow: bool) -> Hashable:
        self.left -= len(value)
        if self.left < 0 or depth == DEEPEST:
            return Same(value), len(value)
        if isinstance(value, dict):
            value = [item for pair in value.items() for item in pair]
        keys = [self.of(held, depth + 1, follow) for held in value]
        return kind, frozenset(keys) if isinstance(value, set | frozenset) else tuple(keys)


def place_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Where a tensor lies in memory, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def snapshot(*modules: nn.Module) -> Callable[[], None]:
    """What puts back the attributes of modules and of all that is in them, buffers and parameters included.

    They are put back as objects, and containers with what they held; the values of tensors stay as they are.
    """
    kept = []
    for layer in (layer for module in modules for layer in module.modules()):
        own = dict(vars(layer))
        held = {name: copy.copy(value) for name, value in own.items() if type(value) in (dict, OrderedDict, list, set)}
        kept.append((layer, own, held))

    def restore() -> None:
        for layer, own, held in kept:
            vars(layer).clear()
            vars(layer).update(own)
            for name, content in held.items():
                own[name].clear()
                (own[name].extend if isinstance(content, list) else own[name].update)(content)

    return restore


@contextmanager
def in_place(*modules: nn.Module) -> Iterator[None]:
    """What the body puts in the place of tensors, attributes or buffers, is copied into those, if it is of their form.

    A graph reads and writes memory: a running mean that a model keeps as ``self.mean = ...`` must stay where it is.
    """
    layers = [layer for module in modules for layer in module.modules()]
    before = [
        (holder, name, value)
        for layer in layers
        for holder in (vars(layer), layer._buffers)
        for name, value in holder.items()
        if isinstance(value, Tensor)
    ]
    yield
    for holder, name, old in before:
        new = holder.get(name)
        if new is not old and isinstance(new, Tensor) and place_of(new)[1:] == place_of(old)[1:]:
            with torch.no_grad():
                old.copy_(new)
            holder[name] = old


def _float32_precision() -> tuple[object, ...]:
    """Whether TF32 serves; torch 2.9 and later, once told by the newer names, refuse to be asked by the older ones."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv") and hasattr(backends.cuda.matmul, "fp32_precision"):
        asked = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
        return tuple(one.fp32_precision for one in asked)
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


_for_all = [hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and "ward" in name]


def watched(*own: type) -> bool:
    """Whether something but modes of these types stands around all layers: it may tell one layer from two."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._len_torch_function_stack():  # a default device is one
        return any(type(mode) not in (DeviceContext, *own) for mode in _get_current_function_mode_stack())
    return any(_for_all)


@functools.cache
def writes_unseen(kind: Any) -> bool:
    """Whether what a class of somebody's own runs in its forward reaches for ``.data``: such writes are not counted."""
    forward = vars(kind).get("forward", getattr(kind, "forward", None))
    if kind.__module__.partition(".")[0] == "torch" or not isinstance(forward, FunctionType):
        return False
    known, waiting = set(), [forward]
    while waiting:
        function = waiting.pop()
        if function in known or function.__module__.partition(".")[0] == "torch":
            continue
        known.add(function)
        for code in codes_in(function.__code__):
            if "data" in code.co_names:
                return True
            called = (getattr(kind, name, function.__globals__.get(name)) for name in code.co_names)
            waiting += [one for one in called if isinstance(one, FunctionType)]
    return False


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code and those of all functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)
