"""Small networks of the families that join BatchNorm to convolutions, with statistics as training leaves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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


FAMILIES = {"resnet": (resnet, 20), "wide_resnet": (wide_resnet, 4), "vgg": (vgg, 5), "densenet": (densenet, 4)}
