"""What size images in files are brought to, and how that grows over a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.errors import InputError, whole

SMALL = 64  # pixels of a side up to which images are brought to their size without a margin
MARGIN = 8 / 7  # of the shorter side over the square that is cut, beyond that: ImageNet's 256 over 224


@dataclass(frozen=True)
class Sizing:
    """What square of an image's middle a network sees.

    Attributes:
        side: of the square.
        shorter: length that the image's shorter side is brought to before.

    Raises:
        InputError: a length is below 1, or the square would be larger than the image.
        InputTypeError: a length is no whole number.
    """

    side: int
    shorter: int

    def __post_init__(self) -> None:
        whole("image_size", self.side, 1)
        whole("resize", self.shorter, 1)
        if self.shorter < self.side:
            raise InputError(f"resize is {self.shorter}; it must be at least the image size, {self.side}")

    @classmethod
    def of(cls, side: int, shorter: int | None = None) -> Sizing:
        """A square with the usual margin, unless another is named."""
        whole("image_size", side, 1)
        usual = side if side <= SMALL else round(side * MARGIN)
        return cls(side, usual if shorter is None else shorter)

    def scaled(self, side: int) -> Sizing:
        """The same margin around another square."""
        return Sizing(side, max(side, round(self.shorter * side / self.side)))


@dataclass(frozen=True)
class Resolution:
    """The side of training images from an epoch on.

    Attributes:
        side: of the square.
        epoch: counted from 1.
    """

    side: int
    epoch: int


def resolutions_of(words: Sequence[str]) -> tuple[Resolution, ...]:
    """Sides as ``SIDE:EPOCH``, such as ``128:1 224:7``.

    Raises:
        InputError: one is not written so, the first is not of epoch 1, or epochs do not ascend.
    """
    found = []
    for word in words:
        side, colon, epoch = word.partition(":")
        if not (colon and side.isdecimal() and epoch.isdecimal() and int(side) and int(epoch)):
            raise InputError(f"one of the resolutions is {word!r}; it must be SIDE:EPOCH, such as 128:1")
        found.append(Resolution(int(side), int(epoch)))
    check_order(found)
    return tuple(found)


def check_order(resolutions: Sequence[Resolution]) -> None:
    """Raises InputError unless resolutions begin with epoch 1, and their epochs ascend."""
    epochs = [one.epoch for one in resolutions]
    if epochs and (epochs[0] != 1 or epochs != sorted(set(epochs))):
        told = " ".join(f"{one.side}:{one.epoch}" for one in resolutions)
        raise InputError(f"resolutions are {told}; they must begin with epoch 1, and epochs must ascend")


def side_in(resolutions: Sequence[Resolution], epoch: int, usual: int) -> int:
    """The side of training images in an epoch, counted from 1 (before it, that of the first)."""
    begun = [one.side for one in resolutions if one.epoch <= max(epoch, 1)]
    return begun[-1] if begun else usual
