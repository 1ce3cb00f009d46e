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
import itertools
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
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


UNSEEN = {"data", "numpy", "storage", "untyped_storage", "set_", "data_ptr"}  # writes by these are not counted
HARMLESS = {*sys.stdlib_module_names, "torch", "numpy"}  # packages that write to no weights by themselves
OF_MODULES = {*ELSEWHERE, "_modules"}
LIBRARIES = {"afd", "timm", "torchvision"}  # of which only the code of forwards counts


def writes_unseen(model: nn.Module) -> bool:
    """Whether what a model's forward or a hook may run reaches for ``.data`` or the like: such writes are not counted.

    That is, of somebody's own: what the layers' forwards and hooks name, what that names, and so on; methods by their
    names, whoever has them, and all those of other objects that are held by layers or named.
    """
    reach = _Reach()
    for layer in model.modules():
        reach.meet_class(type(layer))
        for name, value in vars(layer).items():
            kind = type(value)
            if kind not in ATOMS and name not in OF_MODULES and (kind is not OrderedDict or value):
                reach.meet(value)
    return reach.finds()


class _Reach:
    """Code that may run, by the names that it mentions.

    Attributes:
        methods: of all classes met, by name.
        names: mentioned so far.
        waiting: functions that are to be read.
    """

    def __init__(self) -> None:
        self.methods: dict[str, list[FunctionType]] = {}
        self.names, self.waiting, self._met = set[str](), list[FunctionType](), dict[Hashable, Any]()

    def finds(self) -> bool:
        """Whether any of it mentions what is `UNSEEN`."""
        while self.waiting:
            function = self.waiting.pop()
            is_library = _package(function) in LIBRARIES
            names = _names(function.__code__)
            if "data" in names or not (is_library or UNSEEN.isdisjoint(names)):
                return True
            for name in names - self.names:
                self.names.add(name)
                self._wait(self.methods.get(name, ()))
            cells = function.__closure__ or ()
            given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            held = [*(cell.cell_contents for cell in cells if _is_filled(cell)), *given]
            for value in (*held, *(function.__globals__.get(name) for name in names)):
                if isinstance(value, FunctionType) or not is_library:
                    self.meet(value, names)
        return False

    def meet(self, value: Any, names: frozenset[str] = frozenset()) -> None:
        """A value that may be used, of a module what has one of these names."""
        kind = type(value)
        if kind in ATOMS or kind is float or kind in PROXIES or isinstance(value, Tensor):
            return
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in {*HARMLESS, *LIBRARIES}:
                for name in names:
                    if name in vars(value) and self._is_new((id(value), name), value):
                        self.meet(vars(value)[name], names)
            return
        if not self._is_new(id(value), value):
            return
        functions = _functions(value)
        if functions:
            self._wait(functions)
            self.meet(getattr(value, "__self__", None))
        elif isinstance(value, CONTAINERS):
            for one in itertools.islice(value.values() if isinstance(value, dict) else value, LARGEST):
                self.meet(one)
        elif isinstance(value, functools.partial):
            self.meet([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, type):
            self.meet_class(value)
        else:
            self.meet_class(kind)
            if not isinstance(value, nn.Module) and _package(kind) not in {*HARMLESS, *LIBRARIES}:
                self.meet(getattr(value, "__dict__", None))

    def meet_class(self, kind: type) -> None:
        """What objects of it may run: of modules their forward and what is called without a name."""
        if not self._is_new((id(kind), "class"), kind):
            return
        is_layer = issubclass(kind, nn.Module)
        for base in kind.__mro__:
            package = _package(base)
            if package in HARMLESS:
                continue
            for name, member in vars(base).items():
                functions = _functions(member)
                self.methods.setdefault(name, []).extend(functions)
                special = name.startswith("__") and name not in ("__init__", "__new__")
                runs = package not in LIBRARIES and (special or not is_layer)
                if runs or name == "forward" or name in self.names:
                    self._wait(functions)

    def _wait(self, functions: Iterable[FunctionType]) -> None:
        fresh = [one for one in functions if _package(one) not in HARMLESS and self._is_new((id(one), "read"), one)]
        self.waiting += fresh

    def _is_new(self, key: Hashable, value: object) -> bool:
        """Whether a value is met for the first time; it is kept alive, so that no other takes its address."""
        if key in self._met:
            return False
        self._met[key] = value
        return True


def _functions(member: Any) -> list[FunctionType]:
    """What an attribute of a class runs, or a function itself, wrapped or not."""
    if isinstance(member, property):
        found = [member.fget, member.fset]
    elif isinstance(member, functools.cached_property):
        found = [member.func]
    elif isinstance(member, FunctionType):
        found = [member]
    elif isinstance(member, staticmethod | classmethod | MethodType):
        found = [member.__func__]
    else:
        found = [vars(member).get("__wrapped__")] if isinstance(member, functools._lru_cache_wrapper) else []
    return [one for one in found if isinstance(one, FunctionType)]


def _package(one: Any) -> str:
    return str(one.__module__).partition(".")[0]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """All names that a code mentions; also those that it asks for as strings."""
    names: set[str] = set()
    for one in codes_in(code):
        names.update(one.co_names)
        if "getattr" in one.co_names:
            names.update(constant for constant in one.co_consts if isinstance(constant, str))
    return frozenset(names)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code and those of all functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)
