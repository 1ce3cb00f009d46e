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
from afd.nn.normalized import plain_model
from afd.nn.outputs import linear_layers

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LEAST = 2  # layers of a block: a single one keeps little more than what enters it
FLAT = 8  # layers of a Sequential without blocks, from which on it is passed in parts


class Recomputing:
    """The blocks of a network, which keep only what enters them while a training pass runs.

    Blocks are the modules in the network's lists (ModuleList, Sequential, ModuleDict) that have at least two layers
    with weights, norms not counted. One which itself holds a list of several blocks alike, such as a stage of a ResNet,
    is looked into. In a network whose lists hold none, several modules alike inside of one are such a list (RegNet,
    Inception), or else the outermost modules are its blocks. A long list of single layers, as VGG's, is passed in about
    as many parts as each has layers. What holds the last linear layer is left out: it is the smallest part.

    Args:
        model: the network.

    Raises:
        InputError: the network has no such parts.
    """

    def __init__(self, model: nn.Module) -> None:
        model = plain_model(model)
        head = [*linear_layers(model).values()][-1]
        held = {id(module) for module in model.modules() if any(one is head for one in module.modules())}
        blocks = [*_blocks(model, _is_list)] or [*_blocks(model, _has_several)]
        self.blocks = [block for block in blocks if id(block) not in held]
        inside = held | {id(one) for block in self.blocks for one in block.modules()}
        flat = [one for one in model.modules() if isinstance(one, nn.Sequential) and _is_flat(one)]
        self.rows = [one for one in flat if id(one) not in inside]
        if not self.blocks and not self.rows:
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


def _blocks(module: nn.Module, lists: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The outermost blocks inside of a module, in order."""
    for child in module.children():
        stage = any(lists(one) and _has_several(one) for one in child.modules())
        if lists(module) and _may_be_block(child) and not stage:
            yield child
        else:
            yield from _blocks(child, lists)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, LISTS)


def _has_several(module: nn.Module) -> bool:
    """Whether a module has several blocks alike."""
    kinds = [type(child) for child in module.children() if _may_be_block(child)]
    return len(set(kinds)) < len(kinds)


def _may_be_block(module: nn.Module) -> bool:
    return not isinstance(module, LISTS) and _layers(module) >= LEAST


def _layers(module: nn.Module) -> int:
    """How many layers with weights it has, norms and the like not counted."""
    return sum(any(one.dim() > 1 for one in layer.parameters(recurse=False)) for layer in module.modules())


def _is_flat(row: nn.Sequential) -> bool:
    """Whether it is a long list of single layers."""
    single = all(next(child.children(), None) is None for child in row)
    return type(row) is nn.Sequential and single and len(row) >= FLAT and _layers(row) >= 2 * LEAST


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
    weighted = [place for place, layer in enumerate(layers) if _layers(layer)]
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
