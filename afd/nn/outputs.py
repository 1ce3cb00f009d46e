"""What a classifier that somebody else wrote may return, the logits in it, and the linear layer that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from afd.errors import InputError, InputTypeError, ModelWarning, warn_caller
from afd.nn.modes import compiled

_said: ContextVar[set[str] | None] = ContextVar("_said", default=None)


@contextmanager
def saying_once() -> Iterator[None]:
    """Inside, `logits_of` gives each warning once, however often the model is run."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def logits_of(output: Any, samples: int) -> Tensor:
    """The logits in what a classifier returned.

    Args:
        output: logits [N, K]; or an object with an attribute, or a mapping with a key, ``logits``; or a tuple or list
            of which the first entry is the logits (behind them come features, an auxiliary head and the like).
        samples: N, the images that the model was shown.

    Returns:
        Floating-point logits [N, K], K >= 2.

    Raises:
        InputTypeError: it is none of these, or not a plain tensor of floating-point numbers.
        InputError: the logits have another shape.

    Warns:
        ModelWarning: another entry of a tuple could be the logits just as well.
    """
    logits = _found(output, samples)
    if not isinstance(logits, Tensor):
        raise InputTypeError(
            f"the model returned {_described(output)}; it must return logits [N, K], or a tuple that begins with "
            "them, or a dict or an object that has them as 'logits'"
        )
    if logits.layout is not torch.strided or logits.is_nested or logits.is_quantized:
        raise InputTypeError(
            f"the model returned a tensor of layout {logits.layout} that is sparse, nested or quantised; logits are a "
            "plain tensor [N, K]"
        )
    if not logits.is_floating_point():
        raise InputTypeError(f"the model returned {logits.dtype}; logits are floating-point numbers [N, K]")
    if logits.shape in ((samples,), (samples, 1), (samples, 0)):
        raise InputError(
            f"the model returned shape {list(logits.shape)}; a classifier has a logit for each of at least 2 classes "
            "(of one score s, make [-s / 2, s / 2])"
        )
    if logits.dim() != 2 or logits.shape[0] != samples:
        raise InputError(f"the model returned shape {list(logits.shape)}; it must be logits [{samples}, K]")
    return logits


def _found(output: Any, samples: int) -> Any:
    if isinstance(output, Tensor):
        return output
    try:
        named = getattr(output, "logits", None)
    except Exception as error:  # of a property
        raise InputTypeError(
            f"the model returned a {type(output).__name__} whose 'logits' cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    if named is not None:
        return named
    if isinstance(output, Mapping):
        return output.get("logits")
    if not isinstance(output, tuple | list) or not output:
        return None
    first, *others = output
    rivals = [other for other in others if _could_be(other, samples)]
    if _could_be(first, samples) and any(other.shape != first.shape for other in rivals):
        _say(
            f"the model returned {_described(output)}; its first entry is taken for the logits (return them alone, or "
            "as an object's 'logits', if they are another)"
        )
    return first


def _say(message: str) -> None:
    said = _said.get()
    if said is None or message not in said:
        warn_caller(message, ModelWarning)
    if said is not None:
        said.add(message)


def _could_be(entry: Any, samples: int) -> bool:
    return isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim() == 2 and len(entry) == samples


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} with the keys {', '.join(map(str, output)) or '(none)'}"
    if isinstance(output, tuple | list):
        entries = (f"{list(one.shape)}" if isinstance(one, Tensor) else type(one).__name__ for one in output)
        return f"a {kind} of {', '.join(entries) or 'nothing'}"
    return f"a {kind}"


# --- The layer of the logits ----------------------------------------------------------------------------------------


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
        raise InputError(f"model is a {kind} without a linear layer, which features would enter{_layers_hint(model)}")
    return linear


def classes(linear: Mapping[str, nn.Linear], feature_layer: str) -> int:
    """How many logits there should be: what the layer puts out, or, if that enters another one, the last layer.

    Widths alone can be mistaken; `FeatureSplit.settle` corrects it.
    """
    width = linear[feature_layer].out_features
    goes_on = any(layer.in_features == width for name, layer in linear.items() if name != feature_layer)
    return list(linear.values())[-1].out_features if goes_on else width


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
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


def _layers_hint(model: nn.Module) -> str:
    if any(isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) for module in model.modules()):
        return "; pass the Python module that the TorchScript or exported program was made from"
    return ""
