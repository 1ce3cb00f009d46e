"""What the tests of joining share: small networks of the families that are joined, and all ways to run a model."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks.engine import evaluating, loss_gradient
from afd.attacks.joined import Kernel
from afd.attacks.joining import Joining
from afd.attacks.losses import cross_entropy
from afd.nn import build_model


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


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each convolution (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(out))))


def wide_resnet():
    torch.manual_seed(0)
    blocks = [WideBlock(4, 8, 1), WideBlock(8, 8, 1), WideBlock(8, 16, 2), WideBlock(16, 16, 1)]
    return unsettled(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), *blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(16, 10),
        )
    )  # fmt: skip


def vgg():
    torch.manual_seed(0)
    layers, inputs = [], 3
    for width in (4, 4, "pool", 8, 8, "pool", 16):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
    return unsettled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)))


class DenseLayer(nn.Module):
    """A bottleneck whose output is put beside its input (Huang et al. 2017)."""

    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, out], 1)


def densenet():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    between = [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2)]
    end = [nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return unsettled(nn.Sequential(*stem, DenseLayer(8, 4), DenseLayer(12, 4), *between, DenseLayer(8, 4), *end))


def ours(name, width, activation="relu"):
    torch.manual_seed(0)
    return unsettled(build_model(name, (3, 16, 16), 10, width, activation))


FAMILIES = {"resnet": (resnet, 20), "wide_resnet": (wide_resnet, 4), "vgg": (vgg, 5), "densenet": (densenet, 4)}
FAMILIES |= {  # of afd's own, BatchNorms behind a convolution: one a block, or all
    "preactresnet18": (partial(ours, "preactresnet18", 4), 8),
    "wideresnet28-10": (partial(ours, "wideresnet28-10", 1), 12),
    "vgg16-bn": (partial(ours, "vgg16-bn", 4), 13),
    "resnet18, silu": (partial(ours, "resnet18", 4, "silu"), 20),
    "wideresnet28-10, softplus": (partial(ours, "wideresnet28-10", 1, "softplus"), 12),
}


# --- Kernels that stand in for cuDNN's on a CPU

pointwise = torch.ops.mkldnn._convolution_pointwise


def _of(geometry):
    stride, padding, dilation, groups = geometry
    return padding, stride, dilation, groups


TWIN = Kernel(  # in any dtype
    lambda x, w, b, at: F.conv2d(x, w, b, *at).relu_(),
    lambda x, w, b, at, other: F.conv2d(x, w, b, *at).add_(other).relu_(),
    lambda x, _: x.dim() == 4,
)
ONEDNN = Kernel(  # one launch each, as cuDNN's
    lambda x, w, b, at: pointwise(x, w, b, *_of(at), "relu", [], None),
    lambda x, w, b, at, other: pointwise.binary(x, other, w, b, *_of(at), "add", 1.0, "relu", [], None),
    lambda x, _: x.dim() == 4 and x.dtype != torch.float64,
)


# --- A forward joined and as it is written


def gradient(model, x, joining=None):
    """Logits and gradient of an evaluating model, joined or as it is written."""
    with evaluating(model), nullcontext() if joining is None else joining.joined(model):
        grad, _, logits = loss_gradient(model, cross_entropy, x, torch.arange(len(x)) % 3)
    return logits, grad


def assert_computes_the_same(model, x, pairs, joining=None):
    """Joined and not, up to the rounding of float64; returns the joining."""
    joining = joining or Joining()
    written = gradient(model, x)
    for _ in range(2):
        torch.testing.assert_close(gradient(model, x, joining), written, atol=1e-10, rtol=1e-10)
    assert len(joining.pairs) == pairs
    return joining


class Pair(nn.Module):
    """A convolution and two BatchNorms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.use_other = False
        unsettled(self).double()

    def forward(self, x):
        norm = self.other if self.use_other else self.norm
        return self.finish(norm(self.conv(x)))

    def finish(self, out):
        return out.relu().mean((2, 3))


def images():
    return torch.rand(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
