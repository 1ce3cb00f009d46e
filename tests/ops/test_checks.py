"""What the ops refuse, on either backend, with a message that names the argument and what was given."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import backend, checks

X = torch.rand(3, 4)
GOOD = {"x_adv": X.clone(), "x": X, "grad": X.clone(), "alpha": 0.1, "eps": 0.1}

# what is changed about a good call, the error, and its words
PGD_ERRORS = [
    ({"norm": "L7"}, ValueError, "norm is 'L7'; allowed are Linf, L2, L1"),
    ({"x": X.half()}, TypeError, "x is torch.float16; allowed are torch.float32 and torch.float64"),
    (dict.fromkeys(("x", "x_adv", "grad"), torch.tensor(0.5)), ValueError, "x has no batch dimension"),
    ({"x_adv": X[:2].clone()}, ValueError, "x_adv has shape [2, 4]; it must match x, [3, 4]"),
    ({"x_adv": X.double()}, TypeError, "x_adv is torch.float64; it must have x's dtype, torch.float32"),
    ({"grad": X[:, :2].clone()}, ValueError, "grad has shape [3, 2]; it must match x, [3, 4]"),
    ({"grad": X.int()}, TypeError, "grad is torch.int32; allowed are torch.float32, torch.float16"),
    ({"alpha": float("nan")}, ValueError, "alpha is nan; it must be a finite number"),
    ({"alpha": float("inf")}, ValueError, "alpha is inf; it must be a finite number"),
    ({"eps": -0.5}, ValueError, "eps is -0.5; it must be a finite number >= 0"),
    ({"eps": float("inf")}, ValueError, "eps is inf; it must be a finite number >= 0"),
    ({"eps": torch.rand(2)}, ValueError, "eps has shape [2]; per-sample values need [3]"),
    ({"alpha": torch.tensor(0.1)}, ValueError, "alpha has shape []; per-sample values need [3]"),
    ({"eps": torch.rand(6)[::2]}, ValueError, "eps has stride (2,); per-sample values must be contiguous"),
    ({"alpha": torch.rand(3).double()}, TypeError, "alpha is torch.float64 on cpu; it must be torch.float32 on cpu"),
    ({"sparsity": 0.0}, ValueError, "sparsity is 0.0; it must be in (0, 1]"),
    ({"sparsity": 1.5}, ValueError, "sparsity is 1.5; it must be in (0, 1]"),
    ({"sparsity": torch.rand(2)}, ValueError, "sparsity has shape [2]; per-sample values need [3]"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds are (1.0, 0.0); low must be less than high"),
    ({"bounds": (0.0, float("nan"))}, ValueError, "bounds are (0.0, nan); low must be less than high"),
]
START_ERRORS = [
    ({"norm": "L7"}, ValueError, "norm is 'L7'; allowed are Linf, L2, L1"),
    ({"x": X.half()}, TypeError, "x is torch.float16; allowed are torch.float32 and torch.float64"),
    ({"eps": -1}, ValueError, "eps is -1.0; it must be a finite number >= 0"),
    ({"eps": torch.rand(4)}, ValueError, "eps has shape [4]; per-sample values need [3]"),
    ({"bounds": (0.0, 0.0)}, ValueError, "bounds are (0.0, 0.0); low must be less than high"),
    ({"seed": -1}, ValueError, "seed is -1; it must be in [0, 2**63)"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; it must be in [0, 2**63)"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed is torch.float32 on cpu; it must be torch.int64 on cpu, like x"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed has shape [2]; as a tensor it must be a single number"),
    ({"first_sample": -1}, ValueError, "first_sample is -1; it must be in [0, 2**63)"),
    ({"first_sample": 2**63}, ValueError, "first_sample is 9223372036854775808; it must be in [0, 2**63)"),
]


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("op", [ops.pgd_step, ops.pgd_step_])
@pytest.mark.parametrize(("change", "error", "words"), PGD_ERRORS)
def test_pgd_step_refuses(which, op, change, error, words):
    call = GOOD | change
    with backend.use(which), pytest.raises(error, match=re.escape(words)):
        op(call.pop("x_adv"), call.pop("x"), call.pop("grad"), **call)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("op", [ops.project, ops.project_])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [case for case in PGD_ERRORS if not case[0].keys() & {"grad", "alpha", "sparsity"} or "x" in case[0]],
)
def test_project_refuses(which, op, change, error, words):
    call = {name: value for name, value in (GOOD | change).items() if name not in ("grad", "alpha")}
    with backend.use(which), pytest.raises(error, match=re.escape(words)):
        op(call.pop("x_adv"), call.pop("x"), **call)


def test_project_in_place_refuses_its_own_image():
    with pytest.raises(ValueError, match="x shares memory with x_adv, which is written in place"):
        ops.project_(X, X, eps=0.1, norm="L2")


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize(("change", "error", "words"), START_ERRORS)
def test_random_start_refuses(which, change, error, words):
    call = {"x": X, "eps": 0.1, "seed": 0} | change
    with backend.use(which), pytest.raises(error, match=re.escape(words)):
        ops.random_start(call.pop("x"), **call)


def test_random_start_in_place_refuses_another_shape():
    with pytest.raises(ValueError, match=re.escape("x_adv has shape [2, 4]; it must match x, [3, 4]")):
        ops.random_start_(X[:2].clone(), X, eps=0.1, seed=0)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="grad is on meta; it must be on x's device, cpu"):
        checks.same_as("grad", X.to("meta"), X)


# --- Memory that is written while it is read ------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("shared", ["x", "grad"])
def test_iterate_may_not_be_an_input(which, shared):
    tensors = {"x": X, "grad": X}
    x_adv = X.clone()
    tensors[shared] = x_adv
    words = f"{shared} shares memory with x_adv, which is written in place; pass a clone of {shared}"
    with backend.use(which), pytest.raises(ValueError, match=words):
        ops.pgd_step_(x_adv, **tensors, alpha=0.1, eps=0.1)
    assert torch.equal(x_adv, X)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_overlapping_views_are_refused(which):
    buffer = torch.rand(5, 4)
    with backend.use(which), pytest.raises(ValueError, match="x shares memory with x_adv"):
        ops.pgd_step_(buffer[:3], buffer[2:], X, alpha=0.1, eps=0.1)
    with backend.use(which), pytest.raises(ValueError, match="x shares memory with x_adv"):
        ops.random_start_(buffer[:3], buffer[2:], eps=0.1, seed=0)


def test_neighbours_in_one_buffer_are_fine():
    buffer = torch.rand(6, 4)
    want = ops.pgd_step(buffer[:3], buffer[3:], X, alpha=0.1, eps=0.1)
    assert torch.equal(ops.pgd_step_(buffer[:3], buffer[3:], X, alpha=0.1, eps=0.1), want)


# --- What is no tensor, or none that a kernel can walk --------------------------------------------------------------

STRANGE = [
    (X.numpy(), "x is a ndarray; it must be a torch.Tensor"),
    (X.tolist(), "x is a list; it must be a torch.Tensor"),
    (None, "x is None; it must be a torch.Tensor"),
    (X.to_sparse(), "x is laid out as torch.sparse_coo; it must be an ordinary, dense tensor"),
    (X.to_mkldnn(), "x is laid out as torch._mkldnn; it must be an ordinary, dense tensor"),
    (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "x is quantised (torch.qint8); it must be an ordinary"),
]


@pytest.mark.parametrize("op", [ops.project, ops.project_])
@pytest.mark.parametrize(("strange", "words"), STRANGE, ids=lambda value: type(value).__name__)
def test_what_is_no_dense_tensor_is_named(op, strange, words):
    with pytest.raises(InputTypeError, match=re.escape(words)):
        op(X.clone(), strange, eps=0.1)


def test_a_tensor_on_meta_beside_others_is_named():
    with pytest.raises(InputError, match="x is on meta; it must be on x_adv's device, cpu"):
        ops.project(X.clone(), X.to("meta"), eps=0.1)
    with pytest.raises(InputError, match="weight is on meta; it must be on x's device, cpu"):
        ops.spectral_linear(X, X.to("meta"), None, ops.Spectrum(X[0, 0], X[0, :3], X[0]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"eps": None}, InputTypeError, "eps is None; it must be a number, or a tensor"),
        ({"eps": [0.1]}, InputTypeError, "eps is a list; it must be a number, or a tensor"),
        ({"eps": True}, InputTypeError, "eps is True; it must be a number, or a tensor"),
        ({"eps": 1e300}, InputError, "eps is 1e+300; it must be a finite number >= 0 of torch.float32"),
        ({"eps": 10**400}, InputError, "eps is an integer that no float holds"),
        ({"bounds": None}, InputTypeError, "bounds are None; they must be a pair of numbers"),
        ({"bounds": (0.0,)}, InputError, "bounds are 1 values; they must be a pair of numbers"),
        ({"bounds": ("0", 1)}, InputTypeError, "the low bound is a str; it must be a number"),
        ({"bounds": (-1e300, 1)}, InputError, "bounds are (-1e+300, 1.0); they must be numbers of torch.float32"),
        ({"norm": None}, InputTypeError, "norm is None; it must be a string"),
        ({"seed": True}, InputTypeError, "seed is True; it must be an integer"),
        ({"seed": 1.5}, InputTypeError, "seed is 1.5; it must be an integer"),
        ({"seed": None}, InputTypeError, "seed is None; it must be an integer"),
        ({"first_sample": "0"}, InputTypeError, "first_sample is a str; it must be an integer"),
    ],
)
def test_settings_of_another_type_are_named(change, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ops.random_start(X, **({"eps": 0.1, "seed": 0} | change))


def test_numbers_of_numpy_are_numbers():
    want = ops.random_start(X, eps=0.25, seed=3, bounds=(0.0, 1.0))
    assert torch.equal(ops.random_start(X, eps=np.float32(0.25), seed=np.int64(3), bounds=[np.int32(0), 1]), want)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize(
    "folded", [X[:1].expand(3, 4), torch.rand(6).as_strided((3, 4), (1, 1)), torch.rand(9).as_strided((3, 4), (2, 1))]
)
def test_memory_that_overlaps_itself_is_not_written_to(folded, which):
    before = folded.clone()
    with backend.use(which), pytest.raises(InputError, match="so that elements of it lie in one place"):
        ops.project_(folded, X, eps=0.1)
    assert torch.equal(folded, before)


def test_strides_that_cross_without_meeting_are_written_to():
    crossed = torch.rand(12).as_strided((2, 3), (3, 2))  # places 0 2 4 and 3 5 7
    want = ops.project(crossed, X[:2, :3].contiguous(), eps=0.1)
    assert torch.equal(ops.project_(crossed, X[:2, :3].contiguous(), eps=0.1), want)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("name", ["eps", "alpha", "sparsity"])
def test_iterate_may_not_be_a_setting(name, which):
    x_adv = torch.rand(3, 1)
    before = x_adv.clone()
    settings = {"eps": 0.1, "alpha": 0.1, name: x_adv.view(-1)}
    with backend.use(which), pytest.raises(InputError, match=f"{name} shares memory with x_adv"):
        ops.pgd_step_(x_adv, X[:, :1].clone(), X[:, :1].clone(), **settings)
    assert torch.equal(x_adv, before)


def test_a_view_with_a_lazy_sign_is_read_but_not_written():
    negative = torch._neg_view(X.clone())
    want = ops.project(-X, X, eps=0.1, bounds=(-1.0, 1.0))
    assert torch.equal(ops.project(negative, X, eps=0.1, bounds=(-1.0, 1.0)), want)
    x_adv = X.clone()
    ops.project_(x_adv, negative, eps=0.1, bounds=(-1.0, 1.0))
    assert torch.equal(x_adv, ops.project(X, -X, eps=0.1, bounds=(-1.0, 1.0)))
    with pytest.raises(InputError, match="x_adv is a view with a lazy sign; it is written in place: pass a clone"):
        ops.project_(negative, X, eps=0.1)
    assert torch.equal(negative, -X)


@pytest.mark.parametrize("name", ["grad", "out"])
@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 3).double()], ids=["shape", "dtype"])
def test_a_backward_called_by_hand_checks_what_it_is_given(name, wrong):
    spectrum = (X[0, 0], X[0, :3].contiguous(), X[0])
    given = {"grad": torch.zeros(3, 3), "out": torch.zeros(3, 3), name: wrong}
    with pytest.raises((InputError, InputTypeError), match=f"{name} (has shape|is torch.float64)"):
        torch.ops.afd.spectral_linear_backward(
            given["grad"], X, X, None, given["out"], *spectrum, 0.2, [True, True, True]
        )
