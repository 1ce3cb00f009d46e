"""The encoders of afd's networks: all of a classifier but its last linear layer, whose inputs are the features."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from afd.errors import InputError, one_of, whole

Activation = Literal["relu", "silu", "softplus"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def activation_layer(name: str) -> nn.Module:
    """The nonlinearity of a network: ReLU, or one of two smooth ones.

    Softplus is log(1 + exp(x)), beta 1, as in the released code of Smooth Adversarial Training (Xie et al. 2020), whose
    other smooth functions include SiLU, x sigmoid(x), that of the best CIFAR networks since Gowal et al. (2020).

    Raises:
        InputError: unknown name.
    """
    one_of("activation", name, ACTIVATIONS)
    return nn.ReLU(inplace=True) if name == "relu" else nn.SiLU() if name == "silu" else nn.Softplus(beta=1.0)


class Encoder(nn.Module):
    """Base of afd's encoders: images [N, C, H, W] to raw features [N, num_features].

    Attributes:
        num_features: length of a feature vector.
        published_head: what the linear layer behind it is called in the network's published state_dicts; None where
            there are none.
    """

    num_features: int
    published_head: ClassVar[str | None] = None

    @classmethod
    def name_of(cls, published: str) -> str | None:
        """This encoder's name for a tensor of a published state_dict; None for one that takes no part in a pass."""
        return published


# --- The paper's ----------------------------------------------------------------------------------------------------


class ConvNet(Encoder):
    """Three 3x3 convolutions (two of them halving the image) and a linear layer, with an activation after each.

    Args:
        image_shape: (channels, height, width); height and width at least 4.
        width: filters of the first convolution; the others have twice as many.
        num_features: length of the feature vector.
        activation: "relu", "silu" or "softplus"; see `activation_layer`.

    Raises:
        InputError: the images are too small, or there is no such activation.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int = 32,
        num_features: int = 128,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, height, width_in = image_shape
        if min(height, width_in) < 4:
            raise InputError(f"image_shape is {image_shape}; height and width must be at least 4")
        cells = ((height + 3) // 4) * ((width_in + 3) // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            activation_layer(activation),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            activation_layer(activation),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            activation_layer(activation),
            nn.Flatten(),
            nn.Linear(2 * width * cells, num_features),
            activation_layer(activation),
        )
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, num_features]."""
        features: Tensor = self.layers(x)
        return features


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """That of `ResNet18`: for ReLU a function, so that what a checkpoint or a result notes of its modules stays so."""
    return F.relu if name == "relu" else activation_layer(name)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.activation = _activation(activation)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(Encoder):
    """The encoder of ResNet-18: stem, four stages of two blocks, global average pooling.

    The paper's networks are ``width=64`` (512 features) for colour images and ``width=16`` for MNIST. Four stages end
    in 8 * width features, 128 at width 16, where the paper counts 64.

    Args:
        in_channels: channels of an image.
        width: filters of the first stage, doubled in each later one.
        activation: "relu", "silu" or "softplus"; see `activation_layer`.

    Raises:
        InputError: there is no such activation.
    """

    published_head = "linear"

    def __init__(self, in_channels: int = 3, width: int = 64, activation: str = "relu") -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.activation = _activation(activation)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            first = BasicBlock(inputs, outputs, 1 if stage == 0 else 2, activation)
            stages += [first, BasicBlock(outputs, outputs, 1, activation)]
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 8 * width] of images [N, in_channels, H, W]."""
        out = self.stages(self.activation(self.bn(self.stem(x))))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)

    @classmethod
    def name_of(cls, published: str) -> str:
        """Published (RobustBench, and AFD's authors): conv1, bn1, layer3.1; here: stem, bn, stages.5."""
        name = re.sub(r"^conv1\.", "stem.", re.sub(r"^bn1\.", "bn.", published))
        return re.sub(r"^layer(?:s\.)?(\d)\.(\d)\.", lambda at: f"stages.{2 * (int(at[1]) - 1) + int(at[2])}.", name)


# --- Those of adversarial training at large, with the names of RobustBench's state_dicts ------------------------------


class PreActBlock(nn.Module):
    """BatchNorm and activation before each of two 3x3 convolutions, and a shortcut (1x1 where the shape changes).

    Args:
        inputs: channels.
        outputs: channels.
        stride: of the first convolution, and of the shortcut's.
        activation: see `activation_layer`.
        projects_input: whether the shortcut's convolution is shown the block's input instead of the activated one.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, projects_input: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.activation = activation_layer(activation)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
        self.projects_input = projects_input

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        activated = self.activation(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(x if self.projects_input else activated)
        out: Tensor = self.conv2(self.activation(self.bn2(self.conv1(activated)))) + x
        return out


class PreActResNet(Encoder):
    """The encoder of a pre-activation ResNet (He et al. 2016), by default of 18 layers, as Rice et al. (2020) train it.

    Initialised as PyTorch does by itself, like the authors'.

    Args:
        in_channels: channels of an image.
        width: filters of the first of four stages, doubled in each later one.
        blocks: of each stage.
        activation: "relu", "silu" or "softplus"; see `activation_layer`.
        final_norm: whether BatchNorm and activation come before the pooling, and shortcuts project what is activated.
            False: neither, as in Wong et al. (2020), RobustBench's ``PreActResNet(PreActBlock, ...)``; the names of
            the weights tell the two apart.

    Raises:
        InputError: there is no such activation.
    """

    published_head = "linear"

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        activation: str = "relu",
        *,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs, stage_blocks = width * 2**stage, []
            for number in range(count):
                stride = 2 if stage and not number else 1
                stage_blocks.append(PreActBlock(inputs, outputs, stride, activation, projects_input=not final_norm))
                inputs = outputs
            stages.append(nn.Sequential(*stage_blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(inputs) if final_norm else None
        self.activation = activation_layer(activation)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 8 * width] of images [N, in_channels, H, W]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = self.activation(self.bn(out))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)


class WideBlock(nn.Module):
    """BatchNorm and activation before each of two 3x3 convolutions, and a shortcut (1x1 where the channels change)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = activation_layer(activation)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = activation_layer(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        activated = self.relu1(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(activated)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated)))) + x
        return out


class WideResNet(Encoder):
    """The encoder of WRN-depth-factor (Zagoruyko & Komodakis 2016) without dropout, as TRADES and later work train it.

    Initialised as they do: convolutions from N(0, 2 / (k² outputs)), Kaiming's of the outputs; the linear layer behind
    has no bias at first (`afd.nn.build_model`).

    Args:
        in_channels: channels of an image.
        depth: 6 n + 4 layers, n blocks in each of three stages.
        factor: by which stages are wider than the first convolution.
        width: filters of the first convolution, 16 in the paper; the stages have factor * width times 1, 2 and 4.
        activation: "relu", "silu" or "softplus"; see `activation_layer`.

    Raises:
        InputTypeError: the depth is no whole number.
        InputError: there is no network of that depth, or no such activation.
    """

    published_head = "fc"

    def __init__(
        self, in_channels: int = 3, depth: int = 28, factor: int = 10, width: int = 16, activation: str = "relu"
    ) -> None:
        super().__init__()
        whole("depth", depth, 10)
        if depth % 6 != 4:
            raise InputError(f"depth is {depth}; it must be 6 n + 4, such as 28 or 34")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        stages, inputs = [], width
        for stage in range(3):
            outputs, blocks = factor * width * 2**stage, []
            for number in range(depth // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if stage and not number else 1, activation))
                inputs = outputs
            stages.append(nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = activation_layer(activation)
        self.num_features = inputs
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 4 * factor * width] of images [N, in_channels, H, W]."""
        out = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)

    @classmethod
    def name_of(cls, published: str) -> str | None:
        """As published; TRADES's code makes a stage ``sub_block1`` that its forward never calls."""
        return None if published.startswith("sub_block1.") else published


VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(Encoder):
    """The encoder of VGG with BatchNorm (Simonyan & Zisserman 2015) for CIFAR: no linear layers but the classifier.

    Five stages of 3x3 convolutions end in max-pooling by 2, each dimension for as long as it is larger than 1, and the
    last in average pooling, which does nothing to images of 32x32. Initialised as PyTorch does by itself.

    Args:
        image_shape: (channels, height, width).
        depth: 11, 13, 16 or 19.
        width: filters of the first stage, 64 in the paper; the others have 2, 4, 8 and 8 times as many.
        activation: "relu", "silu" or "softplus"; see `activation_layer`.

    Raises:
        InputError: there is no network of that depth, or no such activation.
    """

    published_head = "classifier"

    def __init__(
        self, image_shape: tuple[int, int, int], depth: int = 16, width: int = 64, activation: str = "relu"
    ) -> None:
        super().__init__()
        if depth not in VGG_STAGES:
            raise InputError(f"depth is {depth!r}; allowed are {', '.join(map(str, VGG_STAGES))}")
        inputs, *size = image_shape
        layers: list[nn.Module] = []
        for stage, convolutions in enumerate(VGG_STAGES[depth]):
            outputs = width * 2 ** min(stage, 3)
            for _ in range(convolutions):
                conv = nn.Conv2d(inputs, outputs, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(outputs), activation_layer(activation)]
                inputs = outputs
            by = [2 if length > 1 else 1 for length in size]
            size = [length // step for length, step in zip(size, by, strict=True)]
            layers.append(nn.MaxPool2d((by[0], by[1])) if max(by) > 1 else nn.Identity())  # which keeps others' names
        self.features = nn.Sequential(*layers)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, 8 * width] of images [N, C, H, W]."""
        return F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
