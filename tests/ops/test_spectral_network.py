"""The discriminator as one node of autograd: the bits of the three ops, and no more products than asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import Spectrum
from afd.ops.spectral.network import projection_network

SLOPE = 0.2


def network(widths=(20, 30, 25), classes=4, samples=9, dtype=torch.float32, device="cpu"):
    """z, y, parameters and spectra."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shapes = [*zip(widths[1:], widths[:-1], strict=True), (1, widths[-1]), (classes, widths[-1])]
    weights = [draw(*shape) for shape in shapes]
    us, vs = ([torch.nn.functional.normalize(draw(s[side]), dim=0) for s in shapes] for side in (0, 1))
    spectra = ops.spectral_norm(weights, us, vs, n_iter=2)
    parameters = [p for weight in weights[:-1] for p in (weight, draw(weight.shape[0]))] + [weights[-1]]
    y = torch.randint(classes, (samples,), generator=generator).to(device)
    return draw(samples, widths[0]), y, parameters, spectra


def op_by_op(z, y, parameters, spectra):
    *layers, w, bias, e = parameters
    h = z
    for i, spectrum in enumerate(spectra[:-2]):
        h = ops.spectral_linear(h, layers[2 * i], layers[2 * i + 1], spectrum, negative_slope=SLOPE)
    return ops.projection_logits(h, w, bias, spectra[-2], y, e, spectra[-1])


def at_once(z, y, parameters, spectra):
    return projection_network(z, y, parameters, spectra, negative_slope=SLOPE)


def values_and_gradients(op, z, y, parameters, spectra):
    z, *parameters = (t.detach().clone().requires_grad_() for t in (z, *parameters))
    score = op(z, y, parameters, spectra)
    wanted = [z, *(parameters if y is not None else parameters[:-1])]
    return score.detach(), *torch.autograd.grad(score, wanted, torch.linspace(-1, 1, len(score)).to(score))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in (torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("widths", [(20, 30, 25), (7, 7), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_ops_bit_for_bit(device, dtype, widths, labelled):
    z, y, parameters, spectra = network(widths, dtype=dtype, device=device)
    case = (z, y if labelled else None, parameters, spectra)
    got, want = values_and_gradients(at_once, *case), values_and_gradients(op_by_op, *case)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_without_gradients_it_is_the_same():
    case = network()
    with torch.no_grad():
        assert torch.equal(at_once(*case), op_by_op(*case))


@pytest.mark.parametrize("labelled", [True, False])
def test_double_backward_in_float32_equals_that_of_float64(labelled):
    def penalty(dtype, op):
        z, y, parameters, spectra = network(dtype=torch.float64)
        z, *parameters = (t.to(dtype).requires_grad_() for t in (z, *parameters))
        exact = [Spectrum(*(t.to(dtype) for t in spectrum)) for spectrum in spectra]
        score = op(z, y if labelled else None, parameters, exact)
        (slope,) = torch.autograd.grad(score.square().sum(), z, create_graph=True)
        inputs = [z, *(parameters if labelled else parameters[:-1])]
        return torch.autograd.grad(slope.square().sum(), inputs)

    for got, want in zip(penalty(torch.float32, at_once), penalty(torch.float64, op_by_op), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize(
    ("ask", "products"),
    [
        (lambda score, z, _: torch.autograd.grad(score, z, retain_graph=True), 2),
        (lambda score, _, p: torch.autograd.grad(score, p, retain_graph=True), 3),
        (lambda score, _, p: torch.autograd.backward(score, inputs=p, retain_graph=True), 3),
        (lambda score, *_: score.backward(retain_graph=True), 4),
    ],
    ids=["input", "parameters", "backward to parameters", "all"],
)
def test_a_backward_does_no_product_that_it_was_not_asked_for(ask, products):
    """Of z that is no leaf, as features are."""
    z, y, parameters, spectra = network()
    leaf = z.requires_grad_()
    z, parameters = leaf * 1.0, [p.requires_grad_() for p in parameters]
    score = at_once(z, y, parameters, spectra).sum()
    want = values_and_gradients(op_by_op, z, y, parameters, spectra)[1:]
    with Products() as mode:
        ask(score, z, parameters)
    assert mode.count == products
    full = torch.autograd.grad(score, [z, *parameters], retain_graph=True)
    for got, expected in zip(full, values_at_ones(z, y, parameters, spectra), strict=True):
        assert torch.equal(got, expected)
    assert len(want) == len(full)


def values_at_ones(z, y, parameters, spectra):
    z, *parameters = (t.detach().clone().requires_grad_() for t in (z, *parameters))
    return torch.autograd.grad(op_by_op(z, y, parameters, spectra).sum(), [z, *parameters])


def test_the_gradient_it_is_given_stays_as_it_is():
    """Its backward overwrites gradients of its own only."""
    z, y, parameters, spectra = network()
    z.requires_grad_()
    score = at_once(z, y, parameters, spectra)
    grad = torch.ones_like(score)
    first = torch.autograd.grad(score, z, grad, retain_graph=True)[0].clone()
    assert torch.equal(grad, torch.ones_like(score))
    assert torch.equal(torch.autograd.grad(score, z, grad)[0], first)


def test_bad_input_is_named():
    z, y, parameters, spectra = network()
    cases = [
        (r"z has shape \[9, 19\]", (z[:, :19], y, parameters, spectra)),
        ("z is an empty batch", (z[:0], y[:0], parameters, spectra)),
        (r"y holds 9; labels", (z, y + 9 - y, parameters, spectra)),
        (r"weight has stride", (z, y, [torch.ones(20, 30).T, *parameters[1:]], spectra)),
        (r"weight has shape \[25, 30\]; it must be \[rows, 31\]", (z, y, *wider(parameters, spectra))),
        (r"w and e have shapes \[1, 25\] and \[4, 24\]", (z, y, *narrower(parameters, spectra))),
        (r"u of weight has shape \[3\]", (z, y, parameters, [spectra[0]._replace(u=torch.ones(3)), *spectra[1:]])),
        (r"bias has shape \[2\]", (z, y, [parameters[0], torch.ones(2), *parameters[2:]], spectra)),
    ]
    for message, case in cases:
        with pytest.raises(InputError, match=message):
            at_once(*case)
    with pytest.raises(InputTypeError, match=r"z is torch\.float32; it must have the weights' dtype"):
        at_once(z, y, [parameters[0].double(), *parameters[1:]], spectra)


def wider(parameters, spectra):
    """The first layer with one row more than the second one takes."""
    spectrum = Spectrum(spectra[0].sigma, torch.ones(31), spectra[0].v)
    return [torch.ones(31, 20), torch.ones(31), *parameters[2:]], [spectrum, *spectra[1:]]


def narrower(parameters, spectra):
    """An embedding of one column less than w has."""
    return [*parameters[:-1], torch.ones(4, 24)], [*spectra[:-1], spectra[-1]._replace(v=torch.ones(24))]
