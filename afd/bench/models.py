"""What attacks are timed on: networks with the images they take, by name or from the user's own factory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd.errors import InputError
from afd.nn import build_model


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode with a batch it classifies rightly.

    Attributes:
        name: what it was asked for by.
        model: images -> logits.
        x: images [N, C, H, W] in [0, 1].
        y: the model's own predictions [N], so that every library has every image to attack.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def size(self) -> str:
        """The batch's shape, as in 128x3x32x32."""
        return "x".join(map(str, self.x.shape))


def lenet() -> nn.Module:
    """LeNet-size network for 1x28x28 images, as attack libraries use in their MNIST examples."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 1024), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """ResNet-18 for 3x32x32 images."""
    return build_model("resnet18", (3, 32, 32), 10, 64)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet": (lenet, (1, 28, 28), 512),
    "resnet18": (resnet18, (3, 32, 32), 128),
}


def subject(
    name: str, batch: int | None = None, shape: tuple[int, ...] | None = None, device: torch.device | str = "cpu"
) -> Subject:
    """A model by name with random images.

    Args:
        name: one of `MODELS`, or "package.module:factory", a function without arguments that returns a classifier.
        batch: number of images; None for the model's own (128 for a factory).
        shape: of one image, [C, H, W]; None for the model's own (3x32x32 for a factory).
        device: where to.

    Raises:
        InputError: unknown name, or a factory that cannot be imported or called.
    """
    build, own_shape, own_batch = MODELS.get(name) or (factory(name), (3, 32, 32), 128)
    torch.manual_seed(0)
    try:
        model = build().to(device).eval()
    except Exception as error:
        raise InputError(f"model is {name!r}, whose factory raised {type(error).__name__}: {error}") from error
    x = torch.rand(batch or own_batch, *(shape or own_shape), device=device)
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(128)])
    return Subject(name, model, x, y)


def factory(name: str) -> Callable[[], nn.Module]:
    """The function that "package.module:function" names.

    Raises:
        InputError: there is none.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"model is {name!r}; allowed are {', '.join(MODELS)}, and package.module:factory")
    try:
        found: Callable[[], nn.Module] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model is {name!r}, which cannot be imported: {error}") from error
    return found
