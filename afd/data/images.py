"""A labelled set of images, kept as the bytes they were stored in, and batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError, at_least, whole
from afd.ops import load_batch, reference


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Labelled images on one device, one byte per pixel: CIFAR-10's training set takes 138 MB.

    Attributes:
        pixels: uint8 [N, C, H, W], values in [0, scale].
        labels: int64 [N], values in [0, num_classes).
        scale: the largest value a pixel can take (255 for MNIST and CIFAR, 16 for digits); it becomes 1.0.
        num_classes: number of classes the labels are drawn from, whether or not all of them occur.
        name: the dataset's name.
        chosen: how reports say so many of them.

    Raises:
        InputTypeError: a tensor has another dtype.
        InputError: shapes or devices disagree, or a pixel or label is out of range.
    """

    pixels: Tensor
    labels: Tensor
    scale: float
    num_classes: int
    name: str
    chosen: str = "the first {}"

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

    def some(self, count: int) -> Images:
        """The first so many, at most."""
        return self.take(torch.arange(min(count, len(self)), device="cpu"))

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

    def _positions(self, index: Tensor) -> Tensor:
        # A mask or a byte tensor would be read as positions 0 and 1, silently the wrong images.
        if index.dtype not in (torch.int64, torch.int32):
            raise InputTypeError(f"index is {index.dtype}; allowed are torch.int64 and torch.int32")
        return index.to(self.device)


def in_unit(pixels: Tensor, scale: float) -> Tensor:
    """Pixels of any dtype as float32, `scale` of which is 1."""
    # CUDA would turn a Python number as divisor into a multiplication by its rounded reciprocal, unlike the CPU.
    divisor = torch.full((), scale, dtype=torch.float32, device=pixels.device)
    return pixels.to(torch.float32, copy=True).div_(divisor)


def _lasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can work with of one that was made in `torch.inference_mode`."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


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


Augment = Callable[[Tensor, Tensor], Tensor]

ORDER, AUGMENTATION = 0, 1


class Batches:
    """Batches of one epoch, as often as they are iterated.

    Order and augmentation depend on `seed` and the epoch only, and what an image is augmented by on its index besides:
    an interrupted run that sets the epoch again sees the same batches, on CPU and CUDA, in one process or several.
    `set_epoch` moves to another epoch; iterating does not.

    Yields `(x, y)`: x float32 [B, C, H, W] in [0, 1], y int64 [B], both on the device of the images.

    Args:
        images: the images to serve.
        batch_size: images per batch of all processes together, at least 1; the last batch may have fewer.
        shuffle: serve in an order drawn anew for each epoch, instead of the images' own order.
        seed: which sequence of orders and augmentations, at least 0.
        augment: a `CropAndFlip`, which costs no pass of its own; or called with (pixels uint8 [B, C, H, W], draws int64
            [B] uniform in [0, 2^62)), to return the pixels to serve. None to serve them as they are.
        drop_last: leave out a last batch that has fewer images.
        device: where to keep the images and serve batches; None for where the images are.
        rank: which of `world_size` processes this is; it is served its rows of each batch. All are served as many:
            what is left of the last batch then goes to none.
        world_size: number of processes that share the batches.
        channels_last: lay out the batches channels-last, as training passes and attacks want them.

    Raises:
        InputTypeError: images is no `Images`, or a number is of another type.
        InputError: there is nothing to serve, a number is out of range, or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
    ) -> None:
        self._check_images(images)
        whole("batch_size", batch_size, 1)
        whole("seed", seed, 0)
        if batch_size % world_size:
            raise InputError(
                f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes that share it"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}; it must be in [0, {world_size})")
        if len(images) == 0:
            raise InputError("images is empty; there must be at least one image")
        if len(images) < world_size:
            raise InputError(f"images holds {len(images)}; {world_size} processes need at least one each")
        if drop_last and len(images) < batch_size:
            raise InputError(f"batch_size is {batch_size}; with drop_last it must be at most the {len(images)} images")
        self.images = images if device is None else images.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.drop_last = drop_last
        self.rank, self.world_size = rank, world_size
        self.channels_last = channels_last
        self.epoch = 0

    @staticmethod
    def _check_images(images: Any) -> None:
        if not isinstance(images, Images):
            raise InputTypeError(f"images is a {type(images).__name__}; it must be an afd.data.Images")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, at least 0, that the next iteration serves."""
        if epoch < 0:
            raise InputError(f"epoch is {epoch}; it must be at least 0")
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.drop_last or rest < self.world_size else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `batch` on, counted from 0, without serving those before."""
        return ((x, y) for x, y, _ in self.with_index(batch))

    def with_index(self, batch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `starting_at`, and which of the images each batch holds, int64 [B]."""
        device = self.images.device
        order = self._order().to(device)
        draws = None if self.augment is None else self._draws().to(device)
        for joint in torch.split(order, self.batch_size)[batch : len(self)]:
            index = self._rows(joint)
            yield self._load(self.images.pixels, index, draws), self.images.labels.index_select(0, index), index

    def _rows(self, joint: Tensor) -> Tensor:
        """This process's rows of a joint batch."""
        rows = len(joint) // self.world_size
        return joint[self.rank * rows : (self.rank + 1) * rows]

    def _load(self, pixels: Tensor, index: Tensor, draws: Tensor | None) -> Tensor:
        """The images at these positions, among pixels uint8 [N, C, H, W] with draws [N], as they are served."""
        images, crop = self.images, self.augment
        if crop is not None and draws is not None and not isinstance(crop, CropAndFlip):
            x = in_unit(crop(pixels.index_select(0, index), draws.index_select(0, index)), images.scale)
            return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        padding, flip = (crop.padding, crop.flip) if isinstance(crop, CropAndFlip) else (0, False)
        return load_batch(
            pixels, index, scale=images.scale, draws=draws, padding=padding, flip=flip,
            channels_last=self.channels_last,
        )  # fmt: skip

    def _order(self) -> Tensor:
        count = len(self.images)
        if not self.shuffle:
            return torch.arange(count, device="cpu")
        return self._shuffled(self._generator(ORDER, self.epoch))

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """All positions in an order drawn from a generator."""
        return torch.randperm(len(self.images), generator=generator, device="cpu")

    def _draws(self) -> Tensor:
        """One draw an image for the whole epoch: which batch it falls in, and in which process, has no say."""
        generator = self._generator(AUGMENTATION, self.epoch)
        return torch.randint(2**62, (len(self.images),), generator=generator, device="cpu")

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        """A CPU generator for one purpose in the epoch of a number: augmenting or not leaves the order as it is."""
        # SeedSequence hashes its inputs, so that neighbouring seeds and epochs share no stream, as seed + epoch would.
        state = np.random.SeedSequence(self.seed, spawn_key=(number, purpose)).generate_state(1, np.uint64)
        return torch.Generator("cpu").manual_seed(int(state[0]))


@dataclass
class Endless:
    """Images in an endless sequence of orders, of which the last one asked for is kept.

    Attributes:
        images: that it serves.
        drawn: number -> the order of that number, and its augmentation's draws.
        kept: the last of these.
    """

    images: Images
    drawn: Callable[[int], tuple[Tensor, Tensor]]
    kept: tuple[int, Tensor, Tensor] | None = None

    def taken(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index, pixels, labels and draws of images from a place in the sequence on."""
        found: list[tuple[Tensor, Tensor]] = []
        while count or not found:
            number, first = divmod(start, len(self.images))
            order, draws = self._order(number)
            index = order[first : first + count]
            found.append((index, draws.index_select(0, index)))
            start, count = start + len(index), count - len(index)
        index, draws = (torch.cat(columns) for columns in zip(*found, strict=True))
        return index, self.images.pixels.index_select(0, index), self.images.labels.index_select(0, index), draws

    def _order(self, number: int) -> tuple[Tensor, Tensor]:
        if self.kept is None or self.kept[0] != number:
            order, draws = (one.to(self.images.device, non_blocking=True) for one in self.drawn(number))
            self.kept = (number, order, draws)
        return self.kept[1:]
