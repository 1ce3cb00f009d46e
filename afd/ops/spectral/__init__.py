"""Spectral normalisation (Miyato et al. 2018) of whole networks: differentiable ops, fused around torch's products.

σ is estimated by power iteration, u and v are constants of the gradient, and W/σ is never formed. Torch dispatches the
ops, but for transforms of torch.func, which follow the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd.ops.checks import integer, number
from afd.ops.library import call, plain, transformed, widened
from afd.ops.spectral import autograd, schema


class Spectrum(NamedTuple):
    """The largest singular value of a matrix and its vectors, as power iteration estimates them.

    Attributes:
        sigma: the value, a scalar tensor.
        u: left vector [rows].
        v: right vector [columns].
    """

    sigma: Tensor
    u: Tensor
    v: Tensor


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iter: int = 1,
    eps: float = 1e-12,
    first: str = "u",
    names: Sequence[str] | None = None,
) -> list[Spectrum]:
    """Power iterations of a whole group of matrices in one call.

    With W = weight.flatten(1), each of the n_iter iterations is ``u = Wv / |Wv|; v = Wᵀu / |Wᵀu|``, and then
    ``sigma = uᵀWv``: the steps of `torch.nn.utils.parametrizations.spectral_norm`. The inputs u and v are left as they
    are: the new ones are new tensors, so whatever an earlier forward saved for its backward stays valid.

    Where torch would divide by zero: a vector whose successor is no longer than eps stays as it is, and a sigma whose
    size is at most eps becomes eps (the gradient is still that of uᵀWv).

    Differentiable in the weights, u and v being constants: the gradient of sigma is u vᵀ.

    Args:
        weights: matrices [rows, columns], or filters [rows, ...] that stand for their flattened matrix; contiguous,
            float32 (float64 is served by the reference), one dtype and one device for the group.
        us: left vectors [rows], of unit length.
        vs: right vectors [columns], of unit length.
        n_iter: power iterations; with 0, sigma follows from u and v as they are.
        eps: what counts as zero, at least 1e-30.
        first: which vector an iteration updates first. "v" is the order of `torch.nn.utils.spectral_norm` (the older
            one), and takes two passes over the weights instead of one.
        names: what error messages call the weights.

    Returns:
        A spectrum for each weight.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that disagree.
        ValueError: shapes, devices or layouts that are not as described, a setting out of range; on the CPU also a
            weight whose norm is not finite. (On a GPU looking would wait for it: there sigma is NaN or infinite, and so
            is what it divides.)
    """
    called = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    tensors, settings = (list(weights), list(us), list(vs)), (integer("n_iter", n_iter), number("eps", eps), first)
    if plain(*weights, *us, *vs) and not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        sigma, new_us, new_vs = schema.spectral_norm(*tensors, *settings, called)
    elif transformed() and _tensors(*weights, *us, *vs):
        schema.group(called, *tensors, *settings)
        sigma, new_us, new_vs = autograd.norm_formula(*tensors, *settings)
    else:
        sigma, new_us, new_vs = call(torch.ops.afd.spectral_norm.default, *tensors, *settings, called)
    return list(map(Spectrum, sigma.unbind(), new_us, new_vs))


def spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, spectrum: Spectrum, *, negative_slope: float = 1.0
) -> Tensor:
    """A spectral-normalised linear layer with its activation: ``act(x Wᵀ / sigma + bias)``.

    ``act(t)`` is t where t > 0 and ``negative_slope * t`` elsewhere. Differentiable in x, weight and bias, twice too.
    The weight's gradient goes through sigma as well (u and v being constants), so the spectrum is taken as it is: no
    gradient reaches its tensors.

    Args:
        x: inputs [N, columns], N >= 1, float32 (float64 is served by the reference); under autocast, also what autocast
            made float16 or bfloat16: it is widened to the weight's dtype, in which everything is computed.
        weight: matrix [rows, columns], contiguous, like x.
        bias: [rows], or None.
        spectrum: of the weight, from `spectral_norm`.
        negative_slope: of the LeakyReLU, in (0, 1]; 1 is the identity.

    Returns:
        Activations [N, rows].

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that disagree.
        ValueError: shapes, devices or layouts that are not as described, negative_slope out of range.
    """
    arguments = widened(x, weight), weight, bias, *spectrum, number("negative_slope", negative_slope)
    if transformed() and _tensors(*arguments[:-1]):
        schema.linear(*arguments)
        return autograd.linear_formula(*arguments)
    out: Tensor = call(torch.ops.afd.spectral_linear.default, *arguments)
    return out


def projection_logits(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    w_spectrum: Spectrum,
    y: Tensor | None = None,
    e: Tensor | None = None,
    e_spectrum: Spectrum | None = None,
) -> Tensor:
    """The head of a projection discriminator (Miyato & Koyama 2018), ``h·w / sigma_w + bias + <h, e_y> / sigma_e``.

    Differentiable in h, w, bias and e, twice too, and through both sigmas as in `spectral_linear`. The gradient of e is
    summed in the order of the samples: equal calls give equal bits.

    Args:
        h: hidden features [N, width], N >= 1, float32 (float64 is served by the reference); under autocast, also
            float16 or bfloat16, which is widened to w's dtype.
        w: [1, width], like h.
        bias: [1], or None.
        w_spectrum: of w, from `spectral_norm`.
        y: labels [N] int64 in [0, classes); None leaves the class term out.
        e: class embedding [classes, width], like h.
        e_spectrum: of e.

    Returns:
        Scores [N]. On a GPU, where looking would wait for it, a label out of range makes its score NaN.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that disagree.
        ValueError: shapes, devices or layouts that are not as described; on the CPU also a label out of range.
    """
    of_e = (None, None, None) if e_spectrum is None else e_spectrum
    arguments = widened(h, w), w, bias, *w_spectrum, y, e, *of_e
    if transformed() and _tensors(*arguments):
        schema.head(*arguments)
        return autograd.head_formula(*arguments)
    score: Tensor = call(torch.ops.afd.projection_logits.default, *arguments)
    return score


def _tensors(*given: Any) -> bool:
    return all(one is None or isinstance(one, Tensor) for one in given)
