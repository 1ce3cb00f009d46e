"""ResNet-50 for images of about 224 pixels, by the names of torchvision's state_dict."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from afd.nn.encoders import Encoder, activation_layer

BLOCKS = (3, 4, 6, 3)  # of each stage
EXPANSION = 4  # of a block's channels by its last convolution


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, and a shortcut (1x1 convolution where the shape changes).

    The stride is that of the 3x3 convolution, as in torchvision and in all training at large since ("v1.5"), and not of
    the first as in He et al. (2016).
    """

    def __init__(self, inputs: int, channels: int, stride: int, activation: str) -> None:
        super().__init__()
        outputs = EXPANSION * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = activation_layer(activation)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, 4 * channels, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        joined: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return joined


class ResNet50(Encoder):
    """The encoder of ResNet-50 (He et al. 2016, as torchvision has it): 7x7 stem, pooling, four stages of bottlenecks.

    Initialised as torchvision's: convolutions from N(0, 2 / (k² outputs)).

    Args:
        in_channels: channels of an image.
        width: filters of the stem, 64 in the paper, and everywhere else in proportion.
        activation: "relu", "silu" or "softplus"; see `afd.nn.encoders.activation_layer`.

    Raises:
        InputError: there is no such activation.
    """

    published_head = "fc"

    def __init__(self, in_channels: int = 3, width: int = 64, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = activation_layer(activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, inputs = [], width
        for stage, count in enumerate(BLOCKS):
            channels, blocks = width * 2**stage, []
            for number in range(count):
                blocks.append(Bottleneck(inputs, channels, 2 if stage and not number else 1, activation))
                inputs = EXPANSION * channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = inputs
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 32 * width] of images [N, in_channels, H, W]."""
        out = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)
