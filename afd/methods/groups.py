"""A player's parameters as its optimizer's groups: which of them decay, and how fast each layer of a network learns."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from afd.errors import InputError

CHAINS = (nn.Sequential, nn.ModuleList)
# of networks that do not say so themselves: of torchvision's, of Hugging Face's, and of what is written like them
UNDECAYED = re.compile(
    r"(abs_|absolute_)?pos(ition|itional)?_(embed(ding)?s?|encodings?)|(cls|class|dist|distillation|mask|reg|register)_tokens?"
    r"|relative_position_bias(_table)?|layer_scale(_parameter)?\d*"
)


def groups_of(
    module: nn.Module, *, lr: float, decay_norms: bool = True, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a module as groups for an optimizer, the last layer's first.

    Args:
        module: what is trained.
        lr: learning rate of the last layer.
        decay_norms: whether all do; else those of fewer than two dimensions, and what `undecayed` finds, do not.
        layer_decay: what the rate is multiplied by from each layer to the one before it; None for one rate.

    Raises:
        InputError: `layer_decay` is given, and the module has no layers in a chain.
    """
    spared = set[int]() if decay_norms else undecayed(module)
    depth = {} if layer_decay is None else layers_of(module)
    last = max(depth.values(), default=0)
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for one in module.parameters():
        if one.requires_grad:
            decays = decay_norms or (one.dim() > 1 and id(one) not in spared)
            found.setdefault((depth.get(id(one), last), decays), []).append(one)
    groups = []
    for (layer, decays), parameters in sorted(found.items(), key=lambda item: item[0], reverse=True):
        group: dict[str, Any] = {"params": parameters}
        if layer_decay is not None:
            group["lr"] = lr * layer_decay ** (last - layer)
        if not decays:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


def undecayed(module: nn.Module) -> set[int]:
    """Parameters, by id, that are no weights although they have two dimensions or more: of positions, of tokens.

    They are those that a network names itself, in a ``no_weight_decay()`` as timm's have, and else those that are
    called so.
    """
    found, told = set[int](), list[str]()
    for prefix, inner in module.named_modules():
        if any(prefix.startswith(f"{one}.") for one in told):
            continue
        named = getattr(inner, "no_weight_decay", None)
        if callable(named):
            own = dict(inner.named_parameters())
            found |= {id(own[name]) for name in named() if name in own}
            told.append(prefix)
            if not prefix:
                return found
    for name, parameter in module.named_parameters():
        named_already = any(name.startswith(f"{one}.") for one in told)
        if not named_already and UNDECAYED.fullmatch(name.rpartition(".")[2]):
            found.add(id(parameter))
    return found


# --- Layers -----------------------------------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> dict[int, int]:
    """The layer of each parameter, by id, as in BEiT (Bao et al. 2022): 0 is the stem, then the blocks, then the head.

    Networks of timm say themselves how their parameters lie. In others the blocks are the entries of their chains
    (`torch.nn.Sequential`, `torch.nn.ModuleList`) that have layers of their own, in the order of their registration;
    where none has, all layers in chains that have weights. What is registered before the first block is of the stem,
    between two blocks of the second, after the last of the head.

    Raises:
        InputError: there is no such block.
    """
    for _, inner in module.named_modules():
        if type(inner).__module__.startswith("timm.") and hasattr(inner, "group_matcher"):
            return _of_timm(inner)
    blocks = list(_blocks(module, False))
    plain = not blocks
    if plain:
        blocks = list(_weighty(module, False))
    if not blocks:
        raise InputError(
            f"layer_decay is given, but {type(module).__name__} has no blocks in a torch.nn.Sequential or ModuleList"
        )
    numbers = {id(one): number for number, block in enumerate(blocks, 1) for one in block.parameters()}
    found, at, behind = dict[int, int](), 0, 0
    for one in module.parameters():
        own = numbers.get(id(one))
        if own is not None:
            at, behind = own, max(behind, own + 1)
        elif not plain or one.dim() > 1:  # in a plain chain, a norm goes with the layer before it
            at = behind
        found[id(one)] = at
    return found


def _of_timm(network: Any) -> dict[int, int]:
    numbers = importlib.import_module("timm.models").group_parameters(network, network.group_matcher(), reverse=True)
    return {id(parameter): int(numbers[name]) for name, parameter in network.named_parameters()}


def _blocks(module: nn.Module, chained: bool) -> Iterator[nn.Module]:
    """The outermost entries of chains that have layers of their own; a stage, which holds such a chain, is opened."""
    if chained and not isinstance(module, CHAINS) and _composite(module) and not _is_stage(module):
        yield module
        return
    for child in module.children():
        yield from _blocks(child, isinstance(module, CHAINS))


def _weighty(module: nn.Module, chained: bool) -> Iterator[nn.Module]:
    """The entries of chains that have a weight of two or more dimensions themselves."""
    if chained and any(own.dim() > 1 for own in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _weighty(child, isinstance(module, CHAINS))


def _composite(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds a chain of several blocks of one class, each of several weights."""
    chains = (list(chain) for chain in module.modules() if isinstance(chain, CHAINS) and len(chain) > 1)
    return any(
        len({type(one) for one in chain}) == 1
        and not isinstance(chain[0], CHAINS)
        and all(sum(own.dim() > 1 for own in one.parameters()) > 1 for one in chain)
        for chain in chains
    )
