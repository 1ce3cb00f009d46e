"""What loaders of other people yield, read as images, labels and index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError

# in the order in which they are looked for
IMAGES, LABELS, INDEX = ("image", "images", "pixel_values"), ("label", "labels"), ("index", "indices", "idx")


@overload
def images_and_labels(item: Any, required: Literal[True] = True) -> tuple[Tensor, Tensor]: ...
@overload
def images_and_labels(item: Any, required: bool) -> tuple[Tensor, Tensor | None]: ...
def images_and_labels(item: Any, required: bool = True) -> tuple[Tensor, Tensor | None]:
    """Images and labels of one batch, as tensors whose values nobody has looked at.

    Args:
        item: a tuple or list that begins with images and labels (behind them, an index and the like), or a mapping or
            an object that has them under one of the names in `IMAGES` and one of those in `LABELS`.
        required: whether there must be labels; else the item may also be images alone.

    Raises:
        InputTypeError: it is none of these.
        InputError: they are on the device meta.
    """
    x, y = _named(item, IMAGES), _named(item, LABELS)
    if isinstance(item, tuple | list) and (x is None or y is None):
        x, y = (*item, None, None)[:2]
    elif isinstance(item, Tensor) and not required:
        x = item
    if isinstance(x, Tensor) and (isinstance(y, Tensor) or (y is None and not required)):
        if x.is_meta:
            raise InputError("x is on the device meta, where tensors hold no values")
        return x, y
    raise InputTypeError(
        f"the loader yields {_described(item)}; a batch must be (images, labels, ...), or a dict or an object with "
        f"{' / '.join(map(repr, IMAGES))} and {' / '.join(map(repr, LABELS))}, both of them tensors"
    )


def index_in(item: Any, images: int) -> Tensor | None:
    """Which images of the data set a batch holds, int64 [N], as far as its loader says.

    Args:
        item: as of `images_and_labels`; the index is the third of a tuple, or under one of the names in `INDEX`.
        images: N.
    """
    index = item[2] if isinstance(item, tuple | list) and len(item) > 2 else _named(item, INDEX)
    fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape == (images,)
    return index if fits else None


def _named(item: Any, names: tuple[str, ...]) -> Any:
    if isinstance(item, Mapping):
        return next((item[name] for name in names if name in item), None)
    return next((getattr(item, name) for name in names if hasattr(item, name)), None)


def _described(item: Any) -> str:
    kind = type(item).__name__
    if isinstance(item, Mapping):
        return f"a {kind} with the keys {', '.join(map(str, item)) or '(none)'}"
    if isinstance(item, tuple | list):
        return f"a {kind} of {', '.join(type(one).__name__ for one in item[:8]) or 'nothing'}"
    return f"a {kind}"
