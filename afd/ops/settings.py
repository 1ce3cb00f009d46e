"""Settings of an op: one number for the batch or one per sample, and how the schemas carry them."""

from __future__ import annotations

from torch import Tensor

Setting = float | Tensor
Bounds = tuple[float, float]


def plain(x: Tensor) -> Tensor:
    """x as autograd's bystander: same memory, same version counter. Cheaper than entering no_grad."""
    return x.detach() if x.requires_grad else x


def split(setting: Setting) -> tuple[float, Tensor | None]:
    """A setting as the pair the schemas carry: one number, or one per sample."""
    return (0.0, plain(setting)) if isinstance(setting, Tensor) else (float(setting), None)
