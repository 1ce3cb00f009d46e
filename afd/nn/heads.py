"""Which of a model's linear layers its logits come from: as its layers are registered, and as they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from afd.errors import InputError
from afd.nn.modes import compiled


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that a model may call, by name, as registered.

    Raises:
        InputError: there are none, or the model has parameters that are yet without values.
    """
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise InputError(f"the model's {name} has no shape yet; call the model once before it is trained")
    inside = [
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    ]  # which uses the weight of its out_proj and never calls it
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(inside))
    }
    if not linear:
        kind = type(model).__name__
        raise InputError(f"model is a {kind} without a linear layer, which features would enter{_hint(model)}")
    return linear


def classes(linear: Mapping[str, nn.Linear], feature_layer: str) -> int:
    """How many logits there should be: what the layer puts out, or, if that enters another one, the last layer.

    Widths alone can be mistaken; `FeatureSplit.settle` corrects it.
    """
    width = linear[feature_layer].out_features
    goes_on = any(layer.in_features == width for name, layer in linear.items() if name != feature_layer)
    return list(linear.values())[-1].out_features if goes_on else width


@contextmanager
def outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside: what each linear layer has put out, those that were not called left out."""
    called: dict[str, Tensor] = {}

    def noted(name: str) -> Any:
        return lambda _layer, _inputs, output: called.update({name: output})

    handles = [layer.register_forward_hook(noted(name)) for name, layer in linear_layers(model).items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def check_choice(chosen: str, called: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raises InputError unless the logits are what the layer `chosen` put out, or may be made from that alone."""
    same = [name for name, output in called.items() if _equal(output, logits)]
    if chosen in same:
        return
    advice = "name the layer that the features enter as feature_layer"
    if same:
        raise InputError(
            f"the last linear layer is {chosen!r}, but the logits are what {' or '.join(map(repr, same))} puts out; "
            f"{advice}"
        )
    if chosen not in called:
        raise InputError(f"the last linear layer is {chosen!r}, which the model's forward did not call; {advice}")
    alike = [name for name, output in called.items() if output.shape == logits.shape]
    if alike != [chosen]:
        shape, wanted = list(called[chosen].shape), list(logits.shape)
        raise InputError(
            f"the last linear layer is {chosen!r}, but what it puts out, {shape}, is not the logits, {wanted} "
            f"(of that shape: {', '.join(map(repr, alike)) or 'none'}); {advice}"
        )


def check_visible(model: nn.Module, feature_layer: str) -> None:
    """Raises InputError if the layer lies inside of something compiled, which does not see what is hooked to it."""
    names = feature_layer.split(".")
    for count in range(len(names)):
        name = ".".join(names[:count])
        module = model.get_submodule(name)
        if compiled(module):
            raise InputError(
                f"the layer {feature_layer!r} is inside of {name or 'a model'!r}, which is compiled; pass the model "
                "before it is compiled (Execution(compile=True) compiles the passes of training)"
            )


def _equal(output: Tensor, logits: Tensor) -> bool:
    if output.shape != logits.shape or output.dtype != logits.dtype:
        return False
    return output is logits or torch.equal(output.nan_to_num(), logits.nan_to_num())


def _hint(model: nn.Module) -> str:
    if any(isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) for module in model.modules()):
        return "; pass the Python module that the TorchScript or exported program was made from"
    return ""
