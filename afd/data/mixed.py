"""Batches of a data set with a share of extra images, in epochs of any number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.data.images import AUGMENTATION, ORDER, Augment, Batches, Images
from afd.errors import InputError, InputTypeError, number, whole

ROWS, EXTRA_ORDER, EXTRA_AUGMENTATION = 2, 3, 4  # what is drawn, beside the data set's order and augmentation
STRETCH = 16  # rows, each stretch of which holds its share of extra images
Floats = np.ndarray[Any, np.dtype[np.float32]]


class MixedBatches(Batches):
    """Batches that hold a share of extra images, in epochs of any number of images.

    The data set and the extra images are each served in an endless sequence of orders, every order drawn anew from
    `seed` and its number, so that each image comes once before any comes again. An epoch is the next `epoch_images` of
    both together: what batch k of epoch e holds depends on seed, e and k alone, so that an interrupted run sees the
    same, in one process or several. An image is augmented by its own draw, a new one with each order.

    Of B rows, round(share B) are extra images, spread evenly, but at random within every 16 rows: each process and each
    micro-batch has its share, and neighbours may be of either kind. Extra image j has the index len(images) + j.

    Without extra images this serves the data set alone, and with the default `epoch_images` as `Batches` does.

    Args:
        images: the data set.
        batch_size: images per batch of all processes together, extra ones included.
        extra: more images, of the same form; None for none.
        share: of a batch that is extra images, in (0, 1); 0 where there are none.
        epoch_images: images of an epoch, extra ones included; None for len(images). The last batch may have fewer.
        seed: which sequence of orders and augmentations, at least 0.
        augment: as in `Batches`.
        device: where to keep all images and serve batches; None for where the data set is.
        rank: as in `Batches`.
        world_size: as in `Batches`.
        channels_last: as in `Batches`.

    Raises:
        InputTypeError: images or extra is no `Images`, or a number is of another type.
        InputError: extra has another form than images, a number is out of range, a batch has no row of one of the two,
            or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        extra: Images | None = None,
        share: float = 0.0,
        epoch_images: int | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            images, batch_size, shuffle=True, seed=seed, augment=augment, device=device, rank=rank,
            world_size=world_size, channels_last=channels_last,
        )  # fmt: skip
        self.share, self.epoch_images = share, len(images) if epoch_images is None else epoch_images
        whole("epoch_images", self.epoch_images, 1)
        if self.epoch_images < world_size:
            raise InputError(f"epoch_images is {epoch_images}; {world_size} processes need at least one each")
        self._check_extra(extra)
        self._sources = [_Source(self.images, partial(self._drawn, len(images), ORDER, AUGMENTATION))]
        if extra is not None:
            drawn = partial(self._drawn, len(extra), EXTRA_ORDER, EXTRA_AUGMENTATION)
            self._sources.append(_Source(extra.to(self.images.device), drawn))

    def _check_extra(self, extra: Images | None) -> None:
        number("share", self.share, 0.0)
        if extra is None:
            if self.share:
                raise InputError(f"share is {self.share}; without extra images it must be 0")
            return
        if not isinstance(extra, Images):
            raise InputTypeError(f"extra is a {type(extra).__name__}; it must be an afd.data.Images")
        if not len(extra):
            raise InputError("extra is empty; there must be at least one image")
        for name in ("shape", "scale", "num_classes"):
            theirs, ours = getattr(extra, name), getattr(self.images, name)
            if theirs != ours:
                raise InputError(f"extra has {name} {theirs}; it must be {ours}, as of the images")
        if not 0 < self.share < 1:
            raise InputError(f"share is {self.share}; with extra images it must be in (0, 1)")
        if not 0 < self._extra_in(self.batch_size) < self.batch_size:
            raise InputError(
                f"share is {self.share} of batch_size {self.batch_size}, which is {self._extra_in(self.batch_size)} "
                "rows; a batch must have at least one row of extra images and one of the others"
            )

    def __len__(self) -> int:
        whole_batches, rest = divmod(self.epoch_images, self.batch_size)
        return whole_batches if rest < self.world_size else whole_batches + 1

    def _extra_in(self, rows: int) -> int:
        """How many of a batch's rows are extra images."""
        return round(self.share * rows)

    def state_dict(self) -> dict[str, int]:
        """How many images there are of both kinds: a checkpoint has it, so that a run does not go on with others."""
        return {name: len(source.images) for name, source in zip(("images", "extra"), self._sources, strict=False)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Finds that the images are as many as `state_dict` said.

        Raises:
            InputError: they are not.
        """
        here = self.state_dict()
        if here != dict(state):
            there, now = (", ".join(f"{count} {name}" for name, count in one.items()) for one in (state, here))
            raise InputError(f"the run that goes on was trained on {there}, and here are {now}; it needs the same ones")

    def with_index(self, batch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `starting_at`, and which images each batch holds, int64 [B]; extra ones follow those of the data set."""
        chances = torch.rand(self.epoch_images, generator=self._generator(ROWS, self.epoch), device="cpu").numpy()
        epoch = self.epoch
        return (self._batch(epoch, one, chances) for one in range(batch, len(self)))

    def _batch(self, epoch: int, number: int, chances: Floats) -> tuple[Tensor, Tensor, Tensor]:
        kinds = self._kinds(chances[number * self.batch_size : (number + 1) * self.batch_size])
        rows = len(kinds) // self.world_size
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        parts = []
        for kind, source in enumerate(self._sources):
            skipped, count = (int((kinds[part] == kind).sum()) for part in (slice(mine.start), mine))
            parts.append(source.taken(self._before(kind, epoch, number) + skipped, count))
        index, pixels, labels, draws = (torch.cat(columns) for columns in zip(*parts, strict=True))
        # row i of the batch is the next image of its kind
        places = np.argsort(np.argsort(kinds[mine], kind="stable"), kind="stable")
        place, extra = (
            torch.from_numpy(one).to(index.device, non_blocking=True) for one in (places, np.sort(kinds[mine]))
        )
        x = self._load(pixels, place, None if self.augment is None else draws)
        index = index + extra * len(self.images)
        return x, labels.index_select(0, place), index.index_select(0, place)

    def _kinds(self, chances: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Of each row of a joint batch, whether it is an extra image, 0 or 1, out of a random number of each."""
        rows, size = np.arange(len(chances)), len(chances)
        extra = self._extra_in(size)
        even = (rows + 1) * extra // size - rows * extra // size
        return even[np.argsort(rows // STRETCH + chances, kind="stable")]

    def _before(self, kind: int, epoch: int, number: int) -> int:
        """Images of a kind in the batches before this one, of all epochs."""
        batches, rest = divmod(self.epoch_images, self.batch_size)
        whole_ones = epoch * batches + number
        extra = whole_ones * self._extra_in(self.batch_size) + epoch * self._extra_in(rest)
        return extra if kind else whole_ones * self.batch_size + epoch * rest - extra

    def _drawn(self, count: int, order: int, augmentation: int, number: int) -> tuple[Tensor, Tensor]:
        """The order of a number and its augmentation's draws, of so many images."""
        drawn = torch.randperm(count, generator=self._generator(order, number), device="cpu")
        draws = torch.randint(2**62, (count,), generator=self._generator(augmentation, number), device="cpu")
        return drawn, draws


@dataclass
class _Source:
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
