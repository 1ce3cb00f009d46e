"""Loading a batch through the compiled kernels."""

from __future__ import annotations

from torch import Tensor

from afd.ops.native import launch


def load_batch(
    out: Tensor,
    pixels: Tensor,
    index: Tensor,
    draws: Tensor | None,
    scale: float,
    padding: int,
    flip: bool,
    channels_last: bool,
) -> None:
    """`afd.ops.load_batch` into `out`, [B, C, H, W] in the layout asked for."""
    images, channels, height, width = pixels.shape
    launch(
        "load_batch", out,
        pixels.data_ptr(), index.data_ptr(), 0 if draws is None else draws.data_ptr(), out.data_ptr(),
        images, len(index), channels, height, width, scale, padding, flip, channels_last,
    )  # fmt: skip
