"""The fast gradient sign method (Goodfellow et al. 2015)."""

from __future__ import annotations

from torch import Tensor, nn

from afd.attacks.pgd import PGD


class FGSM(PGD):
    """One step of length eps from x, in Linf clamp(x + eps * sign(∇ loss)), in L2 and L1 as `ops.pgd_step` steps.

    The model is treated as `PGD` treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        norm: "Linf", "L2" or "L1".
        eps: length of the step, in units of the image; a float >= 0 or one per sample [N].
        targeted: y is the class to reach, and the loss is descended.
        loss: as in `PGD`.
        bounds: lowest and highest value of an image.
        precision: as in `PGD`.
        piece: as in `PGD`.
        look: as in `PGD`.
        fold: as in `PGD`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        targeted: bool = False,
        loss: str = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        precision: str = "fp32",
        piece: int | None = None,
        look: bool = True,
        fold: bool = True,
    ) -> None:
        super().__init__(
            model, norm=norm, eps=eps, alpha=eps, steps=1, random_start=False, targeted=targeted, loss=loss,
            bounds=bounds, precision=precision, piece=piece, look=look, fold=fold,
        )  # fmt: skip
