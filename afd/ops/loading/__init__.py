"""From a data set in memory to a batch a model takes, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops.library import call
from afd.ops.loading import schema  # noqa: F401  (registers the op)
from afd.ops.settings import integer, number


def load_batch(
    pixels: Tensor,
    index: Tensor,
    *,
    scale: float = 255.0,
    draws: Tensor | None = None,
    padding: int = 0,
    flip: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """Images chosen from a data set of bytes, cropped, mirrored and scaled to [0, 1], in one pass over them.

    With draws, each image becomes one of the (2 * padding + 1)^2 windows of its zero-padded self, and is mirrored half
    of the time if `flip`: the usual CIFAR augmentation. With ``d = draws[i] mod 2 (2 padding + 1)^2``, ``d // 2``
    numbers image i's window row by row, and an odd d mirrors it, so what becomes of an image depends on its own draw
    alone. Each value is ``pixel / scale``, correctly rounded: the same bits on every device.

    Args:
        pixels: the data set, uint8 [N, C, H, W], contiguous, values in [0, scale].
        index: which images, int64 [B], values in [0, N); repeats are allowed.
        scale: the pixel value that becomes 1, in (0, 255].
        draws: one for each image of the data set, int64 [N], uniform in a range far above the number of choices; None
            for the images as they are.
        padding: width of the zero border on each side.
        flip: whether images are mirrored.
        channels_last: lay out the batch channels-last.

    Returns:
        float32 [B, C, H, W]. On a GPU, where looking at the index would wait for it, a position out of range makes its
        image NaN.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes, devices or layouts that are not as described, scale or padding out of range; on the CPU also
            a position out of range.
    """
    settings = number("scale", scale), integer("padding", padding), flip, channels_last
    out: Tensor = call(torch.ops.afd.load_batch.default, pixels, index, draws, *settings)
    return out
