"""Every op and module, forward, backward and twice, gives in any surroundings what it gives outside of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ambient import default_device, default_dtype, deterministic_algorithms
from ambient_cases import BIAS, CASES, FEATURES, HEAD, OF_W, OPS, TABLE, W, Y
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.nn import ConvNet, ProjectionDiscriminator, ResNet18, SpectralLinear
from afd.ops import backend


class Halving(TorchFunctionMode):
    """Computes what torch functions return in bfloat16, as a home-made autocast does; afd's ops it leaves alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = getattr(func, "__name__", "") in ("mm", "empty", "new_empty", "empty_like", "zeros_like", "outer")
        return out.bfloat16() if made and isinstance(out, Tensor) else out


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


MODES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic_algorithms,  # memory that is not initialised holds NaN there
    "a mode that halves": Halving,
    "a mode that watches": Watching,
}
# Modes that record nothing: only what comes before gradients can be compared.
UNRECORDED = ("no_grad", "inference_mode")
# A mode that looks on is shown every product, so the fused network runs op by op: the same values to a few roundings.
CLOSE = ("a mode that watches",)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_an_ambient_mode_changes_nothing(case, mode, which):
    run = CASES[case]
    with backend.use(which):
        with torch.no_grad() if mode in UNRECORDED else contextlib.nullcontext():
            want = run()
        with MODES[mode]():
            got = run()
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device
        if mode in CLOSE:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_every_op_is_among_the_cases():
    """A new op comes here, too: each that torch knows is called by a case, or is the backward of one that is."""
    called = {name.partition(",")[0] for name in OPS}
    known = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("afd::")}  # fmt: skip
    assert known - called == {"spectral_linear_backward", "projection_logits_backward"}
    assert called == {name for name in ops.__all__ if name in known}


# --- Backward alone in a mode, as when only the step is made there --------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("no_grad", "inference_mode")])
def test_a_backward_alone_in_a_mode_changes_nothing(mode, which):
    torch.manual_seed(0)
    net = ProjectionDiscriminator(5, 3).eval()
    gradients = []
    with backend.use(which):
        for surroundings in (contextlib.nullcontext, MODES[mode]):
            score = net(FEATURES, Y).sum()
            with surroundings():
                gradients.append(torch.autograd.grad(score, list(net.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


# --- Features that autocast made ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_that_autocast_made_are_widened(dtype, which):
    torch.manual_seed(0)
    net, layer = ProjectionDiscriminator(5, 3).eval(), SpectralLinear(5, 4).eval()
    short = FEATURES.to(dtype).requires_grad_()
    wide = short.detach().float().requires_grad_()
    with backend.use(which):
        want = net(wide, Y), layer(wide)
        with torch.autocast("cpu", dtype):
            got = net(short, Y), layer(short)
            for ours, theirs in zip(got, want, strict=True):
                assert torch.equal(ours, theirs)
                (gradient,), (exact,) = (torch.autograd.grad(o.sum(), z) for o, z in ((ours, short), (theirs, wide)))
                assert gradient.dtype == dtype
                assert torch.equal(gradient, exact.to(dtype))


def test_nothing_is_widened_outside_of_autocast():
    net, layer = ProjectionDiscriminator(5, 3), SpectralLinear(5, 4)
    with pytest.raises(InputTypeError, match=r"x is torch\.bfloat16|weight is torch\.float32"):
        layer(FEATURES.bfloat16())
    with pytest.raises(InputTypeError, match=r"z is torch\.bfloat16"):
        net(FEATURES.bfloat16(), Y)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputTypeError, match=r"torch\.float64"):
        net(FEATURES.double(), Y)


# --- The networks that afd brings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in MODES if "autocast" not in mode and mode != "a mode that halves"])
@pytest.mark.parametrize("network", [lambda: ConvNet((1, 8, 8), 4, 6), lambda: ResNet18(1, 4)], ids=["conv", "resnet"])
def test_networks_of_torchs_own_layers_are_as_they_are_outside(network, mode):
    torch.manual_seed(0)
    net, x = network().eval(), torch.rand(2, 1, 8, 8)
    want = net(x)
    with MODES[mode]():
        assert torch.equal(net(x), want)


# --- Transforms and compilers ---------------------------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ProjectionDiscriminator(5, 3, hidden=4).eval()


def test_vmap_gives_each_row_its_score(net):
    rows = torch.vmap(lambda z, y: net(z[None], y[None])[0])(FEATURES, Y)
    torch.testing.assert_close(rows, net(FEATURES, Y), rtol=1e-5, atol=1e-6)


def test_grad_of_torch_func_is_the_gradient(net):
    parameters = dict(net.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(net, parameters, (FEATURES, Y)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(net(FEATURES, Y).square().sum(), list(parameters.values()))
    for ours, theirs in zip(got.values(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_per_sample(net):
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, z, y):
        return torch.func.functional_call(net, parameters, (z[None], y[None])).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, FEATURES, Y)
    whole = torch.autograd.grad(net(FEATURES, Y).sum(), list(net.parameters()))
    for ours, theirs in zip(each.values(), whole, strict=True):
        torch.testing.assert_close(ours.sum(0), theirs, rtol=1e-4, atol=1e-5)


def test_forward_mode_follows_the_features(net):
    direction = torch.ones_like(FEATURES)
    _, along = torch.func.jvp(lambda z: net(z, Y), (FEATURES,), (direction,))
    z = FEATURES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(z, Y).sum(), z)
    torch.testing.assert_close(along, (gradient * direction).sum(1), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(FEATURES, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(net(dual, Y)).tangent, along)


def test_many_gradients_at_once(net):
    z = FEATURES.clone().requires_grad_()
    score = net(z, Y)
    (rows,) = torch.autograd.grad(score, z, torch.eye(6), is_grads_batched=True, retain_graph=True)
    (whole,) = torch.autograd.grad(score, z, torch.ones(6))
    torch.testing.assert_close(rows.sum(0), whole, rtol=1e-4, atol=1e-5)


def test_power_iterations_inside_a_transform_are_refused(net):
    net.train()
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(InputError, match=r"evaluation mode"):
        torch.func.grad(lambda p: torch.func.functional_call(net, p, (FEATURES, Y)).sum())(dict(net.named_parameters()))
    for buffer, was in zip(net.buffers(), before, strict=True):
        assert torch.equal(buffer, was)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_discriminator_compiles_in_one_graph(net, training, autocast):
    torch.compiler.reset()
    net.train(training)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    found = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.load_state_dict(start)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            score = run(FEATURES, Y)
        found.append([score.detach(), *torch.autograd.grad(score.sum(), list(net.parameters()))])
        assert score.dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- Inference tensors ----------------------------------------------------------------------------------------------


def test_what_inference_mode_made_has_no_gradient_and_is_named():
    with torch.inference_mode():
        layer, z = SpectralLinear(5, 4), FEATURES.clone()
    with pytest.raises(InputError, match=r"made in torch\.inference_mode"):
        layer.eval()(FEATURES.clone().requires_grad_())
    with pytest.raises(InputError, match=r"made in torch\.inference_mode"):
        layer.train()(FEATURES)
    with torch.no_grad():
        assert layer.eval()(FEATURES).shape == (6, 4)
    with pytest.raises(InputError, match=r"made in torch\.inference_mode"):
        ProjectionDiscriminator(5, 3)(z, Y)


def test_a_state_that_moved_in_inference_mode_serves_training_afterwards():
    net = ProjectionDiscriminator(5, 3)
    with torch.inference_mode():
        net(FEATURES, Y)
    net(FEATURES, Y).sum().backward()
    assert not any(buffer.is_inference() for buffer in net.buffers())


# --- Saved tensors --------------------------------------------------------------------------------------------------


def test_saved_tensors_that_come_back_in_another_form_are_refused():
    net = ProjectionDiscriminator(5, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.half() if x.is_floating_point() else x):
        score = net(FEATURES, Y).sum()
        with pytest.raises(InputError, match="hook on saved tensors"):
            score.backward()
    layer = SpectralLinear(5, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.half()):
        out = layer(FEATURES).sum()
        with pytest.raises((InputError, InputTypeError)):
            out.backward()


@pytest.mark.parametrize("lazy", [torch._neg_view, lambda g: g.expand(6), lambda g: torch.stack([g, g], 1)[:, 0]])
def test_gradients_of_any_layout_arrive(lazy, net):
    z = FEATURES.clone().requires_grad_()
    grad = lazy(torch.ones(6))
    (got,) = torch.autograd.grad(net(z, Y), z, grad)
    (want,) = torch.autograd.grad(net(z, Y), z, grad.clone().resolve_neg().contiguous())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["w", "x"])
def test_views_with_a_lazy_sign_count_as_their_values(name):
    negative = {"w": (FEATURES, torch._neg_view(W)), "x": (torch._neg_view(FEATURES), W)}[name]
    plain = [t.resolve_neg() for t in negative]
    for x, w in (negative, plain):
        spectrum = ops.spectral_norm([w], [OF_W.u], [OF_W.v])[0]
        out = ops.spectral_linear(x, w, BIAS, spectrum)
        assert torch.equal(out, ops.spectral_linear(plain[0], plain[1], BIAS, spectrum))
    assert HEAD.shape[1] == TABLE.shape[1]
