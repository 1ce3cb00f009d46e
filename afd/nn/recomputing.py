"""Activation checkpointing: what lies inside of a network's blocks is computed anew in the backward pass, not kept.

One rule for networks of whatever library, as those that timm and transformers bring along differ in what they wrap, are
on in attacks or off, and have BatchNorm take a batch into its running statistics twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from afd.errors import InputError
from afd.nn.outputs import linear_layers

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LEAST = 2  # layers with weights of a block: what one of them keeps is no more than its input
FLAT = 8  # layers of a Sequential without blocks, from which on it is passed in parts


class Recomputing:
    """The blocks of a network, which keep only what enters them while a training pass runs.

    Blocks are the modules in the network's lists (ModuleList, Sequential, ModuleDict) that have at least two layers
    with weights. A block which itself holds a list of several alike, such as a stage of ResNet-like blocks, is looked
    into. A long list of single layers, as VGG's, is passed in about as many parts as each has layers. A network without
    lists is taken apart by the children of its outermost module. What holds the last linear layer is left out, as
    its inputs are kept anyway.

    Args:
        model: the network.

    Raises:
        InputError: the network has no such parts.
    """

    def __init__(self, model: nn.Module) -> None:
        head = [*linear_layers(model).values()][-1]
        held = {id(module) for module in model.modules() if any(one is head for one in module.modules())}
        self.blocks = [block for block in _blocks(model) if id(block) not in held]
        flat = [one for one in model.modules() if isinstance(one, nn.Sequential) and _is_flat(one)]
        inside = {id(one) for block in self.blocks for one in block.modules()} | held
        self.rows = [one for one in flat if id(one) not in inside]
        if not self.blocks and not self.rows:  # such as Inception's
            self.blocks = [one for one in model.children() if id(one) not in held and _layers(one) >= LEAST]
        if not self.blocks and not self.rows:
            raise InputError(
                f"checkpoint_activations is True, but the model is a {type(model).__name__} without blocks of several "
                "layers, whose activations could be computed anew"
            )

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """Inside, a forward with gradients keeps the activations between blocks only; its backward may come later."""
        with ExitStack() as stack:
            if not torch.is_grad_enabled():
                yield
                return
            for block in self.blocks:
                stack.enter_context(_forward_of(block, partial(_recomputed, block, block.forward)))
            for row in self.rows:
                stack.enter_context(_forward_of(row, partial(_in_parts, row)))
            yield


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks inside of a module, in order."""
    for child in module.children():
        inside = isinstance(module, LISTS) and not isinstance(child, LISTS) and _layers(child) >= LEAST
        if inside and not _is_stage(child):
            yield child
        else:
            yield from _blocks(child)


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds a list of several blocks alike."""
    for one in module.modules():
        if isinstance(one, LISTS):
            kinds = [
                type(child) for child in one.children() if not isinstance(child, LISTS) and _layers(child) >= LEAST
            ]
            if len(kinds) > 1 and len(set(kinds)) < len(kinds):
                return True
    return False


def _layers(module: nn.Module) -> int:
    """How many layers with weights of their own it has."""
    return sum(any(True for _ in one.parameters(recurse=False)) for one in module.modules())


def _is_flat(module: nn.Module) -> bool:
    children = list(module.children())
    single = all(next(child.children(), None) is None for child in children)
    return type(module) is nn.Sequential and single and len(children) >= FLAT and _layers(module) >= 2 * LEAST


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module's forward is another one."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """What a block's forward returns, of which only the inputs are kept; drawn numbers and BatchNorm's modes repeat."""
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsItWas(block)), **named
    )


def _in_parts(row: nn.Sequential, x: Tensor) -> Tensor:
    """What a list of single layers returns, in parts that begin with a layer with weights."""
    layers = list(row)
    weighted = [place for place, layer in enumerate(layers) if _layers(layer) and not isinstance(layer, _BatchNorm)]
    each = max(1, round(math.sqrt(len(weighted))))
    starts = [0, *weighted[each::each], len(layers)]
    for start, end in pairwise(starts):
        part = nn.Sequential(*layers[start:end])
        x = _recomputed(part, part.forward, x)
    return x


class _AsItWas:
    """Inside, a forward of a block leaves BatchNorm's running statistics alone, which its first one has renewed.

    It may be entered again, as a graph that is kept is gone through again.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.held: list[tuple[_BatchNorm, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        layers = [one for one in self.block.modules() if isinstance(one, _BatchNorm) and one.training]
        self.held = [(layer, layer.momentum, layer._buffers.get("num_batches_tracked")) for layer in layers]
        for layer, _, calls in self.held:
            layer.momentum = 0.0  # so that they are written to, as before, and keep their values
            if calls is not None:
                layer._buffers["num_batches_tracked"] = calls.clone()

    def __exit__(self, *_error: object) -> None:
        for layer, momentum, calls in self.held:
            layer.momentum = momentum
            if calls is not None:
                layer._buffers["num_batches_tracked"] = calls
        self.held = []
