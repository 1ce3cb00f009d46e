"""A labelled set of images, kept as the bytes they were stored in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError
from afd.ops import load_batch


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Labelled images on one device, one byte per pixel: CIFAR-10's training set takes 138 MB.

    Attributes:
        pixels: uint8 [N, C, H, W], values in [0, scale].
        labels: int64 [N], values in [0, num_classes).
        scale: the largest value a pixel can take (255 for MNIST and CIFAR, 16 for digits); it becomes 1.0.
        num_classes: number of classes the labels are drawn from, whether or not all of them occur.
        name: the dataset's name.

    Raises:
        InputTypeError: a tensor has another dtype.
        InputError: shapes or devices disagree, or a pixel or label is out of range.
    """

    pixels: Tensor
    labels: Tensor
    scale: float
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8:
            raise InputTypeError(f"pixels is {self.pixels.dtype}; it must be torch.uint8")
        if self.labels.dtype != torch.int64:
            raise InputTypeError(f"labels is {self.labels.dtype}; it must be torch.int64")
        if self.pixels.dim() != 4:
            raise InputError(f"pixels has shape {list(self.pixels.shape)}; it must be [N, C, H, W]")
        if self.labels.shape != self.pixels.shape[:1]:
            raise InputError(
                f"labels has shape {list(self.labels.shape)}; for these pixels it must be [{len(self.pixels)}]"
            )
        if self.labels.device != self.pixels.device:
            raise InputError(f"labels is on {self.labels.device}; it must be on pixels' device, {self.pixels.device}")
        if not 0 < self.scale <= 255:
            raise InputError(f"scale is {self.scale}; it must be in (0, 255]")
        if self.num_classes < 1:
            raise InputError(f"num_classes is {self.num_classes}; it must be at least 1")
        if self.labels.numel():
            low, high = (int(value) for value in self.labels.aminmax())
            if low < 0 or high >= self.num_classes:
                raise InputError(f"labels run from {low} to {high}; they must be in [0, {self.num_classes})")
        object.__setattr__(self, "pixels", _lasting(self.pixels.contiguous()))
        object.__setattr__(self, "labels", _lasting(self.labels))
        # A byte cannot exceed 255, so the large datasets are spared the pass over their pixels.
        if self.scale < 255 and self.pixels.numel() and int(self.pixels.max()) > self.scale:
            raise InputError(f"pixels reach {int(self.pixels.max())}; scale allows {self.scale}")

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        channels, height, width = self.shape
        size = f"{len(self)} of {channels}x{height}x{width}, {self.num_classes} classes"
        return f"Images({self.name}: {size}, on {self.device})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where pixels and labels live."""
        return self.pixels.device

    def take(self, index: Tensor) -> Images:
        """The images at these positions, in this order.

        Args:
            index: integer [M], values in [0, N), on any device; repeats are allowed.

        Raises:
            InputTypeError: the index is not an integer tensor.
            IndexError: a position is out of range (on CUDA, a device-side assertion).
        """
        index = self._positions(index)
        return replace(self, pixels=self.pixels.index_select(0, index), labels=self.labels.index_select(0, index))

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def images(self, index: Tensor | None = None) -> Tensor:
        """Pixels as numbers a model takes, float32 [M, C, H, W] in [0, 1]: exactly `pixels / scale`, correctly rounded.

        Args:
            index: which images, as for `take`; None for all.
        """
        index = torch.arange(len(self), device=self.device) if index is None else self._positions(index).long()
        return load_batch(self.pixels, index, scale=self.scale)

    def scaled(self, pixels: Tensor) -> Tensor:
        """What an augmentation made of pixels of these images, of any dtype, as float32 in [0, 1]."""
        # CUDA would turn a Python number as divisor into a multiplication by its rounded reciprocal, unlike the CPU.
        scale = torch.full((), self.scale, dtype=torch.float32, device=self.device)
        return pixels.to(torch.float32).div_(scale)

    def _positions(self, index: Tensor) -> Tensor:
        # A mask or a byte tensor would be read as positions 0 and 1, silently the wrong images.
        if index.dtype not in (torch.int64, torch.int32):
            raise InputTypeError(f"index is {index.dtype}; allowed are torch.int64 and torch.int32")
        return index.to(self.device)


def _lasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can work with of one that was made in `torch.inference_mode`."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
