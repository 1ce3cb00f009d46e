"""spectral_norm: against both of torch's spectral norms, against the SVD, and on matrices that break a division."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import backend, native

USABLE_ISAS = [native._ISAS.index(isa) for isa in native.build_info().get("cpu_isas", [])[: native._isa + 1]]
GROUP = ((512, 512), (512, 512), (1, 512), (100, 512))  # the paper's discriminator
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (33, 31), (64, 64), (100, 512), (129, 257), (4096, 3), (3, 4096)]


def group(shapes, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def unit(length):
        return F.normalize(torch.randn(length, generator=generator, dtype=torch.float64), dim=0).to(device, dtype)

    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    return weights, [unit(w.shape[0]) for w in weights], [unit(w[0].numel()) for w in weights]


def doubled(tensors):
    return [tensor.double().cpu() for tensor in tensors]


def formula(weight, u, v, n_iter, first):
    """The power iteration, written out once more."""
    matrix = weight.reshape(weight.shape[0], -1)
    for _ in range(n_iter):
        if first == "u":
            u = matrix @ v / (matrix @ v).norm()
            v = matrix.T @ u / (matrix.T @ u).norm()
        else:
            v = matrix.T @ u / (matrix.T @ u).norm()
            u = matrix @ v / (matrix @ v).norm()
    return u @ matrix @ v, u, v


def assert_follows_formula(spectra, weights, us, vs, n_iter, first, tolerance):
    for found, weight, u, v in zip(spectra, *map(doubled, (weights, us, vs)), strict=True):
        for got, want in zip(found, formula(weight, u, v, n_iter, first), strict=True):
            torch.testing.assert_close(
                got.double().cpu(), want, rtol=tolerance, atol=tolerance * want.abs().max().item()
            )


# --- The values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["u", "v"])
@pytest.mark.parametrize("n_iter", [0, 1, 2, 5])
def test_equals_its_formula(device, n_iter, first):
    weights, us, vs = group(SHAPES, device)
    spectra = ops.spectral_norm(weights, us, vs, n_iter=n_iter, first=first)
    assert_follows_formula(spectra, weights, us, vs, n_iter, first, 1e-5)


@pytest.mark.parametrize("first", ["u", "v"])
def test_reference_equals_its_formula_in_float64(first):
    weights, us, vs = group(SHAPES, dtype=torch.float64)
    spectra = ops.spectral_norm(weights, us, vs, n_iter=3, first=first)
    assert_follows_formula(spectra, weights, us, vs, 3, first, 1e-12)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.sampled_from("uv"), st.integers(0, 2**31))
def test_any_shape(rows, columns, n_iter, first, seed):
    weights, us, vs = group([(rows, columns)], seed=seed)
    spectra = ops.spectral_norm(weights, us, vs, n_iter=n_iter, first=first)
    if n_iter and min(abs((w @ v).norm()) for w, v in zip(weights, vs, strict=True)) < 1e-2:
        return  # v is nearly orthogonal to the rows: its successor is mostly rounding
    assert_follows_formula(spectra, weights, us, vs, n_iter, first, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["auto", "reference"])
def test_converges_to_the_largest_singular_value(which, dtype):
    weights, us, vs = group((*GROUP, (33, 31)), dtype=dtype)
    for weight in weights:  # a gap below the largest value, or 200 iterations would not do for random matrices
        weight += torch.outer(weight[:, 0], weight[0]) / 4
    with backend.use(which):
        spectra = ops.spectral_norm(weights, us, vs, n_iter=200)
    for found, weight in zip(spectra, weights, strict=True):
        assert found.sigma.item() == pytest.approx(torch.linalg.svdvals(weight.double())[0].item(), rel=1e-5)


def torchs(kind, weight, u, v):
    """A linear layer under one of torch's spectral norms, with our weight, u and v."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    if kind == "parametrized":
        parametrizations.spectral_norm(layer)
        norm = layer.parametrizations.weight[0]
        original, vectors = layer.parametrizations.weight.original, (norm._u, norm._v)
    else:
        hooked_spectral_norm(layer)
        original, vectors = layer.weight_orig, (layer.weight_u, layer.weight_v)
    with torch.no_grad():
        for target, value in zip((original, *vectors), (weight, u, v), strict=True):
            target.copy_(value)
    return layer, original, vectors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("kind", "first"), [("parametrized", "u"), ("hooked", "v")])
def test_equals_torchs(kind, first, dtype, tolerance):
    """σ, u, v, and the gradient through W/σ of a training forward, then the same without an iteration."""
    (weight,), (u,), (v,) = group([(20, 30)], dtype=dtype)
    layer, original, vectors = torchs(kind, weight, u, v)
    x = torch.randn(8, 30, dtype=dtype)
    for mode in (True, False):
        want = layer.train(mode)(x)
        (want_gradient,) = torch.autograd.grad(want.square().sum(), original)
        ours = weight.clone().requires_grad_()
        (found,) = ops.spectral_norm([ours], [u], [v], n_iter=int(mode), first=first)
        u, v = found.u, found.v
        got = x @ (ours / found.sigma).T
        (gradient,) = torch.autograd.grad(got.square().sum(), ours)
        for a, b in zip((got, gradient, u, v), (want, want_gradient, *vectors), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_filters_stand_for_their_flattened_matrix(device):
    conv = torch.nn.Conv2d(3, 8, 5, bias=False).to(device)
    parametrizations.spectral_norm(conv)
    norm, x = conv.parametrizations.weight[0], torch.randn(2, 3, 9, 9, device=device)
    weight = conv.parametrizations.weight.original.detach().clone().requires_grad_()
    (found,) = ops.spectral_norm([weight], [norm._u.clone()], [norm._v.clone()])
    got, want = F.conv2d(x, weight / found.sigma), conv(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), weight)
    (want_gradient,) = torch.autograd.grad(want.square().sum(), conv.parametrizations.weight.original)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-3)


# --- Matrices that break a division ---------------------------------------------------------------------------------


def hard_cases():
    generator = torch.Generator().manual_seed(1)
    full = torch.randn(40, 70, generator=generator)
    return {
        "zero": torch.zeros(40, 70),
        "rank one": torch.outer(full[:, 0], full[0]),
        "one row": full[:1].clone(),
        "one column": full[:, :1].clone(),
        "huge": full * 1e30,
        "tiny": full * 1e-30,
        "smallest": full.sign() * 1e-44,
        "one element": full[:1, :1].clone(),
        "one huge element": torch.zeros(40, 70).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e37)),
    }


@pytest.mark.parametrize("first", ["u", "v"])
@pytest.mark.parametrize("n_iter", [0, 1, 30])
@pytest.mark.parametrize("which", ["auto", "reference"])
@pytest.mark.parametrize("case", hard_cases())
def test_hard_matrices_stay_finite(device, case, which, n_iter, first):
    weight = hard_cases()[case].to(device)
    u, v = (F.normalize(torch.ones(length, device=device), dim=0) for length in weight.shape)
    with backend.use(which):
        (found,) = ops.spectral_norm([weight], [u], [v], n_iter=n_iter, first=first)
    assert all(torch.isfinite(t).all() for t in (*found, weight / found.sigma))
    for vector in (found.u, found.v):
        assert vector.norm().item() == pytest.approx(1, rel=1e-5)
    assert found.sigma.abs() >= torch.tensor(1e-12)
    if n_iter == 30 and case not in ("zero", "tiny", "smallest"):
        assert found.sigma.item() == pytest.approx(torch.linalg.svdvals(weight.double())[0].item(), rel=0.05)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_the_scale_of_a_matrix_changes_its_sigma_only(scale):
    weights, us, vs = group([(33, 31)])
    (want,) = ops.spectral_norm(weights, us, vs, n_iter=2, eps=1e-29)
    (found,) = ops.spectral_norm([weights[0] * scale], us, vs, n_iter=2, eps=1e-29)
    torch.testing.assert_close(found.sigma / scale, want.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.u, want.u, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.v, want.v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_vectors_without_a_successor_stay(device, which):
    """V is orthogonal to every row: u stays, and v follows from it."""
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]], device=device)
    u, v = torch.tensor([1.0, 0.0], device=device), torch.tensor([0.0, 1.0], device=device)
    with backend.use(which):
        (found,) = ops.spectral_norm([weight], [u], [v])
    assert found.u.tolist() == [1, 0]
    assert found.v.tolist() == [1, 0]
    assert found.sigma.item() == pytest.approx(3)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("which", ["auto", "reference"])
def test_sigma_is_at_least_eps(which, eps):
    weight = 0.5 * torch.eye(3)
    u = v = F.normalize(torch.ones(3), dim=0)
    with backend.use(which):
        (found,) = ops.spectral_norm([weight], [u], [v], eps=eps)
    assert found.sigma.item() == pytest.approx(max(0.5, eps))


# --- Tensors and gradients ------------------------------------------------------------------------------------------


def test_inputs_are_left_as_they_are_and_results_are_new(device):
    for n_iter in (0, 1):
        inputs = group([(5, 6), (7, 8)], device)
        before = [[tensor.clone() for tensor in tensors] for tensors in inputs]
        spectra = ops.spectral_norm(*inputs, n_iter=n_iter)
        assert all(
            torch.equal(a, b) for old, new in zip(before, inputs, strict=True) for a, b in zip(old, new, strict=True)
        )
        memory = {tensor.data_ptr() for tensors in inputs for tensor in tensors}
        assert memory.isdisjoint(found.u.data_ptr() for found in spectra)
        assert memory.isdisjoint(found.v.data_ptr() for found in spectra)


def test_gradients_of_sigma_alone():
    weights, us, vs = group([(4, 5), (3, 2, 2)], dtype=torch.float64)
    for weight in weights:
        weight.requires_grad_()

    def products(*weights: Tensor) -> Tensor:
        """u and v follow the weights in one iteration, but count as constants: hence n_iter=0."""
        first, second = ops.spectral_norm(weights, us, vs, n_iter=0)
        return first.sigma * second.sigma.square()

    assert torch.autograd.gradcheck(products, weights)
    assert torch.autograd.gradgradcheck(products, weights)


def test_only_the_weights_that_need_it_get_a_gradient():
    weights, us, vs = group([(4, 5), (3, 2)])
    weights[1].requires_grad_()
    spectra = ops.spectral_norm(weights, us, vs)
    assert not spectra[0].u.requires_grad
    assert not spectra[1].v.requires_grad
    (spectra[0].sigma + 2 * spectra[1].sigma).backward()
    assert weights[0].grad is None
    torch.testing.assert_close(weights[1].grad, 2 * torch.outer(spectra[1].u, spectra[1].v))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(device, dtype, requires_grad):
    weights, us, vs = group([(4, 5), (3, 2, 2)], device, dtype)
    for weight in weights:
        weight.requires_grad_(requires_grad)
    arguments = (weights, us, vs, 1, 1e-12, "u", ["a", "b"])
    torch.library.opcheck(torch.ops.afd.spectral_norm.default, arguments)


# --- Determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["u", "v"])
def test_bits_do_not_depend_on_threads_or_instruction_set(monkeypatch, first):
    weights, us, vs = group([*GROUP, (33, 31), (700, 1100)])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for isa in USABLE_ISAS:
                monkeypatch.setattr(native, "_isa", isa)
                results.append(ops.spectral_norm(weights, us, vs, n_iter=2, first=first))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
def test_same_bits_every_time_in_a_graph_on_a_side_stream(cuda):
    weights, us, vs = group(GROUP, cuda)
    want = ops.spectral_norm(weights, us, vs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.spectral_norm(weights, us, vs)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for a, b in zip(found, want, strict=True) for x, y in zip(a, b, strict=True))
    on_cpu = ops.spectral_norm(*([t.cpu() for t in tensors] for tensors in (weights, us, vs)))
    for a, b in zip(want, on_cpu, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-6)


# --- Bad input ------------------------------------------------------------------------------------------------------


def changed(**changes):
    weights, us, vs = group([(4, 5), (3, 6)])
    arguments = {"weights": weights, "us": us, "vs": vs, "n_iter": 1, **changes}
    return ops.spectral_norm(**arguments)


BAD = {
    "n_iter is -1; it must be at least 0": {"n_iter": -1},
    "eps is 0.0; it must be": {"eps": 0.0},
    "eps is nan": {"eps": float("nan")},
    "first is 'w'; allowed are u, v": {"first": "w"},
    "2 weights, 1 us": {"us": [torch.ones(4)]},
    r"u of weights\[1\] has shape \[4\]; it must be \[3\]": {"us": [torch.ones(4), torch.ones(4)]},
    r"v of weights\[0\] has shape \[1, 5\]; it must be \[5\]": {"vs": [torch.ones(1, 5), torch.ones(6)]},
    r"weights\[1\] has stride \(1, 3\); it must be contiguous": {"weights": [torch.ones(4, 5), torch.ones(6, 3).T]},
    r"weights\[0\] has shape \[5\]; it must be \[rows, \.\.\.\]": {"weights": [torch.ones(5), torch.ones(3, 6)]},
    r"weights\[1\] has shape \[3, 0\]": {
        "weights": [torch.ones(4, 5), torch.ones(3, 0)],
        "vs": [torch.ones(5), torch.ones(0)],
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(InputError, match=message):
        changed(**BAD[message])


def test_mixed_dtypes_and_wrong_dtypes_are_named():
    weights, us, vs = group([(4, 5), (3, 6)])
    with pytest.raises(InputTypeError, match=r"l2 is torch.float64; it must have l1's dtype, torch.float32"):
        ops.spectral_norm(
            [weights[0], weights[1].double()], [us[0], us[1].double()], [vs[0], vs[1].double()], names=["l1", "l2"]
        )
    with pytest.raises(InputTypeError, match=r"u of weights\[1\] is torch.float64"):
        ops.spectral_norm(weights, [us[0], us[1].double()], vs)
    with pytest.raises(
        InputTypeError, match=r"weights\[0\] is torch.bfloat16; allowed are torch.float32 and torch.float64"
    ):
        ops.spectral_norm(*([t.bfloat16() for t in tensors] for tensors in (weights, us, vs)))


def test_mixed_devices_are_named():
    """The meta device stands in for a second one."""
    weights, us, vs = group([(4, 5), (3, 6)])
    with pytest.raises(InputError, match=r"weights\[1\] is on meta; it must be on weights\[0\]'s device, cpu"):
        ops.spectral.schema.group(
            ["weights[0]", "weights[1]"], [weights[0], weights[1].to("meta")], [us[0], us[1].to("meta")],
            [vs[0], vs[1].to("meta")], 1, 1e-12, "u",
        )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_weight_that_is_not_finite_is_named(dtype, value):
    weights, us, vs = group([(4, 5), (3, 6)], dtype=dtype)
    weights[1][2, 3] = value
    with pytest.raises(InputError, match=r"the spectral norm of critic\.1 is"):
        ops.spectral_norm(weights, us, vs, names=["critic.0", "critic.1"])
