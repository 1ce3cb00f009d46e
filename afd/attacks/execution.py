"""How an attack is carried out, apart from what it computes: memory layout, precision, and pieces of the batch.

Samples are independent, so on a CPU all steps of one piece of the batch run before the next: the piece is small enough
that the network's activations stay in the caches between layers. None of this changes what is computed beyond rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from afd.attacks.inputs import count
from afd.attacks.python_state import snapshot
from afd.errors import InputTypeError, one_of
from afd.nn.modes import Buffers, eager
from afd.ops import backend

PRECISIONS = ("fp32", "bf16", "auto")
ACTIVATION_BYTES = 24 << 20  # of one piece: a few MiB a core stay in its own cache, the rest in the shared one
LEAST_PIECE = 64  # below it, the cost of calling each layer shows

_bytes_per_sample = WeakIdKeyDictionary()  # by model, whatever it equals: by precision and shape of a sample


class Running(TypedDict, total=False):
    """The settings that say how an attack runs, never what it computes; `afd.attacks.AttackSettings` describes them."""

    precision: str | None
    piece: int | None
    look: bool
    fold: bool


def check_execution(precision: str | None, piece: int | None) -> int | None:
    """The piece; raises InputError or InputTypeError unless both are allowed."""
    if precision is not None:
        one_of("precision", precision, PRECISIONS)
    return None if piece is None else count("piece", piece, 1)


def check_running(settings: Mapping[str, object]) -> None:
    """Raises InputTypeError unless all are among `Running`: what else an attack settles itself."""
    for name in settings:
        if name not in Running.__annotations__:
            raise InputTypeError(
                f"{name} is no setting of this attack; it takes its own and {', '.join(Running.__annotations__)}"
            )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which the model runs: bfloat16 arithmetic if asked for (auto: where the device is fast at it)."""
    low = precision == "bf16" or (precision == "auto" and backend.fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def channels_last(x: Tensor, model: nn.Module | None = None) -> Tensor:
    """x in the layout that convolutions are fastest in, where it is a batch of images [N, C, H, W].

    Args:
        x: any batch.
        model: that is shown it; in the usual layout, if `unsafe_channels_last` says so on x's device.
    """
    if x.dim() != 4:
        return x
    if model is not None and unsafe_channels_last(model, x.device):
        return x.contiguous()
    _, channels, height, width = x.shape
    if channels > 1:
        return x.contiguous(memory_format=torch.channels_last)
    # one channel: both layouts lie in memory alike, and only the strides can say which is meant
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))


def unsafe_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether the model has a convolution whose backward may crash the process where images lie channels-last.

    On CPUs, oneDNN's backward of a 1x1 convolution with a stride writes beyond its memory if the input has from 2
    channels to fewer than a register has floats, and pixels beyond the last one that the stride meets (torch 2.13;
    float32, several images, one group, no padding). Image sizes are not known here, so they are taken for such ones.
    """
    if device.type != "cpu":
        return False
    register = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and 1 < layer.in_channels < register
        and layer.groups == 1
        for layer in model.modules()
    )


def pieces(model: nn.Module, x: Tensor, piece: int | None = None, precision: str = "fp32") -> Iterator[slice]:
    """Rows of x to attack together, in order.

    Args:
        model: in evaluation mode.
        x: images [N, ...], N >= 1.
        piece: rows at most; None lets the size of the model's activations decide (on CUDA, and where they cannot be
            seen, as in a compiled model, or somebody's hooks would see the looking: the whole batch).
        precision: that the model runs in: activations in bfloat16 are half as large.
    """
    samples = x.shape[0]
    if piece is None and (x.is_cuda or samples <= LEAST_PIECE or not eager(model) or _listened_to(model)):
        piece = samples
    elif piece is None:
        piece = max(LEAST_PIECE, ACTIVATION_BYTES // _activation_bytes(model, x, precision))
    size = math.ceil(samples / math.ceil(samples / piece))  # pieces of equal size
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def _activation_bytes(model: nn.Module, x: Tensor, precision: str) -> int:
    """Bytes that the model's layers put out for one sample, found by one forward without a trace, and remembered."""
    known: dict[tuple[str | int, ...], int] = _bytes_per_sample.setdefault(model, {})
    kind = (precision, *x.shape[1:])
    if kind not in known:
        sizes: list[int] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                sizes.append(output.numel() * output.element_size())

        layers = [module for module in model.modules() if next(module.children(), None) is None]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            with torch.no_grad(), autocast(precision, x.device), without_trace(model):
                model(x[:1].clone())
        except Exception:  # it may take no single image; what else is wrong, the attack's own forward will say
            sizes = [ACTIVATION_BYTES]
        finally:
            for hook in hooks:
                hook.remove()
        known[kind] = max(1, sum(sizes))
    return known[kind]


def draws(device: torch.device) -> Callable[[], None]:
    """What puts torch's generators, the CPU's and that of a device, back to where they are now."""
    kept = torch.get_rng_state()
    on_cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    on_device = torch.cuda.get_rng_state(device) if on_cuda else None

    def put_back() -> None:
        torch.set_rng_state(kept)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return put_back


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """The body leaves a model's attributes and buffers, and what draws at random on the CPU, as they were."""
    drawn, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    buffers, restore = Buffers(list(model.modules())), snapshot(model)
    try:
        yield
    finally:
        restore()
        buffers.put_back()
        torch.set_rng_state(drawn)
        random.setstate(python)
        np.random.set_state(numpy)


def _listened_to(model: nn.Module) -> bool:
    """Whether somebody's hooks are told of each forward; those of torch and of this library only compute."""
    kinds = [hooks for layer in model.modules() for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
    kinds += [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
    hooks = [hook for kind in kinds for hook in kind.values()]
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] not in ("torch", "afd") for hook in hooks)
