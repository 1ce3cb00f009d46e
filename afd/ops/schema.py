"""The ops as torch sees them: schemas, fake kernels and autograd, so that compile, graphs and opcheck work.

Each op exists as ``torch.ops.afd.NAME`` (functional) and ``torch.ops.afd.NAME_`` (writes its first argument). A setting
that may be one number or one per sample travels as a pair: ``float eps`` and ``Tensor? epsilons``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.ops import backend, checks, native, reference
from afd.ops.library import LIBRARY, define


def _serve(name: str, out: Tensor, *arguments: Any) -> None:
    """Runs op `name` into `out`, which may be the argument it updates."""
    if backend.serves_natively(out):
        getattr(native, name)(out, *arguments)
    else:
        out.copy_(getattr(reference, name)(*arguments))


def _at(arguments: tuple[Any, ...], place: int) -> Any:
    """An argument, or None where the call left it to its default."""
    return arguments[place] if place < len(arguments) else None


def _no_gradient(_context: Any, *_grads: Tensor) -> None:
    raise RuntimeError("afd's attack steps are not differentiable; differentiate the model at their result instead")


def _register(name: str, arguments: str, functional: Any, updated: str, in_place: Any) -> None:
    """Defines ``name(arguments) -> Tensor`` and ``name_(updated, arguments) -> ()`` on CPU and CUDA."""
    define(name, arguments, "Tensor", functional, lambda first, *_: torch.empty_like(first))
    define(f"{name}_", updated, "()", in_place, lambda *_: None)
    torch.library.register_autograd(f"afd::{name}", _no_gradient, lib=LIBRARY)


# --- project --------------------------------------------------------------------------------------------------------


def _check_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
) -> None:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)


def _project(x_adv: Tensor, *rest: Any) -> Tensor:
    _check_project(x_adv, *rest)
    out = torch.empty_like(x_adv)
    _serve("project", out, x_adv, *rest)
    return out


def _project_(x_adv: Tensor, *rest: Any) -> None:
    _check_project(x_adv, *rest)
    checks.written("x_adv", x_adv, x=rest[0], eps=_at(rest, 4))
    _serve("project", x_adv, x_adv, *rest)


_REST = 'Tensor x, float eps, float low, float high, Tensor? epsilons=None, str norm="Linf"'
_register("project", f"Tensor x_adv, {_REST}", _project, f"Tensor(a!) x_adv, {_REST}", _project_)


# --- pgd_step -------------------------------------------------------------------------------------------------------


def _check_pgd_step(
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
) -> None:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.gradient(grad, x)
    checks.setting("alpha", alpha, alphas, x, signed=True)
    checks.setting("eps", eps, epsilons, x)
    checks.share("sparsity", sparsity, sparsities, x)
    checks.box(low, high, x)


def _pgd_step(x_adv: Tensor, *rest: Any) -> Tensor:
    _check_pgd_step(x_adv, *rest)
    out = torch.empty_like(x_adv)
    _serve("pgd_step", out, x_adv, *rest)
    return out


def _pgd_step_(x_adv: Tensor, *rest: Any) -> None:
    _check_pgd_step(x_adv, *rest)
    settings = {"alpha": _at(rest, 6), "eps": _at(rest, 7), "sparsity": _at(rest, 10)}
    checks.written("x_adv", x_adv, x=rest[0], grad=rest[1], **settings)
    _serve("pgd_step", x_adv, x_adv, *rest)


_REST = (
    "Tensor x, Tensor grad, float alpha, float eps, float low, float high, Tensor? alphas=None, Tensor? epsilons=None,"
    ' str norm="Linf", float sparsity=0.05, Tensor? sparsities=None'
)
_register("pgd_step", f"Tensor x_adv, {_REST}", _pgd_step, f"Tensor(a!) x_adv, {_REST}", _pgd_step_)


# --- random_start ---------------------------------------------------------------------------------------------------


def _check_random_start(
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
) -> None:
    checks.norm(norm)
    checks.images("x", x)
    checks.iterate("x_adv", x_adv, x)
    checks.setting("eps", eps, epsilons, x)
    checks.box(low, high, x)
    checks.key("seed", key, x)
    checks.counter("seed", seed)
    checks.counter("first_sample", first_sample)


def _random_start(x: Tensor, *rest: Any) -> Tensor:
    _check_random_start(x, x, *rest)
    out = torch.empty_like(x)
    _serve("random_start", out, x, *rest)
    return out


def _random_start_(x_adv: Tensor, x: Tensor, *rest: Any) -> None:
    _check_random_start(x_adv, x, *rest)
    checks.written("x_adv", x_adv, eps=_at(rest, 5), seed=_at(rest, 7))
    if x.data_ptr() != x_adv.data_ptr() or x.stride() != x_adv.stride():
        checks.apart("x_adv", x_adv, x=x)
    _serve("random_start", x_adv, x, *rest)


_REST = (
    "Tensor x, float eps, float low, float high, int seed, int first_sample=0, Tensor? epsilons=None, "
    'str norm="Linf", Tensor? key=None'
)
_register("random_start", _REST, _random_start, f"Tensor(a!) x_adv, {_REST}", _random_start_)
