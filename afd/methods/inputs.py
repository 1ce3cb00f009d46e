"""What a training step asks of the images and labels that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.attacks.inputs import check_classes, check_images, check_rows, largest_label
from afd.attacks.strangers import BOUNDS, inside
from afd.errors import InputError, InputTypeError
from afd.ops import checks


def check_form(
    x: Tensor,
    y: Tensor | None,
    num_classes: int | None = None,
    *,
    soft: bool = True,
    index: Tensor | None = None,
    x_adv: Tensor | None = None,
) -> None:
    """Checks what can be known of a batch without a look at its values.

    Args:
        x: images [N, ...].
        y: classes [N] int64, soft labels [N, num_classes], or None.
        num_classes: None if nobody knows.
        soft: whether labels may be soft.
        index: of the images, [N] int64.
        x_adv: attacked copies of x.

    Raises:
        InputTypeError, InputError: it is something else.
    """
    beside = {"y": y, "index": index, "x_adv": x_adv}
    check_images(x, **{name: tensor for name, tensor in beside.items() if tensor is not None})
    if not len(x):
        raise InputError(f"x has shape {list(x.shape)}; a batch must hold at least one image")
    if y is not None and not (soft and _is_soft(y)):
        check_classes(x, y)
    elif y is not None:
        check_rows("y", y, x)
        if num_classes is not None and y.shape[1] != num_classes:
            raise InputError(f"y has shape {list(y.shape)}; soft labels of this model are [{len(x)}, {num_classes}]")
    if index is not None and (index.dtype != torch.int64 or index.shape != x.shape[:1]):
        raise InputTypeError(f"index is {index.dtype} {list(index.shape)}; it must be torch.int64 [{len(x)}]")
    if x_adv is not None:
        checks.iterate("x_adv", x_adv, x)


def _is_soft(y: Tensor) -> bool:
    return y.dim() == 2 and y.is_floating_point()


def check_values(
    x: Tensor,
    y: Tensor | None,
    num_classes: int | None = None,
    *,
    x_adv: Tensor | None = None,
    bounds: tuple[float, float] = BOUNDS,
) -> None:
    """Checks the values of a batch, which waits for the device; arguments are as of `check_form`.

    Raises:
        InputError: images are not finite or out of bounds, or labels are not of the model's classes.
    """
    check_labels(largest_label(x, y, bounds), num_classes)
    if x_adv is not None and not inside(x_adv, bounds).all():
        raise InputError(f"x_adv has values that are not finite or not in {list(bounds)}; it must be images like x")


def check_labels(largest: int, num_classes: int | None) -> None:
    """Raises InputError where the largest of labels is of no class of the model."""
    if num_classes is not None and largest >= num_classes:
        raise InputError(f"y holds the label {largest}; the model has classes 0 ... {num_classes - 1}")
