"""What an attack is built for: a model, and the ball in which to look."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd.attacks.settings import Norm
from afd.errors import InputError, in_levels, one_of
from afd.evaluation.epsilon import Epsilon

NORMS = ("Linf", "L2", "L1")


@dataclass(frozen=True)
class Target:
    """A model under attack.

    Attributes:
        model: images -> logits [N, classes].
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image.
        seed: of whatever the attack draws.
        classes: number of logits.
    """

    model: nn.Module
    norm: Norm
    eps: float
    seed: int
    classes: int


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """‖x_adv - x‖ of each image, float64 [N], from images [N, ...].

    Raises:
        InputError: unknown norm.
    """
    one_of("norm", norm, NORMS)
    difference = (x_adv.double() - x.double()).flatten(1)
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    length: Tensor = torch.linalg.vector_norm(difference, order, dim=1)
    return length


def diameter(norm: str, values: int) -> float:
    """The largest distance between two images of so many values in [0, 1].

    Raises:
        InputError: unknown norm.
    """
    one_of("norm", norm, NORMS)
    return float({"Linf": 1, "L2": math.sqrt(values), "L1": values}[norm])


def check_radius(eps: float | Epsilon, norm: str, values: int) -> None:
    """Raises InputError if a radius exceeds the distance of any two images of so many values in [0, 1]."""
    widest = diameter(norm, values)
    if float(eps) > widest:
        raise InputError(
            f"eps is {eps} in {norm}; no two images in [0, 1] are further apart than {widest:g}"
            + (in_levels(float(eps)) if norm == "Linf" else ", so name a smaller radius")
        )


def within(lengths: Tensor, eps: float) -> Tensor:
    """Whether distances [N] are at most eps, up to the rounding of float32 images: 1e-6 and a hundred thousandth."""
    return lengths <= eps * (1 + 1e-5) + 1e-6


def shorten(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """x_adv pulled back into the ball of radius eps around x, as Foolbox does: Linf clamps, L2 and L1 scale.

    What lies inside stays as it is, bit for bit.
    """
    if norm == "Linf":
        return torch.maximum(torch.minimum(x_adv, x + eps), x - eps)
    lengths = distance(x_adv, x, norm)
    share = per_row((eps / lengths.clamp(min=1e-30)).to(x.dtype), x)
    return torch.where(per_row(lengths <= eps, x), x_adv, x + (x_adv - x) * share)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Values [N] in a shape that broadcasts against images [N, ...]."""
    return values.view(-1, *[1] * (x.dim() - 1))
