"""The fast gradient sign method (Goodfellow et al. 2015)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from afd.attacks.execution import Running, check_running
from afd.attacks.losses import Value
from afd.attacks.pgd import PGD
from afd.attacks.settings import BatchNormMode, LossName, Norm, OutputsName


class FGSM(PGD):
    """One step of length eps from x, in Linf clamp(x + eps * sign(∇ loss)), in L2 and L1 as `ops.pgd_step` steps.

    The model is treated as `PGD` treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        norm, eps, targeted, loss, bounds, outputs, batchnorm: see `afd.attacks.FGSMSettings`.
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
        targeted: bool = False,
        loss: LossName | Value = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        outputs: OutputsName = "logits",
        batchnorm: BatchNormMode = "eval",
        **running: Unpack[Running],
    ) -> None:
        check_running(running)
        super().__init__(
            model, norm=norm, eps=eps, alpha=eps, steps=1, random_start=False, seed=0, targeted=targeted, loss=loss,
            bounds=bounds, outputs=outputs, batchnorm=batchnorm, **running,
        )  # fmt: skip
