"""Batches straight from memory: the images stay on the device, and a batch is an index, a gather and a division."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from afd.data.images import Images
from afd.errors import InputError

Augment = Callable[[Tensor, torch.Generator], Tensor]

ORDER, AUGMENTATION = 0, 1


class Batches:
    """Batches of one epoch, as often as they are iterated.

    Order and augmentation depend on `seed` and the epoch only: an interrupted run that sets the epoch again sees the
    same batches, on CPU and CUDA alike. `set_epoch` moves to another epoch; iterating does not.

    Yields `(x, y)`: x float32 [B, C, H, W] in [0, 1], y int64 [B], both on the device of the images.

    Args:
        images: the images to serve.
        batch_size: images per batch, at least 1; the last batch may have fewer.
        shuffle: serve in an order drawn anew for each epoch, instead of the images' own order.
        seed: which sequence of orders and augmentations, at least 0.
        augment: called with (x, generator), the generator on the CPU; returns the x to serve. None to serve x itself.
        drop_last: leave out a last batch that has fewer images.
        device: where to keep the images and serve batches; None for where the images are.

    Raises:
        InputError: there is nothing to serve, or `batch_size` or `seed` is out of range.
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
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise InputError(f"seed is {seed}; it must be at least 0")
        if len(images) == 0:
            raise InputError("images is empty; there must be at least one image")
        if drop_last and len(images) < batch_size:
            raise InputError(f"batch_size is {batch_size}; with drop_last it must be at most the {len(images)} images")
        self.images = images if device is None else images.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, at least 0, that the next iteration serves."""
        if epoch < 0:
            raise InputError(f"epoch is {epoch}; it must be at least 0")
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order().to(self.images.device)
        generator = self._generator(AUGMENTATION)
        for index in torch.split(order, self.batch_size)[: len(self)]:
            x = self.images.images(index)
            yield x if self.augment is None else self.augment(x, generator), self.images.labels[index]

    def _order(self) -> Tensor:
        count = len(self.images)
        return torch.randperm(count, generator=self._generator(ORDER)) if self.shuffle else torch.arange(count)

    def _generator(self, purpose: int) -> torch.Generator:
        """A CPU generator for one purpose in one epoch: augmenting or not leaves the order as it is."""
        # SeedSequence hashes its inputs, so that neighbouring seeds and epochs share no stream, as seed + epoch would.
        state = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, purpose)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))
