"""The ops all of afd is built on: fused kernels on CPU and CUDA, with the same formulas in PyTorch beside them.

Every op takes and returns torch tensors, runs on the tensor's device and torch's current stream, and never waits for
the device. What autocast, a default dtype or device, or another mode of torch does around a call changes no result.
What is written in place is a tensor's memory, whether or not it requires gradients. A setting given as one number is
checked; of one per sample, a tensor in the images' dtype, no value is looked at: NaN makes its sample NaN, and a
negative radius has no meaning and no defined result.

Those of attacks are not differentiable: an attack differentiates the model, not its own steps. The spectral ones are
layers, and are (`afd.ops.spectral`). Which implementation serves a tensor is decided in `afd.ops.backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops import backend, checks, schema
from afd.ops.apgd import apgd_step, apgd_step_, apgd_update_, momentum_point
from afd.ops.library import call
from afd.ops.loading import load_batch
from afd.ops.settings import Bounds, Setting, box, detached, integer, split
from afd.ops.spectral import Spectrum, projection_logits, spectral_linear, spectral_norm

__all__ = ["backend", "pgd_step", "pgd_step_", "project", "project_", "random_start", "random_start_", "schema"]
__all__ += ["apgd_step", "apgd_step_", "apgd_update_", "momentum_point"]
__all__ += ["load_batch"]
__all__ += ["Spectrum", "projection_logits", "spectral_linear", "spectral_norm"]


def project(
    x_adv: Tensor,
    x: Tensor,
    *,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """The nearest point to x_adv in the ball of radius eps around x and in the box of `bounds`.

    With ``u = x_adv - x``, per sample:

    - Linf: ``clamp(clamp(x_adv, x - eps, x + eps), *bounds)``.
    - L2: ``clamp(x + u * min(1, eps / |u|), *bounds)``; clamping only shortens u, since x lies in the box.
    - L1: the exact Euclidean projection on ball and box together (Croce & Hein, "Mind the box", ICML 2021),
      ``x + sign(u) * min(max(|u| - lam, 0), room)``, where room is x's distance from the box on u's side and lam >= 0
      makes the L1 norm eps. No sorting: a bracketed Newton search for lam, to 4e-7 of eps.

    In L2 and L1 a feasible x_adv is returned bit for bit, and rounding never takes a result out of the ball or the
    box. NaN in x_adv, x or eps makes its element (Linf) or its sample (L2, L1) NaN, as infinity does in L2 and L1. So
    does a negative eps in L2 and L1; in Linf, nothing being that near, the result is x + eps.

    Args:
        x_adv: any points, float32 (float64 is served by the reference), [N, ...].
        x: clean images inside the bounds, like x_adv.
        eps: radius of the ball, a float >= 0 or one per sample [N].
        bounds: lowest and highest value of an image.
        norm: "Linf", "L2" or "L1".

    Returns:
        The projections, a new tensor like x_adv.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that disagree, eps < 0, reversed bounds, unknown norm.
    """
    out: Tensor = call(torch.ops.afd.project.default, detached(x_adv), detached(x), *_ball_settings(eps, bounds, norm))
    return out


def project_(
    x_adv: Tensor,
    x: Tensor,
    *,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """`project` in place: overwrites x_adv and returns it. x_adv may not share memory with x."""
    call(torch.ops.afd.project_.default, detached(x_adv), detached(x), *_ball_settings(eps, bounds, norm))
    return x_adv


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    alpha: Setting,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
    sparsity: Setting = 0.05,
) -> Tensor:
    """One step of projected gradient ascent (Madry et al. 2018): a step of steepest ascent, then `project`.

    - Linf: ``x_adv + alpha * sign(grad)``. The ball is enforced by min and max against ``x -+ eps``, as AutoAttack
      does; zero and NaN gradients give no step.
    - L2: ``x_adv + alpha * grad / |grad|``, whatever the gradient's scale: denormal and huge ones give a step of full
      length, a zero one gives none. NaN counts as 0 and infinity as the largest float.
    - L1: the k = max(1, round(sparsity * elements)) elements with the largest |grad| share the step: each moves by
      ``alpha / moved * sign(grad)`` (Croce & Hein, "Mind the box", ICML 2021). All that tie for the last place move,
      as in AutoAttack; zero and NaN gradients never do.

    Args:
        x_adv: current iterate, float32 (float64 is served by the reference), [N, ...].
        x: clean images, like x_adv.
        grad: gradient of the loss at x_adv, same shape; float32, float16, bfloat16 or float64.
        alpha: step size in units of the image, a float or one per sample [N]; negative to descend (targeted attacks).
        eps: radius of the ball, a float >= 0 or one per sample [N].
        bounds: lowest and highest value of an image.
        norm: "Linf", "L2" or "L1".
        sparsity: share of the elements that an L1 step moves, a float in (0, 1] or one per sample [N].

    Returns:
        The next iterate, a new tensor like x_adv.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that disagree, eps < 0, sparsity outside (0, 1], reversed bounds, unknown norm.
    """
    settings = _pgd_settings(alpha, eps, bounds, norm, sparsity)
    out: Tensor = call(torch.ops.afd.pgd_step.default, detached(x_adv), detached(x), detached(grad), *settings)
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
    sparsity: Setting = 0.05,
) -> Tensor:
    """`pgd_step` in place: overwrites x_adv and returns it. x_adv may not share memory with x or grad."""
    settings = _pgd_settings(alpha, eps, bounds, norm, sparsity)
    call(torch.ops.afd.pgd_step_.default, detached(x_adv), detached(x), detached(grad), *settings)
    return x_adv


def random_start(
    x: Tensor,
    *,
    eps: Setting,
    seed: int | Tensor,
    first_sample: int = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """A uniform random point of the ball around each image, clamped to the bounds.

    ``clamp(x + eps * v, *bounds)`` with v uniform in the unit ball, drawn by Philox4x32-10 (Salmon et al. 2011):

    - Linf: each element uniform in (-1, 1).
    - L2: normal draws over their norm, with two more draws under the root (Harman & Lacko 2010).
    - L1: exponential draws with random signs over the sum of their sizes and one more (Barthe et al. 2005).

    v depends on nothing but (seed, first_sample + row, element): it is the same for any split of a batch, and on CPU
    and CUDA (bit for bit in Linf, up to the order of a sum in L2 and L1).

    Args:
        x: clean images, float32 (float64 is served by the reference), [N, ...].
        eps: radius of the ball, a float >= 0 or one per sample [N].
        seed: key of the generator, 0 <= seed < 2**63; an int64 tensor [] on x's device is read there, so that each
            replay of a recorded graph may find another.
        first_sample: index of x's first row in the whole batch.
        bounds: lowest and highest value of an image.
        norm: "Linf", "L2" or "L1".

    Returns:
        The start points, a new tensor like x.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: eps < 0, reversed bounds, unknown norm, seed or first_sample out of range.
    """
    settings = _start_settings(eps, bounds, seed, first_sample, norm)
    out: Tensor = call(torch.ops.afd.random_start.default, detached(x), *settings)
    return out


def random_start_(
    x_adv: Tensor,
    x: Tensor,
    *,
    eps: Setting,
    seed: int | Tensor,
    first_sample: int = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Tensor:
    """`random_start` around x, written into x_adv (which may be x itself); returns x_adv."""
    settings = _start_settings(eps, bounds, seed, first_sample, norm)
    call(torch.ops.afd.random_start_.default, detached(x_adv), detached(x), *settings)
    return x_adv


def _ball_settings(eps: Setting, bounds: Bounds, norm: str) -> tuple[float, float, float, Tensor | None, str]:
    radius, radii = split("eps", eps)
    return radius, *box(bounds), radii, norm


def _pgd_settings(
    alpha: Setting, eps: Setting, bounds: Bounds, norm: str, sparsity: Setting
) -> tuple[float, float, float, float, Tensor | None, Tensor | None, str, float, Tensor | None]:
    (step, steps), (radius, radii) = split("alpha", alpha), split("eps", eps)
    share, shares = split("sparsity", sparsity)
    return step, radius, *box(bounds), steps, radii, norm, share, shares


def _start_settings(
    eps: Setting, bounds: Bounds, seed: int | Tensor, first_sample: int, norm: str
) -> tuple[float, float, float, int, int, Tensor | None, str, Tensor | None]:
    number, key = (0, detached(seed)) if isinstance(seed, Tensor) else (integer("seed", seed), None)
    first_sample = integer("first_sample", first_sample)
    checks.counter("seed", number)  # here, because torch's own overflow error would not name them
    checks.counter("first_sample", first_sample)
    radius, radii = split("eps", eps)
    return radius, *box(bounds), number, first_sample, radii, norm, key
