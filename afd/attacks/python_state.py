"""What of torch and of a model lives in Python, where a recorded graph does not see it change.

A replay runs no Python. So a recording is made for one state of all that a model's code could branch on or bake in:
torch's flags, and of every module its mode, its hooks and its plain attributes (numbers, strings, booleans, None,
containers of these, and those of the objects that it holds, such as a config). What lies outside of a model, in
globals, closures and classes, is not seen here.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = frozenset[tuple[tuple[str, str], Hashable]]  # of modules' attributes and what they are

ELSEWHERE = {  # tensors, which `places` has, and what no forward runs
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip
ATOMS = {bool, int, str, bytes, type(None), complex, torch.dtype, torch.device, torch.layout}
DEEPEST, LARGEST = 8, 4096  # of containers within containers, and of items in one; else it is taken as itself


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


def state_of(*modules: nn.Module) -> State:
    """Mode, hooks, submodules and plain attributes of modules and of all that is in them.

    Tensors that are plain attributes are left out: many models keep an activation so.
    """
    found: list[tuple[tuple[str, str], Hashable]] = []
    for number, module in enumerate(modules):
        for name, layer in module.named_modules(prefix=f"player {number}" if number else ""):
            found.append(((name, ""), Same(layer)))
            found += [
                ((name, attribute), key_of(value))
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


def key_of(value: Any, depth: int = 0) -> Hashable:
    """What equals that of another value only if no code could tell the two apart; objects are taken as themselves."""
    kind: Any = type(value)
    if kind in ATOMS:
        return kind, value
    if isinstance(value, dict | list | tuple | set | frozenset) and not value:
        return kind, ()
    if isinstance(value, dict | list | tuple | set | frozenset) and (depth == DEEPEST or len(value) > LARGEST):
        return Same(value), len(value)
    if kind is float:
        return kind, repr(value)  # NaN equals itself, 0 is not -0
    if isinstance(value, dict):
        return kind, tuple((key_of(name, depth + 1), key_of(held, depth + 1)) for name, held in value.items())
    if isinstance(value, list | tuple):
        return kind, tuple(key_of(held, depth + 1) for held in value)
    if isinstance(value, set | frozenset):
        return kind, frozenset(key_of(held, depth + 1) for held in value)
    if isinstance(value, enum.Enum):
        return value
    if isinstance(value, Tensor):
        return Tensor, len(value.shape)
    if isinstance(value, np.ndarray | np.generic):
        return (kind, value.shape, value.dtype.str, value.tobytes()) if value.size <= LARGEST else Same(value)
    if isinstance(value, MethodType):  # made anew whenever it is asked for
        return Same(value.__self__), Same(value.__func__)
    if not depth and not isinstance(value, nn.Module | FunctionType | ModuleType | type):
        return Same(value), tuple(_plain_attributes(value))
    return Same(value)


def _plain_attributes(value: object) -> Iterator[tuple[str, Hashable]]:
    """Those of an object that a module holds; what those hold in turn is taken as it is."""
    for name, held in getattr(value, "__dict__", {}).items():
        yield name, key_of(held, 1)


def _float32_precision() -> tuple[object, ...]:
    """Whether TF32 serves; torch 2.9 and later, once told by the newer names, refuse to be asked by the older ones."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv") and hasattr(backends.cuda.matmul, "fp32_precision"):
        asked = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
        return tuple(one.fp32_precision for one in asked)
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
