"""BatchNorm folded into convolutions: the same function and gradient, and a model that is given back untouched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import APGD, PGD
from afd.attacks.folding import CONVS, NORMS, folding
from afd.nn import build_model, split


def unsettled(model):
    """Statistics, scales and shifts as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.1)
    return model.eval()


def resnet():
    torch.manual_seed(0)
    return unsettled(build_model("resnet18", (3, 16, 16), 10, 4))


def gradient(model, x):
    x = x.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x)) % 10, reduction="sum"), x)[
        0
    ]


def test_a_resnet_is_folded_whole_and_computes_the_same():
    model, x = resnet().double(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    found = folding(model)
    assert len(found.pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 20
    logits, grad = gradient(model, x)
    with found.folded():
        folded_logits, folded_grad = gradient(model, x)
        with found.suspended():
            assert torch.equal(gradient(model, x)[1], grad)
        assert torch.equal(gradient(model, x)[1], folded_grad)
    torch.testing.assert_close(folded_logits, logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(folded_grad, grad, atol=1e-10, rtol=1e-10)
    assert not torch.equal(folded_grad, grad)  # it did fold
    assert torch.equal(gradient(model, x)[1], grad)


def test_a_wrapper_is_looked_through():
    """Training wraps a user's classifier in one that cannot be traced, since it inspects the output."""
    inner = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)))
    assert len(folding(split(inner)).pairs) == 1


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
    model.eval()
    found = folding(model)
    assert len(found.pairs) == 1
    logits, grad = gradient(model, x)
    with found.folded():
        folded = gradient(model, x)
    torch.testing.assert_close(folded, (logits, grad), atol=1e-12, rtol=1e-10)


def test_new_weights_are_folded_anew():
    model, x = resnet().double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with folding(model).folded():
        model(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.mul_(1.3)
    with folding(model).folded():
        folded = gradient(model, x)
    torch.testing.assert_close(folded, gradient(model, x), atol=1e-10, rtol=1e-10)


class Shared(nn.Module):
    """Uses the convolution's output beside its BatchNorm, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        out = self.conv(x)
        return (out + self.norm(out)).mean((2, 3))


class Twice(Shared):
    """Runs the pair twice."""

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x)))).mean((2, 3))


class Reshaped(Shared):
    """Something lies between the two."""

    def forward(self, x):
        return self.norm(self.conv(x).relu()).mean((2, 3))


class Chooses(Shared):
    """Cannot be traced."""

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) * (1 if float(x.sum()) > 0 else 2)


@pytest.mark.parametrize("kind", [Shared, Twice, Reshaped, Chooses])
def test_what_cannot_be_folded_is_left_alone(kind):
    model = unsettled(kind())
    assert folding(model).pairs == []
    x, y = torch.rand(4, 3, 5, 5), torch.arange(4) % 3
    assert torch.equal(PGD(model, steps=2)(x, y), PGD(model, steps=2, fold=False)(x, y))


def test_hooked_layers_are_left_alone_and_folded_once_the_hook_is_gone():
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)))
    seen = []
    handle = model[1].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    x = torch.rand(2, 3, 5, 5)
    PGD(model, steps=1)(x, torch.tensor([0, 1]))
    assert len(folding(model).pairs) == 0
    assert len(seen) == 1
    handle.remove()
    assert len(folding(model).pairs) == 1


def test_a_parametrised_convolution_is_left_alone():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert folding(unsettled(nn.Sequential(conv, nn.BatchNorm2d(4)))).pairs == []


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_the_model_is_given_back_even_when_it_raises(kind):
    model = resnet()
    keys = [sorted(vars(module)) for module in model.modules()]
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    before = model(x)
    kind(model, steps=1)(x, y)
    handle = model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kind(model, steps=1)(x, y)
    handle.remove()
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert torch.equal(model(x), before)


def test_attacks_agree_with_and_without_folding():
    model, x, y = resnet(), torch.rand(6, 3, 16, 16), torch.arange(6) % 10
    with_fold, without = (PGD(model, eps=0.03, steps=3, fold=fold)(x, y) for fold in (True, False))
    assert (with_fold - without).abs().gt(1e-6).float().mean() < 0.01  # signs turn where gradients are all but zero


def test_successes_are_judged_by_the_model_as_it_is_written():
    """The folded model calls everything class 0; the model as written is never fooled."""

    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            out = self.norm(self.conv(x))
            folded = "forward" in vars(self.conv)
            return out.mean((2, 3)) * 1e-3 + torch.tensor([1.0, 0.0, 0.0] if folded else [0.0, 1.0, 0.0])

    model, x, y = unsettled(Edge()), torch.rand(4, 3, 5, 5), torch.ones(4, dtype=torch.int64)
    for early in (False, True):
        attack = APGD(model, eps=0.1, steps=4, early_stop=early)
        x_adv = attack(x, y)
        assert len(folding(model).pairs) == 1
        assert (model(x_adv).argmax(1) == 1).all()
        assert not torch.equal(x_adv, x)  # points of the highest loss
