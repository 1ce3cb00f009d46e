"""Batches of images in files: decoded by workers, augmented on the device, the same again from any batch on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.data.images import Augment, Batches, in_unit
from afd.data.sizing import Resolution, Sizing, check_order, side_in
from afd.data.stored import StoredImages, decoded_batches
from afd.errors import InputError, InputTypeError, number, whole

BITS = 15  # of a draw, for each of the four numbers that a crop is made of
ASPECTS = 3 / 4, 4 / 3  # width over height of a crop


@dataclass(frozen=True)
class ResizedCropAndFlip:
    """A part of each image, brought to one size, then a flip half of the time: the usual ImageNet augmentation.

    The part has a share of the image's area in [scale, 1] and an aspect in [3/4, 4/3], both cut to what fits, and lies
    anywhere (Szegedy et al. 2015; torchvision's RandomResizedCrop draws again where ours cuts). Pixels in between are
    bilinear. What becomes of an image depends on its own draw alone, whatever else is in its batch.

    Attributes:
        side: of the square that comes out; or height and width.
        scale: least share of the area, in (0, 1].
        flip: whether images are mirrored.

    Raises:
        InputError: side or scale is out of range.
        InputTypeError: side is no whole number.
    """

    side: int | tuple[int, int]
    scale: float = 0.25
    flip: bool = True

    def __post_init__(self) -> None:
        for length in self.shape:
            whole("side", length, 1)
        number("crop_scale", self.scale, 1e-6)
        if self.scale > 1:
            raise InputError(f"crop_scale is {self.scale}; it must be a share of the area, in (0, 1]")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self.side if isinstance(self.side, tuple) else (self.side, self.side)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """The augmented batch, float32 [B, C, side, side] in the range of x.

        Args:
            x: images [B, C, H, W], any dtype and device.
            draws: int64 [B] on the device of x, uniform in [0, 2^62): one for each image.

        Raises:
            InputError, InputTypeError: x or draws is not as described.
        """
        if x.dim() != 4:
            raise InputError(f"x has shape {list(x.shape)}; it must be [B, C, H, W]")
        if draws.dtype != torch.int64 or draws.shape != x.shape[:1]:
            raise InputTypeError(f"draws is {draws.dtype} {list(draws.shape)}; it must be torch.int64 [{len(x)}]")
        height, width = x.shape[2:]
        top, left, high, wide = self.parts(draws, height, width)
        steps = [(torch.arange(one, dtype=torch.float32, device=x.device) + 0.5) / one for one in self.shape]
        rows, columns = (
            first[:, None] + length[:, None] * along
            for first, length, along in ((top, high, steps[0]), (left, wide, steps[1]))
        )
        if self.flip:
            columns = torch.where(((draws >> 4 * BITS) & 1).bool()[:, None], columns.flip(1), columns)
        # from pixels, where 0 is the outer edge of the first, to [-1, 1]
        grid = torch.stack(
            torch.broadcast_tensors((2 * columns / width - 1)[:, None, :], (2 * rows / height - 1)[:, :, None]), dim=3
        )
        return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)

    def parts(self, draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of each image's part, float32 [B] in pixels."""
        area, aspect, down, along = (
            ((draws >> BITS * place) & (2**BITS - 1)).float() / (2**BITS - 1) for place in range(4)
        )
        low, high = map(math.log, ASPECTS)
        ratio = torch.exp(low + (high - low) * aspect).sqrt()
        side = torch.sqrt((self.scale + (1 - self.scale) * area) * (height * width))
        high_, wide = (side / ratio).clamp(max=height), (side * ratio).clamp(max=width)
        return (height - high_) * down, (width - wide) * along, high_, wide


class StreamedBatches(Batches):
    """Batches of images in files, as often as they are iterated, read and decoded ahead by worker processes.

    Workers hand over uint8; crop, flip, resizing and scaling are done on the device. Order and augmentation depend on
    `seed`, epoch and index alone, as in `Batches`: a batch's number is all that a run must know to go on from it, with
    any number of workers. Sources that are read fastest in one order (`Source.order`) are shuffled in parts.

    Yields `(x, y)`: x float32 [B, 3, H, W] in [0, 1], y int64 [B], both on the device.

    Args:
        images: to serve.
        batch_size: images per batch of all processes together; the last batch may have fewer.
        shuffle: serve in an order drawn anew for each epoch.
        seed: which sequence of orders and augmentations, at least 0.
        augment: as in `Batches`; with resolutions, the side of a `ResizedCropAndFlip` is that of the epoch.
        device: where to serve batches; None for the CPU.
        rank: as in `Batches`.
        world_size: as in `Batches`.
        channels_last: as in `Batches`.
        resolutions: sides of images over the run; none for that of the images.

    Raises:
        InputTypeError: images is no `StoredImages`, or a number is of another type.
        InputError: there is nothing to serve, a number is out of range, the processes cannot share a batch evenly, or
            there are resolutions of images without a size.
    """

    images: StoredImages  # type: ignore[assignment]

    def __init__(
        self,
        images: StoredImages,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
        resolutions: Sequence[Resolution] = (),
    ) -> None:
        super().__init__(
            images,  # type: ignore[arg-type]
            batch_size,
            shuffle=shuffle, seed=seed, augment=augment, rank=rank, world_size=world_size,
            channels_last=channels_last,
        )  # fmt: skip
        for one in resolutions:
            if not isinstance(one, Resolution):
                raise InputTypeError(f"one of the resolutions is {one!r}; it must be a Resolution(side, epoch)")
        check_order(resolutions)
        if resolutions and images.sizing is None:
            raise InputError("resolutions are given, but the images have no image_size")
        self.device, self.resolutions = torch.device("cpu" if device is None else device), tuple(resolutions)
        self.damaged: dict[int, str] = {}  # found while decoding, by position

    @staticmethod
    def _check_images(images: Any) -> None:
        if not isinstance(images, StoredImages):
            raise InputTypeError(f"images is a {type(images).__name__}; it must be an afd.data.StoredImages")

    def side(self, epoch: int) -> int | None:
        """The side of images in an epoch; None where they have no `Sizing`."""
        if self.images.sizing is None:
            return None
        return side_in(self.resolutions, epoch, self.images.sizing.side)

    def with_index(self, batch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `starting_at`, and which of the images each batch holds, int64 [B]."""
        order = self._order()
        draws = None if self.augment is None else self._draws()
        side, labels = self.side(self.epoch), self.images.labels
        joint = torch.split(order, self.batch_size)[batch : len(self)]
        mine = [self._rows(one).numpy() for one in joint]
        for pixels, used, problems in decoded_batches(
            self.images, mine, self._sizing(side), pinned=self.device.type == "cuda"
        ):
            self.damaged |= problems
            x = self._augmented(pixels, None if draws is None else draws[used], side)
            yield x, self._here(labels[used]), self._here(used)

    def _sizing(self, side: int | None) -> Sizing | None:
        """How workers cut images: with the margin around them where a part of each is taken from it."""
        if side is None or self.images.sizing is None:
            return None
        sizing = self.images.sizing.scaled(side)
        taken = isinstance(self.augment, ResizedCropAndFlip)
        return Sizing(sizing.shorter, sizing.shorter) if taken else sizing

    def _augmented(self, pixels: Tensor, draws: Tensor | None, side: int | None) -> Tensor:
        """A batch of bytes as it is served."""
        crop, pixels = self.augment, self._here(pixels)
        if isinstance(crop, ResizedCropAndFlip) and draws is not None:
            crop = replace(crop, side=side) if self.resolutions and side is not None else crop
            cropped = crop(pixels, self._here(draws))
            found = in_unit(cropped, self.images.scale)
            return found.contiguous(memory_format=torch.channels_last) if self.channels_last else found
        index = torch.arange(len(pixels), device=self.device)
        return self._load(pixels, index, None if draws is None else self._here(draws))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        return self.images.source.order(self.images.index, generator)

    def state_dict(self) -> dict[str, Any]:
        """Which images these are, and what was found damaged among them: a checkpoint has it."""
        return {"images": len(self.images), "digest": self.images.digest(), "damaged": dict(self.damaged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Finds that the images are those that `state_dict` said; what is known to be damaged is added.

        Raises:
            InputError: they are not.
        """
        here = self.state_dict()
        if here["digest"] != state["digest"]:
            raise InputError(
                f"the run that goes on was trained on {state['images']} other images than the {here['images']} of "
                f"{self.images.name}; it needs the same files, in the same class folders"
            )
        self.damaged |= dict(state["damaged"])
