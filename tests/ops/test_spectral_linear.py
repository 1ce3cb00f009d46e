"""spectral_linear: value and gradients against the formula with W/σ written out, and against torch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import Spectrum, backend, native

USABLE_ISAS = [native._ISAS.index(isa) for isa in native.build_info().get("cpu_isas", [])[: native._isa + 1]]
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 9), (8, 9, 1), (33, 31, 65), (128, 64, 512), (300, 100, 130), (1025, 17, 40)]


def layer(samples, columns, rows, dtype=torch.float32, device="cpu", bias=True, seed=0):
    """Input, weight, bias, spectrum of a layer, and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight, grad = draw(samples, columns), draw(rows, columns), draw(samples, rows)
    u, v = F.normalize(draw(rows), dim=0), F.normalize(draw(columns), dim=0)
    (spectrum,) = ops.spectral_norm([weight], [u], [v], n_iter=3)
    return x, weight, draw(rows) if bias else None, spectrum, grad


def formula(x, weight, bias, spectrum, slope):
    """W/σ formed and used, σ = uᵀWv with u and v constant."""
    sigma = spectrum.u @ weight @ spectrum.v
    out = F.linear(x, weight / sigma, bias)
    return torch.where(out > 0, out, slope * out)


def near_the_kink(x, weight, bias, spectrum):
    """Outputs before the slope that are 0 but for rounding, whose sign float32 and float64 need not share: bool."""
    out = formula(*(None if t is None else t.double() for t in (x, weight, bias)), doubled(spectrum), 1.0)
    return out.abs() < 1e-5 * out.abs().max()


def doubled(spectrum, device=None):
    return Spectrum(*(t.double().to(device) for t in spectrum))


def values_and_gradients(op, x, weight, bias, spectrum, grad, slope):
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = op(*inputs, *([None] if bias is None else []), spectrum, slope)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def ours(x, weight, bias, spectrum, slope):
    return ops.spectral_linear(x, weight, bias, spectrum, negative_slope=slope)


def assert_equals_formula(case, slope, tolerance):
    x, weight, bias, spectrum, grad = case
    if slope != 1:
        grad = grad.masked_fill(near_the_kink(x, weight, bias, spectrum), 0)
    got = values_and_gradients(ours, x, weight, bias, spectrum, grad, slope)
    exact = [None if t is None else t.double().cpu() for t in (x, weight, bias)]
    want = values_and_gradients(formula, *exact, doubled(spectrum, "cpu"), grad.double().cpu(), slope)
    scales = [b.abs().max().item() for b in want]
    scales[2] += (grad.abs().T @ x.abs()).max().item() / spectrum.sigma.item()  # terms that may cancel
    for a, b, scale in zip(got, want, scales, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance * scale)


# --- The values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_formula(device, shape, bias, slope):
    assert_equals_formula(layer(*shape, bias=bias, device=device), slope, 1e-5)


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_equals_its_formula_in_float64(bias, slope):
    assert_equals_formula(layer(33, 31, 65, torch.float64, bias=bias), slope, 1e-12)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.booleans(), st.sampled_from([0.01, 0.2, 1.0]))
def test_any_shape(samples, columns, rows, bias, slope):
    assert_equals_formula(layer(samples, columns, rows, bias=bias, seed=samples), slope, 2e-5)


def test_an_output_that_rounding_puts_on_either_side_of_zero():
    assert_equals_formula(layer(144, 20, 170, bias=False, seed=144), 0.01, 2e-5)  # has one, with AVX2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_equals_torchs_layer(dtype, tolerance):
    x, weight, bias, _, grad = layer(32, 40, 50, dtype)
    linear = parametrizations.spectral_norm(nn.Linear(40, 50).to(dtype))
    norm = linear.parametrizations.weight[0]
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(weight)
        linear.bias.copy_(bias)
    (spectrum,) = ops.spectral_norm([weight], [norm._u.clone()], [norm._v.clone()])
    theirs = x.clone().requires_grad_()
    out = F.leaky_relu(linear(theirs), 0.2)
    out.backward(grad)
    want = (out.detach(), theirs.grad, linear.parametrizations.weight.original.grad, linear.bias.grad)
    got = values_and_gradients(ours, x, weight, bias, spectrum, grad, 0.2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("which", ["auto", "reference"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e30])
def test_hard_weights_stay_finite(device, which, scale):
    x, weight, bias, _, grad = layer(9, 20, 30, device=device)
    u, v = F.normalize(torch.ones(30, device=device), dim=0), F.normalize(torch.ones(20, device=device), dim=0)
    with backend.use(which):
        (spectrum,) = ops.spectral_norm([scale * weight], [u], [v])
        found = values_and_gradients(ours, x, scale * weight, bias, spectrum, grad, 0.2)
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_of_input_and_gradient(device, layout):
    x, weight, bias, spectrum, grad = layer(12, 20, 30, device=device)
    if layout == "transposed":
        x, grad = x.T.contiguous().T, grad.T.contiguous().T
    elif layout == "strided":
        x, grad = torch.cat([x, x], 1)[:, :20], torch.cat([grad, grad], 1)[:, ::2]
    else:
        x, grad = x[:1].expand(12, -1), grad[:1, :1].expand(12, 30)
    assert_equals_formula((x, weight, bias, spectrum, grad), 0.2, 1e-5)


# --- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, slope):
    x, weight, b, spectrum, _ = layer(4, 5, 6, torch.float64, bias=bias)
    inputs = [t.requires_grad_() for t in (x, weight, b) if t is not None]

    def call(x, weight, bias=None):
        sigma = ops.spectral_norm([weight.detach()], [spectrum.u], [spectrum.v], n_iter=0)[0].sigma
        return ours(x, weight, bias, Spectrum(sigma, spectrum.u, spectrum.v), slope)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_double_backward_in_float32_equals_float64s():
    """The gradient penalty's shape: the squared norm of dx, differentiated in the weight."""
    x, weight, bias, spectrum, _ = layer(16, 20, 30)

    def penalty(dtype, op):
        inputs = [t.to(dtype).clone().requires_grad_() for t in (x, weight, bias)]
        exact = Spectrum(*(t.to(dtype) for t in spectrum))
        (slope,) = torch.autograd.grad(op(*inputs, exact, 0.2).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), inputs)

    for got, want in zip(penalty(torch.float32, ours), penalty(torch.float64, formula), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_an_input_made_from_the_weight_counts_once():
    """Each gradient is the partial one, in the differentiable backward too."""
    _, weight, bias, spectrum, _ = layer(4, 6, 6, torch.float64)
    weight.requires_grad_()

    def gradient(create_graph):
        out = ours(weight.sin(), weight, bias, spectrum, 0.2)
        return torch.autograd.grad(out.square().sum(), weight, create_graph=create_graph)[0].detach()

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_needs_a_gradient_gets_one(needed):
    case = layer(8, 20, 30)
    want = values_and_gradients(ours, *case, 0.2)[1:]
    x, weight, bias, spectrum, grad = case
    inputs = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
    ours(*inputs, spectrum, 0.2).backward(grad)
    for tensor, need, gradient in zip(inputs, needed, want, strict=True):
        assert (tensor.grad is not None) == need
        assert not need or torch.equal(tensor.grad, gradient)


def test_two_forwards_then_two_backwards():
    """The second forward's iteration leaves what the first one saved alone."""
    x, weight, bias, _, grad = layer(8, 20, 30, torch.float64)
    weight.requires_grad_()
    u, v = F.normalize(torch.ones(30).double(), dim=0), F.normalize(torch.ones(20).double(), dim=0)
    (first,) = ops.spectral_norm([weight.detach()], [u], [v])
    (second,) = ops.spectral_norm([weight.detach()], [first.u], [first.v])
    outs = [ours(x, weight, bias, spectrum, 0.2) for spectrum in (first, second)]
    for out, spectrum in zip(outs, (first, second), strict=True):
        (got,) = torch.autograd.grad(out, weight, grad)
        (want,) = torch.autograd.grad(formula(x, weight, bias, spectrum, 0.2), weight, grad)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- As torch sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(device, dtype, bias, requires_grad):
    x, weight, b, spectrum, grad = layer(4, 5, 6, dtype, device, bias)
    for tensor in (x, weight, b):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.afd.spectral_linear.default, (x, weight, b, *spectrum, 0.2))
    out = ours(x, weight, b, spectrum, 0.2).detach()
    saved = [None if t is None else t.detach() for t in (x, weight, b)]
    for wanted in ([True, True, True], [False, True, False]):
        arguments = (grad, *saved, out, *spectrum, 0.2, wanted)
        torch.library.opcheck(torch.ops.afd.spectral_linear_backward.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same(device, compiler):
    torch.compiler.reset()
    case = layer(8, 20, 30, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    got, want = values_and_gradients(compiled, *case, 0.2), values_and_gradients(ours, *case, 0.2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_threads_or_instruction_set(monkeypatch):
    """As far as the op's own passes go: torch's products are kept to one thread."""
    case = layer(300, 100, 130)
    _, weight, _, spectrum, grad = case
    out = ours(*case[:4], 0.2)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for isa in USABLE_ISAS:
            monkeypatch.setattr(native, "_isa", isa)
            results.append(values_and_gradients(ours, *case, 0.2))
    assert out.shape == grad.shape
    assert weight.shape == (130, 100)
    assert spectrum.u.shape == (130,)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_in_a_graph_on_a_side_stream(cuda):
    x, weight, bias, spectrum, grad = layer(33, 31, 65, device=cuda)
    want = values_and_gradients(ours, x, weight, bias, spectrum, grad, 0.2)
    out = want[0]
    graph = torch.cuda.CUDAGraph()
    arguments = (grad, x, weight, bias, out, *spectrum, 0.2, [True] * 3)
    torch.ops.afd.spectral_linear_backward.default(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = torch.ops.afd.spectral_linear_backward.default(*arguments)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, want[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- Bad input ------------------------------------------------------------------------------------------------------


def bad(**changes):
    x, weight, bias, spectrum, _ = layer(4, 5, 6)
    arguments = {"x": x, "weight": weight, "bias": bias, "spectrum": spectrum, "negative_slope": 0.2}
    for name in ("sigma", "u", "v"):
        if name in changes:
            arguments["spectrum"] = arguments["spectrum"]._replace(**{name: changes.pop(name)})
    return ops.spectral_linear(**{**arguments, **changes})


BAD = {
    r"x has shape \[4, 6\]; it must be \[N, 5\]": {"x": torch.ones(4, 6)},
    r"x has shape \[5\]; it must be \[N, 5\]": {"x": torch.ones(5)},
    "x is an empty batch": {"x": torch.ones(0, 5)},
    r"weight has shape \[6, 5, 1\]; it must be a matrix": {"weight": torch.ones(6, 5, 1)},
    r"weight has stride \(1, 6\); it must be contiguous": {"weight": torch.ones(5, 6).T},
    r"bias has shape \[5\]; it must be \[6\]": {"bias": torch.ones(5)},
    r"sigma of weight has shape \[1\]; it must be a scalar": {"sigma": torch.ones(1)},
    r"u of weight has shape \[5\]; it must be \[6\]": {"u": torch.ones(5)},
    r"v of weight has shape \[6\]; it must be \[5\]": {"v": torch.ones(6)},
    "negative_slope is 0.0; it must be in": {"negative_slope": 0.0},
    "negative_slope is 1.5": {"negative_slope": 1.5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(InputError, match=message):
        bad(**BAD[message])


def test_wrong_dtypes_are_named():
    with pytest.raises(InputTypeError, match=r"weight is torch\.float32; it must have x's dtype, torch\.float64"):
        bad(x=torch.ones(4, 5).double())
    with pytest.raises(InputTypeError, match=r"bias is torch\.float64; it must have the weight's dtype"):
        bad(bias=torch.ones(6).double())
