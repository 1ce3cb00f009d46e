"""What every attack runs on: the model as it stands in evaluation mode, and the gradient of a loss at its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.losses import Value, logit_difference
from afd.errors import InputError, InputTypeError, ModelError
from afd.nn.modes import evaluating
from afd.nn.outputs import logits_of
from afd.ops.checks import described

__all__ = [
    "Outputs",
    "check_offers",
    "difference_gradients",
    "evaluating",
    "features",
    "features_and_logits",
    "judged",
    "logits",
]
__all__ += ["logits_alone", "loss_gradient", "shown"]

Outputs = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]  # what a loss is given, and what is looked at

CUT_OFF = (
    "no gradient leads from the model's output to the images: something on the way detaches it, computes without "
    "autograd, or turns it into integers; gradient attacks cannot aim at such a model"
)


def shown(model: nn.Module, x: Tensor) -> Any:
    """What a model returns for images x, of which it is given a copy: it may normalise them in place."""
    return model(x.clone())


def logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits [N, K], twice: see `Outputs`."""
    found = _logits(model, x)
    return found, found


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """model.features(x) [N, D], twice."""
    found = _features_of(_explained(lambda model, x: _method(model, "features")(x.clone()), model, x), x)
    return found, found


def features_and_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one pass, as `afd.nn.Split` has them: [N, D] and [N, K]."""
    found = _explained(lambda model, x: _method(model, "features_and_logits")(x.clone()), model, x)
    if not isinstance(found, tuple) or len(found) != 2:
        raise InputTypeError(f"features_and_logits returned {described(found)}; it must return a pair of tensors")
    return _features_of(found[0], x), logits_of(found[1], x.shape[0])


def check_offers(model: nn.Module, name: str) -> None:
    """Raises InputError unless a model has a method by which a loss of features can be given what it is of."""
    if not callable(getattr(model, name, None)):
        raise InputError(
            f"outputs is 'features', and the model, a {type(model).__name__}, has no method {name}; afd.nn.Split says "
            "what it must offer"
        )


def _method(model: nn.Module, name: str) -> Callable[[Tensor], Any]:
    check_offers(model, name)
    found: Callable[[Tensor], Any] = getattr(model, name)
    return found


def loss_gradient(
    model: nn.Module,
    loss: Value,
    x: Tensor,
    loss_target: Any,
    check: Callable[[Tensor], None] | None = None,
    outputs: Outputs = logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """∇_x Σ loss(model(x), loss_target) with the losses and logits behind it, all detached.

    Args:
        model: classifier; call inside `evaluating`.
        loss: one value per sample; their sum is differentiated, so that samples do not depend on their batch. Or one
            value for all.
        x: images [N, ...], leaf or not; not modified.
        loss_target: what the loss is judged by, [N, ...].
        check: is shown the logits before the loss is.
        outputs: of the model: `logits`, `features` or `features_and_logits`.

    Returns:
        The gradient, of x's shape and dtype; the losses [N], or the one loss []; the logits [N, classes], or the
        features [N, D] where nobody asks for logits.

    Raises:
        InputError, InputTypeError: the model's output holds no logits [N, classes], the loss returned none, or what
            check raises.
        ModelError: no gradient leads from the output to the images.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        given, seen = outputs(model, x)
        if check is not None:
            check(seen)
        losses = loss(given, loss_target)
        _check_losses(losses, given)
        grad = _input_gradient(losses, x)
    return grad, losses.detach(), seen.detach()


def difference_gradients(
    model: nn.Module, x: Tensor, y: Tensor, check: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """∇_x of each difference of logits z_k - z_y in turn, and the difference [N]: one forward, a backward for each.

    Args:
        model: classifier; call inside `evaluating`.
        x: images [N, ...]; not modified.
        y: classes [N]; k is y + 1, y + 2, ..., modulo the number of classes.
        check: is shown the logits first.

    Returns:
        The logits [N, classes]; and gradients, like x, each with its differences, all detached.

    Raises:
        InputError, InputTypeError, ModelError: as of `loss_gradient`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = _logits(model, x)
        if check is not None:
            check(logits)

    def gradients() -> Iterator[tuple[Tensor, Tensor]]:
        classes = logits.shape[1]
        for shift in range(1, classes):
            with torch.enable_grad():  # not while somebody looks at what is yielded
                difference = logit_difference(logits, torch.stack([y, (y + shift) % classes], 1))
                grad = _input_gradient(difference, x, last=shift == classes - 1)
            yield grad, difference.detach()

    return logits.detach(), gradients()


def logits_alone(model: nn.Module, x: Tensor, outputs: Outputs = logits) -> Tensor:
    """The model's logits [N, classes] (or features) at images x, by the very code that `loss_gradient` runs."""
    with torch.enable_grad():
        return outputs(model, x.detach().requires_grad_())[1].detach()


@torch.no_grad()
def judged(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits [N, K] in full precision, whatever mode the caller is in: what figures are made from.

    Args:
        model: classifier; call inside `evaluating`.
        x: images [N, ...]; not modified.

    Raises:
        InputError, InputTypeError: what it returned holds no logits [N, K], or its weights have another dtype than x.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _logits(model, x)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether logits [N, K] name another class than y [N], [N] bool; NaN names none, whatever y is."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = logits_of(_explained(shown, model, x), x.shape[0])
    if logits.device != x.device:
        raise InputError(f"the model returned logits on {logits.device}; they must be on x's device, {x.device}")
    return logits


def _explained(run: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> Any:
    """run(model, x), with what torch's errors mean."""
    try:
        return run(model, x)
    except RuntimeError as error:
        _explain(error, model, x)
        raise


def _features_of(output: Any, x: Tensor) -> Tensor:
    """Features [N, D] of images x, if that is what a model returned."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise InputTypeError(
            f"the model's features are {described(output)}; they must be a floating-point tensor [N, D]"
        )
    if output.dim() != 2 or output.shape[0] != x.shape[0]:
        raise InputError(f"the model's features have shape {list(output.shape)}; they must be [{x.shape[0]}, D]")
    return output


def _input_gradient(losses: Tensor, x: Tensor, *, last: bool = True) -> Tensor:
    """∇_x Σ losses; `last`: of what was computed for them, nothing more is asked.

    Raises:
        ModelError: there is none.
    """
    if not losses.requires_grad:
        raise ModelError(CUT_OFF)
    try:
        ones = torch.ones_like(losses)  # of their sum
        (grad,) = torch.autograd.grad(losses, x, ones, allow_unused=True, retain_graph=not last)
    except NotImplementedError as error:  # by a quantised layer, say
        raise ModelError(f"the model cannot be differentiated: {' '.join(str(error).split())}") from error
    if grad is None:
        raise ModelError(CUT_OFF)
    return grad


def _check_losses(losses: Any, outputs: Tensor) -> None:
    """Raises unless a loss returned what can be differentiated: [N], or [] for all, of outputs [N, ...]."""
    samples = outputs.shape[0]
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        found = f"a tensor of {losses.dtype}" if isinstance(losses, Tensor) else described(losses)
        raise InputTypeError(f"loss returned {found}; it must return a floating-point tensor, [{samples}] or []")
    if losses.shape not in ((samples,), ()):
        raise InputError(
            f"loss returned shape {list(losses.shape)}; it must be [{samples}], one for each image, or [], one for all"
        )
    if losses.requires_grad:
        return
    if outputs.requires_grad:
        raise InputError(
            "loss returned a tensor without a gradient: something in it detaches the outputs it is given, or computes "
            "without autograd"
        )
    raise ModelError(CUT_OFF)


def _explain(error: RuntimeError, model: nn.Module, x: Tensor) -> None:
    """Raises what torch's error means where that is known."""
    reason = " ".join(str(error).split())
    if "nference tensors cannot be saved for backward" in reason:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = ", ".join(name for name, tensor in tensors.items() if tensor.is_inference())
        raise InputError(
            "no gradient goes through what was made in torch.inference_mode; make, load or move the model outside "
            f"of that mode (here: {names or 'a tensor that it holds'})"
        ) from error
    kinds = {one.dtype for one in model.parameters() if one.is_floating_point()}
    if kinds and x.dtype not in kinds:
        raise InputTypeError(
            f"the model's weights are {', '.join(map(str, kinds))}, and x is {x.dtype}, which it does not take "
            f"({reason}); give both one dtype (precision='bf16' is for weights in float32)"
        ) from error
