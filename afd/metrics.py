"""Accuracy on clean and on attacked images, and the predictions that it and every other figure are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afd.attacks import Attack
from afd.attacks.base import GradientAttack
from afd.attacks.engine import evaluating, judged
from afd.attacks.external import BOUNDS, attacked_by, inside
from afd.attacks.inputs import check_form, largest_label, rows_of
from afd.data.items import images_and_labels
from afd.errors import InputError, InputTypeError, ModelError, ModelWarning, number, warn_caller
from afd.nn.modes import local

UNDEFINED = -1  # the class of an image whose logits hold NaN; argmax would take NaN for the largest


@dataclass(frozen=True)
class Predictions:
    """What a model said of N images.

    Attributes:
        classes: the likeliest class of each, int64 [N]; `UNDEFINED`, which no label is, where a logit is NaN.
        finite: whether all logits of an image are finite, bool [N].
        num_classes: how many logits an image has; 0 where there are no images.
    """

    classes: Tensor
    finite: Tensor
    num_classes: int

    @property
    def undefined(self) -> Tensor:
        """Which images the model has no class for, bool [N]."""
        return self.classes == UNDEFINED


def predict(model: nn.Module, x: Tensor) -> Predictions:
    """What a model, in evaluation mode and full precision, says of images [N, ...]; nothing waits for the device.

    Raises:
        InputError, InputTypeError: what it returned holds no logits [N, K].
    """
    if not len(x):
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Predictions(none, none.bool(), 0)
    with evaluating(model):
        logits = judged(local(model), x)
    classes = torch.where(logits.isnan().any(1), UNDEFINED, logits.argmax(1))
    return Predictions(classes, logits.isfinite().all(1), logits.shape[1])


def accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    attack: Attack | None = None,
    *,
    bounds: tuple[float, float] | None = None,
) -> float:
    """Share of images that the model, in evaluation mode and full precision, classifies correctly.

    Images that an attack returns outside of bounds, or not finite, are no adversarial images: the model is asked about
    the clean one instead.

    Args:
        model: images -> logits [N, K], in any form of `afd.nn.outputs`; left as it was found.
        batches: yields (images [N, ...] float32 or float64, labels [N] int64 in [0, K), ...), or mappings or objects
            with them, as a loader does (`afd.data.images`); read once.
        attack: applied to a copy of each batch first; its starts do not depend on the batch size.
        bounds: lowest and highest value of an image; by default those of the attack, or [0, 1].

    Returns:
        A share in [0, 1].

    Raises:
        InputError, InputTypeError: there are no images; images, labels or what the attack returned are not as
            described; the model returns no logits.
        ModelError: the model returned NaN logits.

    Warns:
        ModelWarning: infinite logits, or images that an attack returned out of bounds.
    """
    _check_attack(attack)
    _check_values(model)
    if bounds is None:
        bounds = attack.bounds if isinstance(attack, GradientAttack) else BOUNDS
    _check_bounds(bounds)
    seen = 0
    found: list[Tensor] = []
    for x, y, largest in _checked(batches, bounds):
        shown = x if attack is None else attacked_by(attack, x, y, first_sample=seen)
        with torch.no_grad():
            legal = torch.ones_like(y, dtype=torch.bool)
            if attack is not None:
                legal = inside(shown, bounds)
                shown = torch.where(rows_of(legal, x), shown, x)
            said = predict(model, shown)
            infinite = ~said.finite & ~said.undefined
            found.append(torch.stack([said.classes == y, said.undefined, infinite, ~legal]).sum(1))
        if largest >= said.num_classes:
            raise InputError(f"y holds the label {largest}; the model has classes 0 ... {said.num_classes - 1}")
        seen += len(y)
    if not seen:
        raise InputError("batches holds no images; accuracy needs at least one")
    correct, *others = torch.stack(found).sum(0).tolist()
    _judge_outputs(seen, *others)
    return float(correct) / seen


def accuracy_curve(
    model: nn.Module,
    batches: Iterable[Any],
    epsilons: Sequence[float],
    attack: Callable[[float], Attack],
    *,
    bounds: tuple[float, float] | None = None,
) -> list[float]:
    """Accuracy under attack(eps) for each eps; clean accuracy where eps is 0. See `accuracy`.

    Raises:
        InputTypeError: an eps is no number, or attack(eps) no attack.
        InputError: an eps is negative or not finite, or the batches can be read only once, but there are several eps.
    """
    if isinstance(epsilons, str) or not isinstance(epsilons, Iterable):
        raise InputTypeError(f"epsilons is {epsilons!r}; it must be a list of numbers")
    epsilons = list(epsilons)
    for eps in epsilons:
        number("eps", eps, 0)
    if not callable(attack) or isinstance(attack, GradientAttack):
        raise InputTypeError(
            f"attack is a {type(attack).__name__}; a curve needs a function from eps to an attack, such as "
            "lambda eps: PGD(model, eps=eps)"
        )
    if len(epsilons) > 1 and isinstance(batches, Iterator):
        raise InputError(
            f"batches is a {type(batches).__name__}, which can be read only once; a curve over {len(epsilons)} radii "
            "reads it for each of them, so pass a list or a loader"
        )
    return [accuracy(model, batches, _made(attack, eps) if eps else None, bounds=bounds) for eps in epsilons]


def interval(hits: float, of: float, deviations: float = 1.959964) -> tuple[float, float]:
    """Between what a share lies of which a sample has so many hits (Wilson 1927); by default with 95% confidence.

    Args:
        hits: in the sample.
        of: its size; with none, the share may be any.
        deviations: of a normal distribution, on each side.
    """
    if not of:
        return 0.0, 1.0
    share, z = hits / of, deviations * deviations / of
    middle, width = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return (middle - width) / (1 + z), (middle + width) / (1 + z)


def paired_interval(a: Tensor, b: Tensor, deviations: float = 1.959964) -> tuple[float, float]:
    """Between what mean(a) - mean(b) lies, of figures of the same images; by default with 95% confidence.

    The interval of Wald after one more pair in favour of each (Bonett & Price 2012, "Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data"), which with means over seeds instead of hits
    and misses is no narrower than it should be. It tells of other images, not of other seeds.

    Args:
        a: whether each image is a hit, bool [N], or its share of hits over seeds, float [N] in [0, 1].
        b: the same of another model, on the same images.
        deviations: of a normal distribution, on each side.

    Returns:
        Both ends, within [-1, 1]; all of it where there are no images.

    Raises:
        InputError: they are not as long as each other, or hold what is no share.
    """
    for name, one in (("a", a), ("b", b)):
        if one.ndim != 1 or not bool(((one >= 0) & (one <= 1)).all()):
            raise InputError(f"{name} is of shape {list(one.shape)}; it must be a list of shares in [0, 1]")
    if len(a) != len(b):
        raise InputError(f"a has {len(a)} images and b {len(b)}; a paired interval needs the same ones")
    if not len(a):
        return -1.0, 1.0
    apart, pairs = a.double() - b.double(), len(a) + 2
    middle = float(apart.sum()) / pairs
    spread = (float(apart.square().sum()) + 2) / pairs - middle * middle
    width = deviations * math.sqrt(spread / pairs)
    return max(-1.0, middle - width), min(1.0, middle + width)


def packed(hits: Tensor) -> str:
    """Which images are hits, bool [N], as hexadecimal digits: eight images to a byte, the first in its highest bit."""
    return np.packbits(hits.cpu().numpy().astype(bool)).tobytes().hex()


def unpacked(text: str, count: int) -> Tensor:
    """What `packed` made of so many images: bool [count].

    Raises:
        InputError: the text holds other than so many images.
    """
    try:
        held = bytes.fromhex(text)
    except ValueError as error:
        raise InputError(f"the bits of {count} images are {text[:20]!r}; they must be hexadecimal digits") from error
    if len(held) != (count + 7) // 8:
        raise InputError(f"the bits of {count} images are {len(held)} bytes; they must be {(count + 7) // 8}")
    return torch.from_numpy(np.unpackbits(np.frombuffer(held, dtype=np.uint8), count=count).astype(bool))


def spanned(ends: Sequence[float]) -> str:
    """An interval of shares as percentages."""
    low, high = (100 * end for end in ends)
    return f"{low:.2f} to {high:.2f}"


def _made(factory: Callable[[float], Attack], eps: float) -> Attack:
    made = factory(eps)
    if made is None:
        raise InputTypeError(f"attack({eps}) returned None; it must return an attack")
    return made


def _check_attack(attack: Any) -> None:
    """Raises InputTypeError unless this is None or may be an attack of a model."""
    made = getattr(attack, "func", attack) if isinstance(attack, functools.partial) else attack
    if isinstance(made, type):
        raise InputTypeError(
            f"attack is the class {made.__name__} without a model; give the attack of a model, "
            f"{made.__name__}(model, ...)"
        )
    if attack is not None and not callable(attack):
        told = repr(attack) if isinstance(attack, str) else f"a {type(attack).__name__}"
        raise InputTypeError(f"attack is {told}; it must be an attack of the model, such as PGD(model, eps=...)")


def _check_values(model: Any) -> None:
    if not isinstance(model, nn.Module):
        return  # named where it is put into evaluation mode
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"the model's {name} is on the device meta, where tensors hold no values; load the weights first"
            )


def _check_bounds(bounds: Any) -> None:
    try:
        low, high = (float(one) for one in ([] if isinstance(bounds, str) else bounds))
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            f"bounds is {bounds!r}; it must be two numbers, the lowest and the highest value of an image"
        ) from error
    if not low < high:
        raise InputError(f"bounds is {bounds!r}; the lowest value of an image comes first, then a higher one")


def _checked(batches: Iterable[Any], bounds: tuple[float, float]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Images, labels and the largest label of each batch that has any, once their values are found to be allowed."""
    if isinstance(batches, type) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise InputTypeError(f"batches is a {type(batches).__name__}; it must be a loader or a list of batches")
    for item in batches:
        x, y = images_and_labels(item)
        check_form(x, y)
        if len(x):
            yield x, y, largest_label(x, y, bounds)


def _judge_outputs(images: int, undefined: int, infinite: int, illegal: int) -> None:
    if undefined:
        raise ModelError(f"the model returned NaN logits for {undefined} of {images} images; they have no class")
    if infinite:
        warn_caller(f"the model returned infinite logits for {infinite} of {images} images", ModelWarning)
    if illegal:
        warn_caller(
            f"the attack returned {illegal} of {images} images out of bounds or not finite; the model was asked about "
            "the clean ones instead",
            ModelWarning,
        )
