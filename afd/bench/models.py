"""What attacks are timed on: networks with the images they take, by name or from the user's own factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afd.errors import InputError, count, out_of_memory
from afd.evaluation.subject import from_factory
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

    def first(self, images: int) -> Subject:
        """The same with fewer images."""
        return replace(self, x=self.x[:images], y=self.y[:images])


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


def image_shape(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of an image that a model is timed on.

    Raises:
        InputError: the model has no such name, or the shape a side below 1.
    """
    if name not in MODELS and ":" not in name:
        raise InputError(f"model is {name!r}; allowed are {', '.join(MODELS)}, and package.module:factory")
    found = shape or (MODELS[name][1] if name in MODELS else (3, 32, 32))
    if min(found) < 1:
        raise InputError(f"shape is {'x'.join(map(str, found))}; each side must be at least 1")
    return found


def subject(
    name: str,
    batch: int | None = None,
    shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
    own: nn.Module | None = None,
) -> Subject:
    """A model by name with random images.

    Args:
        name: one of `MODELS`, or "package.module:factory", a function without arguments that returns a classifier.
        batch: number of images; None for the model's own (128 for a factory).
        shape: of one image, [C, H, W]; None for the model's own (3x32x32 for a factory).
        device: where to.
        own: what the factory has returned already, if it was called.

    Raises:
        InputError: unknown name, no image, or a model that does not take images of that shape.
        SubjectError: a factory that cannot be imported or called, or returns no model.
    """
    size = image_shape(name, shape)
    if batch is not None:
        count("batch", batch, 1)
    torch.manual_seed(0)
    if name in MODELS:
        build, _, own_batch = MODELS[name]
        model = build().to(device).eval()
    else:
        model = from_factory(name, torch.device(device)).model if own is None else own.to(device)
        own_batch = 128
    images = own_batch if batch is None else batch
    x = torch.rand(images, *size, device=device)
    try:
        with torch.no_grad():
            y = torch.cat([model(part).argmax(1) for part in x.split(128)])
    except (RuntimeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        told, reason = "x".join(map(str, size)), str(error).split("\n", 1)[0]
        raise InputError(f"shape is {told}, which model {name} does not take: {reason}") from error
    return Subject(name, model, x, y)
