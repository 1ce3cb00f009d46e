"""The ops all of afd is built on: fused kernels on CPU and CUDA, with the same formulas in PyTorch beside them.

Every op takes and returns torch tensors, runs on the tensor's device and torch's current stream, and never waits for
the device. None is differentiable: an attack differentiates the model, not its own steps. Which implementation serves
a tensor is decided in `afd.ops.backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops import backend, checks, schema
from afd.ops.apgd import apgd_step, apgd_step_, apgd_update_, momentum_point

__all__ = ["backend", "pgd_step", "pgd_step_", "random_start", "random_start_", "schema"]
__all__ += ["apgd_step", "apgd_step_", "apgd_update_", "momentum_point"]

Setting = float | Tensor
Bounds = tuple[float, float]


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    alpha: Setting,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """One step of projected gradient ascent (Madry et al. 2018).

    Linf: ``clamp(clamp(x_adv + alpha * sign(grad), x - eps, x + eps), *bounds)``. The ball is enforced by min and max
    against ``x -+ eps``, as AutoAttack does; zero and NaN gradients give no step.

    Args:
        x_adv: current iterate, float32 (float64 is served by the reference), [N, ...].
        x: clean images, like x_adv.
        grad: gradient of the loss at x_adv, same shape; float32, float16, bfloat16 or float64.
        alpha: step size in units of the image, a float or one per sample [N]; negative to descend (targeted attacks).
        eps: radius of the ball, a float >= 0 or one per sample [N].
        bounds: lowest and highest value of an image.
        norm: "Linf".

    Returns:
        The next iterate, a new tensor like x_adv.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that disagree, eps < 0, reversed bounds, unknown norm.
    """
    settings = _pgd_settings(alpha, eps, bounds, norm)
    out: Tensor = torch.ops.afd.pgd_step.default(_plain(x_adv), _plain(x), _plain(grad), *settings)
    return out


def pgd_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    alpha: Setting,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """`pgd_step` in place: overwrites x_adv and returns it. x_adv may not share memory with x or grad."""
    settings = _pgd_settings(alpha, eps, bounds, norm)
    torch.ops.afd.pgd_step_.default(_plain(x_adv), _plain(x), _plain(grad), *settings)
    return x_adv


def random_start(
    x: Tensor,
    *,
    eps: Setting,
    seed: int,
    first_sample: int = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """A uniform random point of the ball around each image, clamped to the bounds.

    Linf: ``clamp(x + eps * u, *bounds)`` with u uniform in (-1, 1) from Philox4x32-10 (Salmon et al. 2011). u depends
    on nothing but (seed, first_sample + row, element): it is the same on CPU and CUDA and for any split of a batch.

    Args:
        x: clean images, float32 (float64 is served by the reference), [N, ...].
        eps: radius of the ball, a float >= 0 or one per sample [N].
        seed: key of the generator, 0 <= seed < 2**63.
        first_sample: index of x's first row in the whole batch.
        bounds: lowest and highest value of an image.
        norm: "Linf".

    Returns:
        The start points, a new tensor like x.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: eps < 0, reversed bounds, unknown norm, seed or first_sample out of range.
    """
    settings = _start_settings(eps, bounds, seed, first_sample, norm)
    out: Tensor = torch.ops.afd.random_start.default(_plain(x), *settings)
    return out


def random_start_(
    x_adv: Tensor,
    x: Tensor,
    *,
    eps: Setting,
    seed: int,
    first_sample: int = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """`random_start` around x, written into x_adv (which may be x itself); returns x_adv."""
    settings = _start_settings(eps, bounds, seed, first_sample, norm)
    torch.ops.afd.random_start_.default(_plain(x_adv), _plain(x), *settings)
    return x_adv


def _plain(x: Tensor) -> Tensor:
    """x as autograd's bystander: same memory, same version counter. Cheaper than entering no_grad."""
    return x.detach() if x.requires_grad else x


def _split(setting: Setting) -> tuple[float, Tensor | None]:
    """A setting as the pair the schemas carry: one number, or one per sample."""
    return (0.0, _plain(setting)) if isinstance(setting, Tensor) else (float(setting), None)


def _pgd_settings(
    alpha: Setting, eps: Setting, bounds: Bounds, norm: str
) -> tuple[float, float, float, float, Tensor | None, Tensor | None]:
    checks.norm(norm)
    (step, steps), (radius, radii) = _split(alpha), _split(eps)
    return step, radius, *bounds, steps, radii


def _start_settings(
    eps: Setting, bounds: Bounds, seed: int, first_sample: int, norm: str
) -> tuple[float, float, float, int, int, Tensor | None]:
    checks.norm(norm)
    checks.counter("seed", seed)  # here, because torch's own overflow error would not name them
    checks.counter("first_sample", first_sample)
    radius, radii = _split(eps)
    return radius, *bounds, seed, first_sample, radii
