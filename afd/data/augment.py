"""Augmentation of whole batches: every image gets its own crop and flip, which one draw settles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, at_least
from afd.ops.loading import reference


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop of the zero-padded image, then a horizontal flip half of the time: the usual CIFAR augmentation.

    Each image is replaced by one of the (2 * padding + 1)^2 windows of its own size, all equally likely. `Batches` has
    it done by the op that loads a batch (`afd.ops.load_batch`); called, it augments any batch.

    Attributes:
        padding: width of the zero border on each side, at least 0.
        flip: whether images are mirrored; False for those that mean something else then, such as digits.

    Raises:
        InputError: padding is negative.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        at_least("padding", self.padding, 0)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """The augmented batch, a new tensor like x.

        Args:
            x: images [B, C, H, W], any dtype and device.
            draws: int64 [B] on the device of x, uniform in [0, 2^62): one for each image.

        Raises:
            InputError, InputTypeError: x or draws is not as described.
        """
        if x.dim() != 4:
            raise InputError(f"x has shape {list(x.shape)}; it must be [B, C, H, W]")
        if draws.dtype != torch.int64:
            raise InputTypeError(f"draws is {draws.dtype}; it must be torch.int64")
        if draws.shape != x.shape[:1]:
            raise InputError(f"draws has shape {list(draws.shape)}; it must be [{len(x)}], one for each image")
        return reference.crop_and_flip(x, draws, self.padding, self.flip)
