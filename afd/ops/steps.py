"""Steps of attacks: `project`, `pgd_step` and `random_start` in the Linf, L2 and L1 ball; `project_plane` in a box.

Each but the last is an op in two variants: ``torch.ops.afd.NAME`` makes its result, ``torch.ops.afd.NAME_`` writes it
over its first argument. A setting that may be one number or one per sample travels as a pair: ``float eps`` and
``Tensor? epsilons``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afd.ops import backend, checks, native, reference
from afd.ops.checks import Bounds, Setting, detached, integer, split_bounds, split_setting
from afd.ops.library import LIBRARY, Arguments, Written, call, define, functional, in_place, into

Inputs = dict[str, Tensor | None]  # what is read while another tensor is written, by the names that callers know


def define_step(check: Callable[..., Inputs], *, updates: bool = True) -> Callable[..., Inputs]:
    """Registers both variants of an op that is served by `native.NAME(out, ...)` and `reference.NAME(...)`.

    Args:
        check: ``_NAME(x_adv, ...)``, in whose signature the variants are called; raises what is wrong with its
            arguments, and returns those that x_adv, where it is written, may share no memory with.
        updates: whether x_adv is read, too; else the functional variant goes without it, and makes a tensor like its
            next argument.
    """
    name = check.__name__.removeprefix("_")

    def make(*read: Any) -> Tensor:
        check(*(read if updates else (read[0], *read)))
        out = torch.empty_like(read[0])
        serve(out, read)
        return out

    def overwrite(*given: Any) -> None:
        checks.written("x_adv", given[0], **check(*given))
        serve(given[0], given if updates else given[1:])

    def serve(out: Tensor, read: Arguments) -> None:
        if backend.serves_natively(out):
            getattr(native, name)(out, *read)
        else:
            out.copy_(getattr(reference, name)(*read))

    define_variants(check, make, overwrite, updates=updates)
    return check


def define_variants(
    check: Callable[..., Any],
    make: Callable[..., Tensor],
    overwrite: Callable[..., None],
    *,
    written: int = 1,
    updates: bool = True,
) -> None:
    """Registers the kernels of both variants in the signature of `check`, called ``_NAME``.

    Args:
        check: whose arguments they take.
        make: the functional one.
        overwrite: the one in place.
        written: how many of the first arguments `overwrite` writes.
        updates: whether `make` takes the first argument.
    """
    parameters = list(inspect.signature(check, eval_str=True).parameters.values())
    over = [parameter.replace(annotation=Written) for parameter in parameters[:written]] + parameters[written:]
    name = check.__name__.removeprefix("_")
    define(_typed(make, name, parameters[not updates :], Tensor), lambda first, *_: torch.empty_like(first))
    define(_typed(overwrite, f"{name}_", over, None), lambda *_: None)
    torch.library.register_autograd(f"afd::{name}", _no_gradient, lib=LIBRARY)


def _typed(kernel: Any, name: str, parameters: list[inspect.Parameter], returns: type | None) -> Callable[..., Any]:
    kernel.__name__, kernel.__signature__ = name, inspect.Signature(parameters, return_annotation=returns)
    typed: Callable[..., Any] = kernel
    return typed


def _no_gradient(_context: Any, *_grads: Tensor) -> None:
    raise RuntimeError("afd's attack steps are not differentiable; differentiate the model at their result instead")


# --- project --------------------------------------------------------------------------------------------------------


@define_step
def _project(
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
) -> Inputs:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)
    return {"x": x, "eps": epsilons}


@functional
def project(
    x_adv: Tensor,
    x: Tensor,
    *,
    eps: Setting,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Arguments:
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
    radius, radii = split_setting("eps", eps)
    return detached(x_adv), detached(x), radius, *split_bounds(bounds), radii, norm


project_ = in_place(
    project,
    "`project` in place: overwrites x_adv and returns it. x_adv may not share memory with x.",
)


# --- pgd_step -------------------------------------------------------------------------------------------------------


@define_step
def _pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
    sparsity: float = 0.05,
    sparsities: Tensor | None = None,
) -> Inputs:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.gradient(grad, x)
    checks.setting("alpha", alpha, alphas, x, signed=True)
    checks.setting("eps", eps, epsilons, x)
    checks.share("sparsity", sparsity, sparsities, x)
    checks.box(low, high, x)
    return {"x": x, "grad": grad, "alpha": alphas, "eps": epsilons, "sparsity": sparsities}


@functional
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
) -> Arguments:
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
    (step, steps), (radius, radii) = split_setting("alpha", alpha), split_setting("eps", eps)
    (share, shares), (low, high) = split_setting("sparsity", sparsity), split_bounds(bounds)
    images = detached(x_adv), detached(x), detached(grad)
    return *images, step, radius, low, high, steps, radii, norm, share, shares


pgd_step_ = in_place(
    pgd_step,
    "`pgd_step` in place: overwrites x_adv and returns it. x_adv may not share memory with x or grad.",
)


# --- random_start ---------------------------------------------------------------------------------------------------


def _random_start(
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int = 0,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
    key: Tensor | None = None,
) -> Inputs:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)
    checks.key("seed", key, x)
    checks.counter("seed", seed)
    checks.counter("first_sample", first_sample)
    same = x.data_ptr() == x_adv.data_ptr() and x.stride() == x_adv.stride()
    return {"eps": epsilons, "seed": key, "x": None if same else x}


define_step(_random_start, updates=False)


@functional
def random_start(
    x: Tensor,
    *,
    eps: Setting,
    seed: int | Tensor,
    first_sample: int = 0,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> Arguments:
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
    number, key = (0, detached(seed)) if isinstance(seed, Tensor) else (integer("seed", seed), None)
    first_sample = integer("first_sample", first_sample)
    checks.counter("seed", number)  # here, because torch's own overflow error would not name them
    checks.counter("first_sample", first_sample)
    radius, radii = split_setting("eps", eps)
    return detached(x), radius, *split_bounds(bounds), number, first_sample, radii, norm, key


random_start_ = into(
    random_start,
    "`random_start` around x, written into x_adv (which may be x itself); returns x_adv.",
)


# --- project_plane --------------------------------------------------------------------------------------------------


def project_plane(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    at: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """The nearest point to x on the plane {<w, z - at> + b = 0} within the box of `bounds` (Croce & Hein 2020, FAB).

    Exact up to the rounding of its dtype; no sorting, one launch. Where several points are nearest, it is the one that
    csrc/include/afd/project_plane.h names. Where the box does not reach the plane, it is the point of the box that is
    nearest to the plane (and of these to x); where w is zero, x. What is not finite in x, w, b or at makes the point
    and its distance NaN.

    Args:
        x: points, float32 (float64 is served by the reference), [K * N, ...]; one outside of the box counts as the
            point of the box that is nearest to it.
        w: normals of the planes, [N, ...]; float32, float16, bfloat16 or float64. Row i of x has plane i mod N.
        b: values of the planes' equations where z is `at`, [N], x's dtype.
        at: points to count from, like w in shape and like x in dtype; None for the origin. Near an image, b and the
            difference z - at lose no digits.
        bounds: lowest and highest value of an image.
        norm: in which it is nearest: "Linf", "L2" or "L1".

    Returns:
        The points, a new tensor like x, and how far they are from x, [K * N].

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that disagree, reversed bounds, unknown norm.
    """
    tensors = detached(x), detached(w), detached(b), detached(at)
    found: tuple[Tensor, Tensor] = call(torch.ops.afd.project_plane.default, *tensors, *split_bounds(bounds), norm)
    return found


def _project_plane(
    x: Tensor, w: Tensor, b: Tensor, at: Tensor | None, low: float, high: float, norm: str
) -> tuple[Tensor, Tensor]:
    checks.norm(norm)
    checks.images("x", x)
    checks.planes(x, w, b, at)
    checks.box(low, high, x)
    out, distance = torch.empty_like(x), x.new_empty(x.shape[0])
    if backend.serves_natively(out):
        native.project_plane(out, x, w, at, b, distance, low, high, norm)
    else:
        for target, made in zip((out, distance), reference.project_plane(x, w, b, at, low, high, norm), strict=True):
            target.copy_(made)
    return out, distance


define(_project_plane, lambda x, *_: (torch.empty_like(x), x.new_empty(x.shape[0])))
torch.library.register_autograd("afd::project_plane", _no_gradient, lib=LIBRARY)
