"""BatchNorm joined to convolutions: the same function and gradient whatever a forward does, and a model left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from joined_networks import FAMILIES, assert_computes_the_same, gradient, resnet, unsettled, vgg
from torch import nn

from afd.attacks import APGD, PGD
from afd.attacks.engine import evaluating, logits_alone
from afd.attacks.joining import CONVS, Joining
from afd.nn import split

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# --- What is joined -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_networks_join_all_that_a_trace_of_them_shows(family):
    build, pairs = FAMILIES[family]
    model, x = build().double(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    joining = assert_computes_the_same(model, x, pairs)
    assert not torch.equal(gradient(model, x, joining)[1], gradient(model, x)[1])  # rounding shows that it is in use


def test_a_wrapper_is_looked_through():
    """Training wraps a user's classifier in one that inspects the output, and hooks into its last layer."""
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    assert_computes_the_same(split(unsettled(inner).double()), torch.rand(2, 3, 5, 5, dtype=torch.float64), 1)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, False)])
def test_every_kind_of_convolution(dimensions, bias, affine):
    conv, norm = CONVS[dimensions - 1], NORMS[dimensions - 1]
    model = nn.Sequential(
        conv(2, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular", bias=bias),
        norm(4, affine=affine), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    x = torch.rand(5, 2, *[6] * dimensions, dtype=torch.float64)
    model.double()(x)  # gathers statistics
    assert_computes_the_same(model.eval(), x, 1)


def test_new_weights_are_folded_anew():
    model, x = resnet().double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    joining = assert_computes_the_same(model, x, 20)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.data.mul_(1.3)  # which no version counter sees
    assert_computes_the_same(model, x, 20, joining)


@pytest.mark.parametrize("family", ["resnet", "preactresnet18", "wideresnet28-10", "vgg16-bn", "resnet18, silu"])
def test_joined_attacks_agree_with_those_on_the_model_as_written(family):
    model, x, y = FAMILIES[family][0](), torch.rand(6, 3, 16, 16), torch.arange(6) % 10
    joined, written = (PGD(model, eps=0.03, steps=3, fold_batchnorm=fold)(x, y) for fold in (True, False))
    assert (joined - written).abs().gt(1e-6).float().mean() < 0.01  # signs turn where gradients are all but zero


# --- Others who look on ---------------------------------------------------------------------------------------------


def small():
    return unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))).double()


@pytest.mark.parametrize("layer", range(4))
def test_hooks_see_what_they_would_see_without_us(layer):
    model, x = small(), torch.rand(2, 3, 5, 5, dtype=torch.float64)
    seen = []
    model[layer].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    model[layer].register_forward_hook(
        lambda _module, inputs, output: seen.extend([inputs[0].detach(), output.detach()])
    )
    gradient(model, x)
    expected, seen[:] = list(seen), []
    gradient(model, x, Joining())
    assert [type(one) for one in seen] == [torch.Tensor] * 3
    torch.testing.assert_close(seen, expected, atol=1e-10, rtol=1e-10)


def test_a_hooked_convolution_is_left_alone_and_joined_once_the_hook_is_gone():
    model, x = small(), torch.rand(2, 3, 5, 5, dtype=torch.float64)
    handle = model[0].register_forward_hook(lambda *_: None)
    joining = assert_computes_the_same(model, x, 0)
    handle.remove()
    assert_computes_the_same(model, x, 1, joining)


def test_backward_hooks_see_every_layers_gradient():
    model, x = small(), torch.rand(2, 3, 5, 5, dtype=torch.float64)
    seen = []
    model[1].register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    assert_computes_the_same(model, x, 0)
    assert len(seen) == 3


def test_a_parametrised_convolution_is_left_alone():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = unsettled(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))).double()
    assert_computes_the_same(model, torch.rand(2, 3, 5, 5, dtype=torch.float64), 0)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_left_alone(low):
    model, x = small().to(low), torch.rand(2, 3, 5, 5, dtype=low)
    joining = Joining()
    with evaluating(model), joining.joined(model):
        found = logits_alone(model, x)
    assert torch.equal(found, model(x).detach())
    assert not joining.pairs


# --- The model is given back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_the_model_is_given_back_even_when_it_raises(kind):
    model = resnet()
    handle = model.classifier.register_forward_pre_hook(lambda *_: None)
    keys = [sorted(vars(module)) for module in model.modules()]
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    before = model(x)
    kind(model, steps=1)(x, y)
    assert [sorted(vars(module)) for module in model.modules()] == keys
    handle.remove()
    handle = model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kind(model, steps=1)(x, y)
    handle.remove()
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert torch.equal(model(x), before)


def test_a_copy_that_is_made_meanwhile_computes_what_the_model_does():
    model, joining, copies = vgg().double(), Joining(), []
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    model.register_forward_pre_hook(
        lambda module, _inputs: copies.append(copy.deepcopy(module[0])) if not copies else None
    )
    gradient(model, x, joining)
    torch.testing.assert_close(copies[0](x), model[0](x))


def test_successes_are_judged_by_the_model_as_it_is_written():
    """The joined model calls everything class 0; the model as written is never fooled."""

    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            out = self.norm(self.conv(x))
            joined = "forward" in vars(self.conv)
            return out.mean((2, 3)) * 1e-3 + torch.tensor([1.0, 0.0, 0.0] if joined else [0.0, 1.0, 0.0])

    model, x, y = unsettled(Edge()), torch.rand(4, 3, 5, 5), torch.ones(4, dtype=torch.int64)
    for early in (False, True):
        attack = APGD(model, eps=0.1, steps=4, early_stop=early)
        x_adv = attack(x, y)
        assert len(attack._joining.pairs) == 1
        assert (model(x_adv).argmax(1) == 1).all()
        assert not torch.equal(x_adv, x)  # points of the highest loss
