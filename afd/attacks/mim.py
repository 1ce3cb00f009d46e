"""The momentum iterative method (Dong et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from afd.attacks import inputs
from afd.attacks.execution import Running, check_running
from afd.attacks.losses import Value
from afd.attacks.pgd import PGD
from afd.attacks.settings import BatchNormMode, LossName, Norm, OutputsName


class MIM(PGD):
    """Steps of steepest ascent along g ← decay * g + ∇ / mean|∇|, from x, inside the ball of radius eps.

    The paper divides by the sum of |∇| instead of its mean; the direction of g is the same. Each gradient is divided
    by its largest magnitude first, so that tiny and huge ones count alike; one that is zero adds nothing. NaN counts as
    0 and infinity as the largest number. The model is treated as `PGD` treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        norm, eps, alpha, steps, decay, targeted, loss, bounds, outputs, batchnorm: see `afd.attacks.MIMSettings`; a
            step size that is not given is 2/255 here.
        running: precision, piece, look and fold; likewise.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "Linf",
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor | None = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        targeted: bool = False,
        loss: LossName | Value = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        outputs: OutputsName = "logits",
        batchnorm: BatchNormMode = "eval",
        **running: Unpack[Running],
    ) -> None:
        check_running(running)
        super().__init__(
            model, norm=norm, eps=eps, alpha=alpha, steps=steps, random_start=False, seed=0, targeted=targeted,
            loss=loss, bounds=bounds, outputs=outputs, batchnorm=batchnorm, **running,
        )  # fmt: skip
        self.decay = inputs.number("decay", decay, 0.0)

    def _directions(self, x_adv: Tensor) -> Callable[[Tensor], Tensor]:
        gathered = torch.zeros_like(x_adv)
        return lambda grad: gathered.mul_(self.decay).add_(_of_mean_one(grad))


def _of_mean_one(grad: Tensor) -> Tensor:
    """Each sample's gradient scaled to a mean magnitude of 1; zero stays zero, and NaN spoils nothing else."""
    grad = grad.nan_to_num()
    images = tuple(range(1, grad.dim()))
    largest = grad.abs().amax(images, keepdim=True)
    scaled = grad / largest.where(largest > 0, torch.ones_like(largest))
    mean = scaled.abs().mean(images, keepdim=True)
    return scaled / mean.where(mean > 0, torch.ones_like(mean))
