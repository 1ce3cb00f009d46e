"""The projection discriminator as one node of autograd, on the kernels of the three spectral ops.

At a batch of 128 the products of a 512-wide layer take 0.2 ms each, and every op that is dispatched, recorded and
differentiated by itself costs a good part of that again. Here the whole network is recorded once and calls the kernels
directly. Its backward writes each layer's gradient over the one above, and leaves out what the present backward pass
does not ask for: the game's features step wants the gradient of z alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from afd.errors import InputError, InputTypeError
from afd.ops import backend
from afd.ops.library import blame_inference, ordinary, plain, unaffected, widened
from afd.ops.spectral import Spectrum, native, projection_logits, reference, schema, spectral_linear
from afd.ops.spectral.autograd import derive

Context = Any


def projection_network(
    z: Tensor,
    y: Tensor | None,
    parameters: Sequence[Tensor],
    spectra: Sequence[Spectrum],
    *,
    negative_slope: float,
) -> Tensor:
    """Scores of a stack of `spectral_linear` under `projection_logits`; the same values and gradients, sooner.

    Args:
        z: input of the first layer [N, width].
        y: labels [N], or None.
        parameters: weight and bias of each layer, then w, its bias, and e.
        spectra: of each layer's weight, of w and of e.
        negative_slope: of the layers' LeakyReLU.

    Raises:
        TypeError, ValueError: as those ops do.
    """
    z = widened(z, parameters[0])
    if isinstance(z, Tensor) and z.dtype != parameters[0].dtype:
        raise InputTypeError(f"z is {z.dtype}; it must have the weights' dtype, {parameters[0].dtype}")
    if not (plain(*parameters) and ordinary(z) and (y is None or ordinary(y)) and backend.serves_natively(z)):
        return _composed(z, y, parameters, spectra, negative_slope)
    schema.slope(negative_slope)
    schema.features("z", z, (parameters[0] if len(spectra) > 2 else parameters[-3]).shape[1])
    if y is not None:
        schema.labels(y, z, parameters[-1].shape[0])
    if not _fit(z, parameters, spectra):
        _check(z, parameters, spectra)
    score: Tensor
    if torch.is_grad_enabled():
        try:
            score = _Network.apply(y, spectra, negative_slope, z, *parameters)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            blame_inference(error, [("z", z), ("y", y), *((f"parameter {i}", p) for i, p in enumerate(parameters))])
            raise
    else:
        score, _ = _forward(z, y, parameters, spectra, negative_slope)
    return score


def _composed(
    z: Tensor, y: Tensor | None, parameters: Sequence[Tensor], spectra: Sequence[Spectrum], slope: float
) -> Tensor:
    """The network op by op."""
    *layers, w, bias, e = parameters
    *inner, of_w, of_e = spectra
    for weight, b, spectrum in zip(layers[::2], layers[1::2], inner, strict=True):
        z = spectral_linear(z, weight, b, spectrum, negative_slope=slope)
    return projection_logits(z, w, bias, of_w, y, e, of_e)


def _fit(z: Tensor, parameters: Sequence[Tensor], spectra: Sequence[Spectrum]) -> bool:
    """Whether `_check` has nothing to say of them, found out in a fraction of its time."""
    dtype, device = z.dtype, z.device
    weights = [*parameters[:-1:2], parameters[-1]]
    outputs = [weight.shape[0] for weight in weights]
    inputs = [z.shape[-1], *outputs[:-2]]
    return (
        [weight.shape[1] for weight in weights] == [*inputs, inputs[-1]]
        and outputs[-2] == 1
        and all(bias.shape == (rows,) for bias, rows in zip(parameters[1::2], outputs, strict=False))
        and all(weight.shape == (len(u), len(v)) for weight, (_, u, v) in zip(weights, spectra, strict=True))
        and all(p.dtype is dtype and p.device == device and p.is_contiguous() for p in parameters)
        and all(t.dtype is dtype and t.device == device for spectrum in spectra for t in spectrum)
        and not any(sigma.dim() for sigma, _, _ in spectra)
    )


def _check(z: Tensor, parameters: Sequence[Tensor], spectra: Sequence[Spectrum]) -> None:
    *layers, w, bias, e = parameters
    width = z.shape[-1]
    for weight, b, spectrum in zip([*layers[::2], w], [*layers[1::2], bias], spectra, strict=False):
        schema.matrix("weight", weight, *spectrum, z, "z")
        schema.bias(b, weight)
        if weight.shape[1] != width:
            raise InputError(f"weight has shape {list(weight.shape)}; it must be [rows, {width}], as its input is wide")
        width = weight.shape[0]
    schema.matrix("e", e, *spectra[-1], z, "z")
    if width != 1 or e.shape[1] != w.shape[1]:
        shapes = f"{list(w.shape)} and {list(e.shape)}"
        raise InputError(f"w and e have shapes {shapes}; they must be [1, width] and [classes, width]")


@unaffected
def _forward(
    z: Tensor, y: Tensor | None, parameters: Sequence[Tensor], spectra: Sequence[Spectrum], slope: float
) -> tuple[Tensor, list[Tensor]]:
    """Scores, and the input of every layer and of the head."""
    *layers, w, bias, e = parameters
    hidden = [z]
    for i, (sigma, _, _) in enumerate(spectra[:-2]):
        hidden.append(native.spectral_linear(hidden[-1], layers[2 * i], layers[2 * i + 1], sigma, slope))
    score = native.projection_logits(hidden[-1], w, bias, spectra[-2][0], y, e, spectra[-1][0])
    return score, hidden


class _Network(Function):
    @staticmethod
    def forward(
        ctx: Context, y: Tensor | None, spectra: Sequence[Spectrum], slope: float, z: Tensor, *parameters: Tensor
    ) -> Tensor:
        score, hidden = _forward(z, y, parameters, spectra, slope)
        ctx.save_for_backward(y, *parameters, *hidden)
        ctx.shapes = [t.shape for t in (*parameters, *hidden)]
        ctx.spectra, ctx.slope = spectra, slope  # tensors of no graph, and of this forward alone
        return score

    @staticmethod
    @unaffected
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *saved = ctx.saved_tensors
        count = 2 * len(ctx.spectra) - 1
        parameters, hidden = saved[:count], saved[count:]
        if torch.is_grad_enabled() or not ordinary(grad):
            return None, None, None, *_again(ctx, grad, y, hidden[0], parameters)
        if not _as_saved(ctx, saved, grad):
            raise InputError(
                "a tensor that was saved for this backward came back with another shape, dtype, device or layout; a "
                "hook on saved tensors must return what it was given"
            )
        edge_of_z, *edges = ctx.next_functions[-1 - len(parameters) :]
        to_z, of_parameters = _asked_for(edge_of_z), any(map(_asked_for, edges))
        dz, found = _backward(ctx, grad, y, parameters, hidden, (to_z, of_parameters))
        if not of_parameters:
            found = [None] * len(parameters)
        return None, None, None, dz if to_z else None, *found


def _as_saved(ctx: Context, saved: Sequence[Tensor], grad: Tensor) -> bool:
    return [t.shape for t in saved] == ctx.shapes and all(
        t.dtype is grad.dtype and t.device == grad.device and (t.is_contiguous() or t.dim() > 1) for t in saved
    )


def _backward(
    ctx: Context, grad: Tensor, y: Tensor | None, parameters: Sequence[Tensor], hidden: Sequence[Tensor], wanted: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of z and of the parameters, as far as they are wanted."""
    *layers, w, _, e = parameters
    to_z, of_parameters = wanted
    dh, *rest = native.projection_logits_backward(grad, hidden[-1], w, ctx.spectra[-2], y, e, ctx.spectra[-1])
    found: list[Tensor | None] = list(rest)
    for i in reversed(range(len(ctx.spectra) - 2)):
        weight, bias, (sigma, u, v) = layers[2 * i], layers[2 * i + 1], ctx.spectra[i]
        wanted = [i > 0 or to_z, of_parameters, of_parameters]
        gradients = native.spectral_linear_backward(  # over a gradient that is ours alone
            dh, hidden[i], weight, bias, hidden[i + 1], sigma, u, v, ctx.slope, wanted, over=True
        )
        if wanted[0]:
            dh, *gradients = gradients
        found[:0] = gradients
    return dh, found


def _asked_for(edge: tuple[Any, int]) -> bool:
    """Whether the running backward pass needs the gradient that leaves by this edge."""
    node = edge[0]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


def _again(
    ctx: Context, grad: Tensor, y: Tensor | None, z: Tensor, parameters: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, from the reference formulas."""

    def formula(z: Tensor, *parameters: Tensor) -> Tensor:
        *layers, w, bias, e = parameters
        sigmas = [
            reference.along(sigma, weight, u, v)
            for (sigma, u, v), weight in zip(ctx.spectra, [*layers[::2], w, e], strict=True)
        ]
        h = z
        for sigma, weight, b in zip(sigmas, layers[::2], layers[1::2], strict=False):
            h = reference.spectral_linear(h, weight, b, sigma, ctx.slope)
        return reference.projection_logits(h, w, bias, sigmas[-2], y, e if y is not None else None, sigmas[-1])

    return derive(formula, grad, [z, *parameters])
