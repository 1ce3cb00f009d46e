"""BatchNorm folded into the convolution before it, for as long as an attack runs.

In evaluation mode BatchNorm is an affine map of each channel, so conv(x; W, b) followed by it is the one convolution
conv(x; s W, s (b - mean) + shift) with s = scale / sqrt(var + eps). On a CPU that saves one pass over the activations
forward and one backward at each layer. The gradient changes by rounding only.

The model's own code runs as ever; only the two layers do other work: the convolution takes the folded weights, the
BatchNorm passes its input on. Which pairs may be folded, a symbolic trace of the model says (torch.fx): the BatchNorm
must be all that sees the convolution's output, and each must run once. Where a model cannot be traced, or a layer has
hooks or parametrisations, nothing is folded. (A wrapper around one module is looked through.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from afd.attacks.python_state import snapshot

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
CONVS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(eq=False)
class Pair:
    """A convolution, the BatchNorm behind it, and the weights of the one that does the work of both."""

    conv: Conv
    norm: Norm
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, conv: Conv, norm: Norm) -> Pair:
        """With room for the folded weights, in the layout that convolutions are fastest in."""
        layout = torch.channels_last if conv.weight.dim() == 4 else torch.contiguous_format
        weight = torch.empty_like(conv.weight, memory_format=layout, requires_grad=False)
        return cls(conv, norm, weight, torch.empty_like(conv.weight[:, 0].flatten(1)[:, 0], requires_grad=False))

    @torch.no_grad()
    def refresh(self) -> None:
        """Folds the weights as they are now, in place, so that recorded graphs see them."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        torch.mul(self.conv.weight, scale.view(-1, *[1] * (self.weight.dim() - 1)), out=self.weight)
        centre = -norm.running_mean if self.conv.bias is None else self.conv.bias - norm.running_mean
        shift = 0.0 if norm.bias is None else norm.bias
        self.bias.copy_(centre * scale + shift)

    def convolve(self, x: Tensor) -> Tensor:
        """What the convolution does while folded."""
        out: Tensor = self.conv._conv_forward(x, self.weight, self.bias)
        return out


@dataclass(eq=False)
class Folding:
    """The pairs of one model, as long as it looks as `seen`."""

    seen: tuple[object, ...]
    pairs: list[Pair]

    @contextmanager
    def folded(self) -> Iterator[None]:
        """The layers do the folded work until the body ends or raises."""
        try:
            for pair in self.pairs:
                pair.refresh()
                vars(pair.conv)["forward"] = pair.convolve
                vars(pair.norm)["forward"] = _pass_on
            yield
        finally:
            for pair in self.pairs:
                vars(pair.conv).pop("forward", None)
                vars(pair.norm).pop("forward", None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside `folded`: the model as it was written."""
        folded = {layer: vars(layer).pop("forward") for pair in self.pairs for layer in (pair.conv, pair.norm)}
        try:
            yield
        finally:
            for layer, forward in folded.items():
                vars(layer)["forward"] = forward


NOTHING = Folding((), [])
_known: WeakKeyDictionary[nn.Module, Folding] = WeakKeyDictionary()


def folding(model: nn.Module) -> Folding:
    """The pairs of a model in evaluation mode: found once, and again when its layers have changed."""
    seen = (
        *((id(module), _touched(module)) for module in model.modules()),
        *((parameter.device, parameter.dtype) for parameter in model.parameters()),
    )
    known = _known.get(model)
    if known is None or known.seen != seen:
        known = _known[model] = Folding(seen, [Pair.of(*pair) for pair in _pairs(model)])
    return known


def known(model: nn.Module) -> Folding | None:
    """What was found last: whoever records a graph of an attack keeps it, for the graph writes to its weights."""
    return _known.get(model)


def _pass_on(x: Tensor) -> Tensor:
    return x


def _pairs(model: nn.Module) -> Iterator[tuple[Conv, Norm]]:
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return
    restore = snapshot(model)
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever a model's own code raises on symbolic values
        children = list(model.children())
        if len(children) == 1:  # a wrapper, such as one that inspects what the model inside returns
            yield from _pairs(children[0])
        return
    finally:
        restore()  # what the model keeps of a forward would be symbols
    layers = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    ran = [layers[str(node.target)] for node in calls]
    for node in calls:
        norm, source = layers[str(node.target)], node.args[0] if node.args else None
        conv = layers.get(str(source.target)) if isinstance(source, fx.Node) and source.op == "call_module" else None
        if not (isinstance(norm, NORMS) and isinstance(conv, CONVS) and isinstance(source, fx.Node)):
            continue
        plain = type(norm) in NORMS and type(conv) in CONVS and not (_touched(conv) or _touched(norm))
        alone = len(source.users) == 1 and ran.count(norm) == ran.count(conv) == 1
        if plain and alone and not norm.training and norm.running_var is not None:
            yield conv, norm


def _touched(layer: nn.Module) -> bool:
    """Whether somebody has hooked into a layer, who must see what it does."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)
