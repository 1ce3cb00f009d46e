"""projection_logits: value and gradients against the formula with both normalised matrices written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import Spectrum, backend, native

USABLE_ISAS = [native._ISAS.index(isa) for isa in native.build_info().get("cpu_isas", [])[: native._isa + 1]]
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 9), (33, 31, 65), (128, 512, 10), (300, 100, 130), (1025, 65, 2)]


def head(samples, width, classes, dtype=torch.float32, device="cpu", seed=0):
    """h, w, bias, its spectrum, labels, e, its spectrum, and a gradient of the scores."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    h, w, e = draw(samples, width), draw(1, width), draw(classes, width)
    vectors = [F.normalize(draw(length), dim=0) for length in (1, classes, width, width)]
    of_w, of_e = ops.spectral_norm([w, e], vectors[:2], vectors[2:], n_iter=3)
    y = torch.randint(classes, (samples,), generator=generator).to(device)
    return h, w, draw(1), of_w, y, e, of_e, draw(samples)


def formula(h, w, bias, of_w, y, e, of_e):
    sigma_w, sigma_e = of_w.u @ w @ of_w.v, of_e.u @ e @ of_e.v
    score = h @ (w / sigma_w)[0] + (0 if bias is None else bias)
    return score if y is None else score + (h * (e / sigma_e)[y]).sum(1)


def values_and_gradients(op, h, w, bias, of_w, y, e, of_e, grad):
    h, w, bias, e = (None if t is None else t.detach().clone().requires_grad_() for t in (h, w, bias, e))
    score = op(h, w, bias, of_w, y, e, of_e)
    inputs = [t for t in (h, w, bias, e if y is not None else None) if t is not None]
    return score.detach(), *torch.autograd.grad(score, inputs, grad)


def exact(case):
    def double(t):
        return t.double().cpu() if t.is_floating_point() else t.cpu()

    return [Spectrum(*map(double, t)) if isinstance(t, Spectrum) else None if t is None else double(t) for t in case]


def assert_equals_formula(case, tolerance):
    got, want = values_and_gradients(ops.projection_logits, *case), values_and_gradients(formula, *exact(case))
    h, _, _, of_w, y, _, of_e, grad = case
    scales = [b.abs().max().item() for b in want]
    scales[0] += h.norm(dim=1).max().item()  # the terms of w and e may cancel
    scales[1] += grad.abs().max().item()
    terms = (grad.abs() @ h.abs()).max().item()
    scales[2] += terms / of_w.sigma.item()
    if y is not None:
        scales[-1] += terms / of_e.sigma.item()
    for a, b, scale in zip(got, want, scales, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance * scale)


def without(case, *places):
    return [None if i in places else t for i, t in enumerate(case)]


# --- The values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), (2,), (4,), (2, 4)], ids=["full", "no bias", "no labels", "neither"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_formula(device, shape, missing):
    assert_equals_formula(without(head(*shape, device=device), *missing), 1e-5)


@pytest.mark.parametrize("missing", [(), (2,), (4,)], ids=["full", "no bias", "no labels"])
def test_reference_equals_its_formula_in_float64(missing):
    assert_equals_formula(without(head(33, 31, 7, torch.float64), *missing), 1e-11)


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 50))
def test_any_shape(samples, width, classes):
    assert_equals_formula(head(samples, width, classes, seed=samples), 1e-4)


def test_equals_linear_and_embedding_of_torch():
    h, w, bias, of_w, y, e, of_e, _ = head(50, 20, 6)
    want = F.linear(h, w / of_w.sigma, bias).squeeze(1) + (F.embedding(y, e / of_e.sigma) * h).sum(1)
    torch.testing.assert_close(ops.projection_logits(h, w, bias, of_w, y, e, of_e), want, rtol=1e-5, atol=1e-5)


def test_classes_that_nobody_has_get_the_term_of_sigma_only():
    case = head(9, 20, 6)
    case[4].fill_(2)
    *_, de = values_and_gradients(ops.projection_logits, *case)
    *_, want = values_and_gradients(formula, *exact(case))
    assert (want[[0, 1, 3, 4, 5]].abs().amax(1) > 0).all()
    torch.testing.assert_close(de.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["auto", "reference"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e30])
def test_hard_weights_stay_finite(device, which, scale):
    h, w, bias, _, y, e, _, grad = head(9, 20, 6, device=device)
    vectors = [F.normalize(torch.ones(length, device=device), dim=0) for length in (1, 6, 20, 20)]
    with backend.use(which):
        of_w, of_e = ops.spectral_norm([scale * w, scale * e], vectors[:2], vectors[2:])
        found = values_and_gradients(ops.projection_logits, h, scale * w, bias, of_w, y, scale * e, of_e, grad)
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(device, layout):
    h, w, bias, of_w, y, e, of_e, grad = head(12, 20, 6, device=device)
    if layout == "transposed":
        h = h.T.contiguous().T
    else:
        h, grad, y = torch.cat([h, h], 1)[:, :20], grad[:1].expand(12), torch.stack([y, y], 1)[:, 0]
    assert_equals_formula((h, w, bias, of_w, y, e, of_e, grad), 1e-5)


# --- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), (2,), (4,)], ids=["full", "no bias", "no labels"])
def test_gradcheck(missing):
    h, w, bias, of_w, y, e, of_e, _ = without(head(5, 4, 3, torch.float64), *missing)
    inputs = [t.requires_grad_() for t in (h, w, e if y is not None else None, bias) if t is not None]

    def call(h, w, *rest):
        table, b = (rest[0] if y is not None else e), (rest[-1] if bias is not None else None)
        plain, us, vs = [w.detach(), table.detach()], [of_w.u, of_e.u], [of_w.v, of_e.v]
        return ops.projection_logits(h, w, b, *_interleave(ops.spectral_norm(plain, us, vs, n_iter=0), y, table))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def _interleave(spectra, y, e):
    return spectra[0], y, e, spectra[1]


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_only_what_needs_a_gradient_gets_one(needed):
    case = head(9, 20, 6)
    want = values_and_gradients(ops.projection_logits, *case)[1:][needed]
    h, w, bias, of_w, y, e, of_e, grad = case
    inputs = [t.clone().requires_grad_(i == needed) for i, t in enumerate((h, w, bias, e))]
    ops.projection_logits(*inputs[:3], of_w, y, inputs[3], of_e).backward(grad)
    assert [t.grad is not None for t in inputs] == [i == needed for i in range(4)]
    assert torch.equal(inputs[needed].grad, want)


# --- As torch sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("missing", [(), (2,), (4, 5, 6)], ids=["full", "no bias", "no labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(device, dtype, missing, requires_grad):
    h, w, bias, of_w, y, e, of_e, grad = without(head(4, 5, 3, dtype, device), *missing)
    for tensor in (h, w, bias, e):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    embedding = (y, e, *(of_e or (None, None, None)))
    torch.library.opcheck(torch.ops.afd.projection_logits.default, (h, w, bias, *of_w, *embedding))
    plain = [None if t is None else t.detach() for t in (h, w, *of_w, *embedding)]
    arguments = (grad, *plain, [True, True, True, y is not None])
    torch.library.opcheck(torch.ops.afd.projection_logits_backward.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same(device, compiler):
    torch.compiler.reset()
    case = head(8, 20, 6, device=device)
    compiled = torch.compile(ops.projection_logits, fullgraph=True, backend=compiler)
    got, want = values_and_gradients(compiled, *case), values_and_gradients(ops.projection_logits, *case)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_threads_or_instruction_set(monkeypatch):
    case = head(300, 200, 10)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for isa in USABLE_ISAS:
                monkeypatch.setattr(native, "_isa", isa)
                results.append(values_and_gradients(ops.projection_logits, *case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_same_bits_every_time(cuda):
    case = head(1024, 512, 10, device=cuda)
    want = values_and_gradients(ops.projection_logits, *case)
    for _ in range(5):
        found = values_and_gradients(ops.projection_logits, *case)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.gpu
def test_a_wrong_label_on_the_gpu_makes_its_score_nan_and_touches_no_other(cuda):
    case = head(9, 20, 6, device=cuda)
    want = ops.projection_logits(*case[:7])
    case[4][3] = 6
    case[4][5] = -1
    found = values_and_gradients(ops.projection_logits, *case)
    assert found[0].isnan().nonzero().flatten().tolist() == [3, 5]
    kept = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(found[0][kept], want[kept])
    assert torch.isfinite(found[4]).all()


# --- Bad input ------------------------------------------------------------------------------------------------------


def bad(**changes):
    h, w, bias, of_w, y, e, of_e, _ = head(4, 5, 3)
    arguments = {"h": h, "w": w, "bias": bias, "w_spectrum": of_w, "y": y, "e": e, "e_spectrum": of_e}
    return ops.projection_logits(**{**arguments, **changes})


BAD = {
    r"h has shape \[4, 6\]; it must be \[N, 5\]": {"h": torch.ones(4, 6)},
    "h is an empty batch": {"h": torch.ones(0, 5), "y": torch.ones(0, dtype=torch.int64)},
    r"y holds 3; labels must be in \[0, 3\)": {"y": torch.tensor([0, 3, 1, 2])},
    r"y holds -1; labels must be in \[0, 3\)": {"y": torch.tensor([0, -1, 1, 2])},
    r"y has shape \[3\]; it must be \[4\]": {"y": torch.tensor([0, 1, 2])},
    "y is given without e": {"e": None},
    r"e has stride \(1, 3\)": {"e": torch.ones(5, 3).T},
    r"w has stride": {"w": torch.ones(1, 10)[:, ::2]},
    r"bias has shape \[2\]; it must be \[1\]": {"bias": torch.ones(2)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(InputError, match=message):
        bad(**BAD[message])


def test_wrong_shapes_of_w_and_e_are_named():
    h, w, bias, of_w, y, e, of_e, _ = head(4, 5, 3)
    with pytest.raises(InputError, match=r"w has shape \[3, 5\]; it must be \[1, width\]"):
        ops.projection_logits(h, e, None, of_e)
    _, _, _, _, _, narrow, of_narrow, _ = head(4, 4, 3)
    with pytest.raises(InputError, match=r"e has shape \[3, 4\]; it must be \[classes, 5\]"):
        ops.projection_logits(h, w, bias, of_w, y, narrow, of_narrow)


def test_wrong_dtypes_are_named():
    with pytest.raises(InputTypeError, match=r"w is torch\.float32; it must have h's dtype, torch\.float64"):
        bad(h=torch.ones(4, 5).double())
    with pytest.raises(InputTypeError, match=r"y is torch\.int32; labels are torch\.int64"):
        bad(y=torch.ones(4, dtype=torch.int32))
