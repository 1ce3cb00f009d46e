"""What a classifier that somebody else wrote may return, and the logits in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, ModelWarning, warn_caller

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
    if logits.dim() != 2 or logits.shape[0] != samples:
        raise InputError(f"the model returned shape {list(logits.shape)}; it must be logits [{samples}, K]")
    if logits.shape[1] < 2:
        raise InputError(
            f"the model returned shape {list(logits.shape)}; a classifier has a logit for each of at least 2 classes "
            "(of one score s, make [-s / 2, s / 2])"
        )
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
