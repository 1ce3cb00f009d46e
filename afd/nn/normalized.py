"""Images in [0, 1] normalised inside of a network, so that radii stay those of the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afd.errors import InputError, fraction

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # means and deviations of its training images' channels
Stats = tuple[tuple[float, ...], tuple[float, ...]]


class Normalized(nn.Module):
    """A classifier of normalised images as one of images in [0, 1]: x -> model((x - mean) / std).

    So an attack's ε, its projection and its bounds are those of the images that people see, whatever the network was
    trained on. The state_dict is the model's own, by its own names: plain weights load into either, and what is saved
    loads into the model without this. Mean and deviation are no part of it (`afd.training.save_weights` notes them
    beside it); they move with the module.

    Args:
        model: normalised images [N, C, ...] -> whatever it returns.
        mean: of each channel, or one for all.
        std: deviation of each channel, or one for all; above 0.

    Raises:
        InputError: they are not finite, not as many as each other, or a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        super().__init__()
        means, deviations = _numbers("mean", mean), _numbers("std", std)
        if len(means) != len(deviations):
            raise InputError(f"mean has {len(means)} numbers and std {len(deviations)}; it is one of each a channel")
        if min(deviations) <= 0:
            raise InputError(f"std is {', '.join(f'{one:g}' for one in deviations)}; each must be above 0")
        self.stats: Stats = means, deviations
        self.register_buffer("mean", torch.tensor(means), persistent=False)
        self.register_buffer("std", torch.tensor(deviations), persistent=False)
        self.model = model
        self._register_load_state_dict_pre_hook(_put_inside)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_taken_out)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Any:
        """What the model makes of images [N, C, ...] in [0, 1]."""
        channels = (-1, *[1] * (x.dim() - 2))
        return self.model((x - self.mean.view(channels)) / self.std.view(channels))

    def extra_repr(self) -> str:
        """Mean and deviation."""
        return f"mean={self.stats[0]}, std={self.stats[1]}"


def _numbers(name: str, given: Sequence[float] | float) -> tuple[float, ...]:
    try:
        numbers = tuple(float(one) for one in torch.as_tensor(given, dtype=torch.float64, device="cpu").reshape(-1))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is {given!r}; it must be numbers, one a channel") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} is {given!r}; it must be finite numbers, one a channel")
    return numbers


def _taken_out(_module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    """The model's tensors by its own names."""
    within = f"{prefix}model."
    names = [name for name in state if name.startswith(within)]
    held = [state.pop(name) for name in names]  # first, as a name without it may be another's with it
    state.update({prefix + name[len(within) :]: one for name, one in zip(names, held, strict=True)})
    versions = getattr(state, "_metadata", {})  # of the layers, by their names: here both, as loading asks for either
    versions.update({prefix + name[len(within) :]: one for name, one in versions.items() if name.startswith(within)})


def _put_inside(state: dict[str, Any], prefix: str, *_others: Any) -> None:
    """And back, for loading."""
    names = [name for name in state if name.startswith(prefix)]
    held = [state.pop(name) for name in names]
    state.update({f"{prefix}model.{name[len(prefix) :]}": one for name, one in zip(names, held, strict=True)})


def normalized(model: nn.Module, stats: Stats | None) -> nn.Module:
    """A model of images in [0, 1], where its own are normalised by means and deviations, if by any."""
    return model if stats is None else Normalized(model, *stats)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of a `Normalized`; any other as it is."""
    return model.model if isinstance(model, Normalized) else model


def stats_in(text: str, channels: int) -> Stats:
    """Means and deviations as ``--input-stats`` has them.

    Args:
        text: "imagenet"; MEAN,STD for all channels; or all means, then all deviations. Numbers may be fractions.
        channels: of an image.

    Raises:
        InputError: it is none of these, or not for so many channels.
    """
    allowed = f"imagenet, MEAN,STD, or {channels} means and then {channels} deviations, with commas between"
    if text == "imagenet":
        if channels != len(IMAGENET[0]):
            raise InputError(f"input-stats is imagenet, of 3 channels, but images have {channels}; name {allowed[10:]}")
        return IMAGENET
    try:
        numbers = [fraction(one) for one in text.split(",")]
    except ValueError as error:
        raise InputError(f"input-stats is {text!r}; allowed are {allowed}") from error
    if len(numbers) == 2:
        numbers = [numbers[0]] * channels + [numbers[1]] * channels
    if len(numbers) != 2 * channels:
        raise InputError(f"input-stats is {text!r}, {len(numbers)} numbers; allowed are {allowed}")
    means, deviations = tuple(numbers[:channels]), tuple(numbers[channels:])
    if not all(map(math.isfinite, numbers)) or min(deviations) <= 0:
        raise InputError(f"input-stats is {text!r}; numbers must be finite, and deviations above 0")
    return means, deviations


def stats_from(noted: Mapping[str, Any] | None) -> Stats | None:
    """Means and deviations as plain JSON has them."""
    return None if noted is None else (tuple(noted["mean"]), tuple(noted["std"]))


def stats_of(model: nn.Module) -> dict[str, Any] | None:
    """Those of a `Normalized`, in plain JSON; None for any other model."""
    return {"mean": [*model.stats[0]], "std": [*model.stats[1]]} if isinstance(model, Normalized) else None
