"""Encoders and the classifier that exposes its features."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.config import DataConfig, ModelConfig, TrainConfig
from afd.data import Images
from afd.data.datasets import NAMES
from afd.errors import InputError, InputTypeError
from afd.execution import Execution
from afd.methods.inputs import settle
from afd.nn import (
    ACTIVATIONS,
    MODELS,
    VGG,
    ConvNet,
    FeatureClassifier,
    PreActResNet,
    ResNet18,
    ResNet50,
    WideResNet,
    build_model,
)
from afd.presets import PRESETS

PUBLISHED = [name for name in MODELS if name not in ("convnet", "resnet18")]


@pytest.mark.parametrize(
    ("name", "shape", "width", "features"),
    [
        ("convnet", (1, 8, 8), 32, 128),
        ("convnet", (1, 28, 28), 8, 128),
        ("convnet", (3, 9, 13), 4, 128),
        ("resnet18", (1, 28, 28), 16, 128),
        ("resnet18", (3, 32, 32), 16, 128),
        ("resnet18", (5, 32, 32), 8, 64),
        ("resnet50", (1, 8, 8), 1, 32),
        ("resnet50", (3, 70, 64), 2, 64),
        ("preactresnet18", (1, 8, 8), 4, 32),
        ("preactresnet18", (1, 28, 28), 2, 16),
        ("preactresnet18", (3, 32, 32), 2, 16),
        ("wideresnet28-10", (1, 8, 8), 1, 40),
        ("wideresnet28-10", (3, 9, 13), 1, 40),
        ("wideresnet34-10", (3, 32, 32), 1, 40),
        ("vgg11-bn", (1, 8, 8), 4, 32),
        ("vgg13-bn", (1, 28, 28), 2, 16),
        ("vgg16-bn", (3, 32, 32), 2, 16),
        ("vgg19-bn", (3, 64, 20), 2, 16),
        ("vgg19-bn", (1, 1, 1), 2, 16),
    ],
)
def test_features_have_length_one_and_feed_the_classifier(name, shape, width, features):
    torch.manual_seed(0)
    model = build_model(name, shape, 7, width).eval()
    x = torch.rand(3, *shape)
    z = model.features(x)
    assert z.shape == (3, features)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model(x), z @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_173_962),  # ResNet-18 with a 3x3 stem and 10 classes
        ("resnet50", 23_528_522),
        ("preactresnet18", 11_172_170),
        ("wideresnet28-10", 36_479_194),
        ("wideresnet34-10", 46_160_474),
        ("vgg11-bn", 9_231_114),
        ("vgg13-bn", 9_416_010),
        ("vgg16-bn", 14_728_266),
        ("vgg19-bn", 20_040_522),
    ],
)
def test_networks_have_as_many_parameters_as_published(name, parameters):
    settled = TrainConfig(data=DataConfig("cifar10"), model=ModelConfig(name)).settled()
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10, settled.model.width)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_resnet50_has_the_parameters_of_torchvisions_and_its_names():
    with torch.device("meta"):
        model = build_model("resnet50", (3, 224, 224), 1000, 64)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    names = {name: list(one.shape) for name, one in model.encoder.named_parameters()}
    assert len(names) == 159
    assert names["conv1.weight"] == [64, 3, 7, 7]
    assert names["layer1.0.downsample.0.weight"] == [256, 64, 1, 1]
    assert names["layer4.2.conv2.weight"] == [512, 512, 3, 3]
    assert names["layer3.5.bn3.bias"] == [1024]
    assert model.encoder.layer2[0].conv2.stride == (2, 2)  # "v1.5"
    assert model.encoder.layer2[0].conv1.stride == (1, 1)


def test_resnet18_is_the_eighteen_layer_network_of_the_paper():
    model = build_model("resnet18", (3, 32, 32), 10, 64)
    weighted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len([m for m in weighted if getattr(m, "kernel_size", (0,)) != (1, 1)]) == 18


def test_resnet18_keeps_the_resolution_in_its_stem_and_halves_it_three_times():
    sizes = []
    encoder = ResNet18(3, 8)
    for module in (encoder.stem, encoder.stages):
        module.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[2:])))
    encoder(torch.rand(1, 3, 32, 32))
    assert sizes == [(32, 32), (4, 4)]


def test_convnet_has_no_batch_statistics():
    assert not list(ConvNet((1, 8, 8)).buffers())


# --- Each forward, written out ----------------------------------------------------------------------------------------

SMOOTH = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "softplus": lambda x: torch.log(1 + torch.exp(x)),
}


class Literal:
    """A network as functions of its state_dict, in evaluation mode."""

    def __init__(self, encoder, activation):
        self.state, self.act = encoder.state_dict(), SMOOTH[activation]

    def bn(self, name, x):
        mean, var, scale, shift = (
            self.state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[2] // 2)

    def convnet(self, x):
        x = self.act(self.conv("layers.0", x))
        x = self.act(self.conv("layers.2", x, 2))
        x = self.act(self.conv("layers.4", x, 2)).flatten(1)
        return self.act(x @ self.state["layers.7.weight"].T + self.state["layers.7.bias"])

    def resnet18(self, x):
        x = self.act(self.bn("bn", self.conv("stem", x)))
        for block in range(8):
            name, stride = f"stages.{block}", 2 if block in (2, 4, 6) else 1
            out = self.act(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride)))
            out = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", out))
            if stride == 2:
                x = self.bn(f"{name}.shortcut.1", self.conv(f"{name}.shortcut.0", x, 2))
            x = self.act(out + x)
        return x.mean((2, 3))

    def resnet50(self, x):
        x = self.act(self.bn("bn1", self.conv("conv1", x, 2)))
        x = F.pad(x, (1, 1, 1, 1), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
        for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
            for block in range(blocks):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                out = self.act(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x)))
                out = self.act(self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", out, stride)))
                out = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", out))
                if block == 0:
                    x = self.bn(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
                x = self.act(out + x)
        return x.mean((2, 3))

    def preactresnet18(self, x, final_norm=True):
        x = self.conv("conv1", x)
        for stage in (1, 2, 3, 4):
            for block in (0, 1):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                activated = self.act(self.bn(f"{name}.bn1", x))
                shortcut = x
                if f"{name}.shortcut.0.weight" in self.state:
                    shortcut = self.conv(f"{name}.shortcut.0", activated if final_norm else x, stride)
                out = self.conv(f"{name}.conv1", activated, stride)
                x = self.conv(f"{name}.conv2", self.act(self.bn(f"{name}.bn2", out))) + shortcut
        return (self.act(self.bn("bn", x)) if final_norm else x).mean((2, 3))

    def wideresnet(self, x, blocks):
        x = self.conv("conv1", x)
        for stage in (1, 2, 3):
            for block in range(blocks):
                name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
                activated = self.act(self.bn(f"{name}.bn1", x))
                out = self.conv(f"{name}.conv1", activated, stride)
                out = self.conv(f"{name}.conv2", self.act(self.bn(f"{name}.bn2", out)))
                x = out + (x if block else self.conv(f"{name}.convShortcut", activated, stride))
        return self.act(self.bn("bn1", x)).mean((2, 3))

    def vgg16(self, x):
        place = 0
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                x = self.act(self.bn(f"features.{place + 1}", self.conv(f"features.{place}", x)))
                place += 3
            n, c, height, width = x.shape
            if height > 1:
                x = x[:, :, : height // 2 * 2, : width // 2 * 2].reshape(n, c, height // 2, 2, width // 2, 2)
                x = x.amax((3, 5))
            place += 1
        return x.mean((2, 3))


def named(name, activation):
    return build_model(name, (3, 32, 32), 10, 1, activation).encoder


LITERAL = {
    "convnet": (lambda act: ConvNet((3, 32, 32), 4, 8, act), lambda net, x: net.convnet(x)),
    "resnet18": (lambda act: ResNet18(3, 4, act), lambda net, x: net.resnet18(x)),
    "resnet50": (lambda act: ResNet50(3, 4, activation=act), lambda net, x: net.resnet50(x)),
    "preactresnet18": (lambda act: PreActResNet(3, 4, activation=act), lambda net, x: net.preactresnet18(x)),
    "Wong et al.": (
        lambda act: PreActResNet(3, 4, activation=act, final_norm=False),
        lambda net, x: net.preactresnet18(x, final_norm=False),
    ),
    "WRN-16-3": (lambda act: WideResNet(3, 16, 3, 4, act), lambda net, x: net.wideresnet(x, 2)),
    "WRN-28-10": (lambda act: named("wideresnet28-10", act), lambda net, x: net.wideresnet(x, 4)),
    "WRN-34-10": (lambda act: named("wideresnet34-10", act), lambda net, x: net.wideresnet(x, 5)),
    "vgg16": (lambda act: VGG((3, 32, 32), 16, 4, act), lambda net, x: net.vgg16(x)),
    "vgg16 of 8x8": (lambda act: VGG((3, 8, 8), 16, 4, act), lambda net, x: net.vgg16(x)),
}  # fmt: skip


def stirred(model):
    """Statistics, scales and shifts as training leaves them."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.data.uniform_(0.5, 1.5).sub_(0 if tensor is layer.running_var else 0.8)
    return model


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LITERAL)
def test_a_forward_is_that_of_the_paper_written_out(name, activation):
    torch.manual_seed(0)
    make, forward = LITERAL[name]
    encoder = stirred(make(activation)).double().eval()
    x = torch.rand(2, 3, *((8, 8) if "8x8" in name else (32, 32)), dtype=torch.float64)
    with torch.no_grad():
        expected, found = forward(Literal(encoder, activation), x), encoder(x)
    assert expected.std() > 1e-6
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)  # torch's softplus ends at 20


@pytest.mark.parametrize("activation", ["silu", "softplus"])
@pytest.mark.parametrize("name", MODELS)
def test_a_smooth_network_has_no_relu_left_and_the_same_weights(name, activation):
    with torch.device("meta"):
        smooth, plain = (build_model(name, (3, 32, 32), 10, 2, one) for one in (activation, "relu"))
    assert not [layer for layer in smooth.modules() if isinstance(layer, nn.ReLU)]
    assert smooth.state_dict().keys() == plain.state_dict().keys()
    resnet = isinstance(smooth.encoder, ResNet18)
    assert all(block.activation is not F.relu for block in smooth.encoder.stages) if resnet else True


# --- Names and first weights ------------------------------------------------------------------------------------------


def layers(encoder):
    """The layers that have weights, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in encoder.state_dict()))


def test_the_layers_of_published_networks_have_their_published_names():
    """RobustBench's ``WideResNet`` and ``PreActResNet(PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True)``."""
    assert layers(WideResNet(depth=10, factor=2)) == [
        "conv1",
        "block1.layer.0.bn1", "block1.layer.0.conv1", "block1.layer.0.bn2", "block1.layer.0.conv2",
        "block1.layer.0.convShortcut",
        "block2.layer.0.bn1", "block2.layer.0.conv1", "block2.layer.0.bn2", "block2.layer.0.conv2",
        "block2.layer.0.convShortcut",
        "block3.layer.0.bn1", "block3.layer.0.conv1", "block3.layer.0.bn2", "block3.layer.0.conv2",
        "block3.layer.0.convShortcut",
        "bn1",
    ]  # fmt: skip
    preact = [
        "conv1",
        "layer1.0.bn1", "layer1.0.conv1", "layer1.0.bn2", "layer1.0.conv2",
        "layer1.1.bn1", "layer1.1.conv1", "layer1.1.bn2", "layer1.1.conv2",
        "layer2.0.bn1", "layer2.0.conv1", "layer2.0.bn2", "layer2.0.conv2", "layer2.0.shortcut.0",
        "layer2.1.bn1", "layer2.1.conv1", "layer2.1.bn2", "layer2.1.conv2",
        "layer3.0.bn1", "layer3.0.conv1", "layer3.0.bn2", "layer3.0.conv2", "layer3.0.shortcut.0",
        "layer3.1.bn1", "layer3.1.conv1", "layer3.1.bn2", "layer3.1.conv2",
        "layer4.0.bn1", "layer4.0.conv1", "layer4.0.bn2", "layer4.0.conv2", "layer4.0.shortcut.0",
        "layer4.1.bn1", "layer4.1.conv1", "layer4.1.bn2", "layer4.1.conv2",
        "bn",
    ]  # fmt: skip
    assert layers(PreActResNet(3, 2)) == preact
    assert layers(PreActResNet(3, 2, final_norm=False)) == preact[:-1]
    for shape in ((3, 32, 32), (1, 8, 8)):  # also where there is nothing left to pool
        assert layers(VGG(shape, 11, 2)) == [
            f"features.{place}" for place in (0, 1, 4, 5, 8, 9, 11, 12, 15, 16, 18, 19, 22, 23, 25, 26)
        ]


def test_a_wide_resnet_begins_as_its_authors_do():
    torch.manual_seed(0)
    model = build_model("wideresnet28-10", (3, 32, 32), 10, 4)
    for name, layer in model.encoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            outputs, _, height, width = layer.weight.shape
            assert layer.bias is None
            if layer.weight.numel() > 10_000:
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (outputs * height * width)), rel=0.02)
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight.min(), layer.weight.max(), layer.bias.abs().max()) == (1, 1, 0), name
    assert not model.classifier.bias.any()
    torch.manual_seed(0)
    again = build_model("wideresnet28-10", (3, 32, 32), 10, 4)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


# --- What is asked of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_of_ours_need_not_be_tried_before_it_is_trained(name):
    model = build_model(name, (1, 8, 8), 10, 1).double()
    tried = []
    model.register_forward_hook(lambda *_: tried.append(1))
    assert settle(model, Execution(), torch.rand(4, 1, 8, 8, dtype=torch.float64)) == 10
    assert not tried
    other = FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), 5, 10)
    other.register_forward_hook(lambda *_: tried.append(1))
    settle(other, Execution(), torch.rand(4, 1, 8, 8))
    assert tried


@pytest.mark.parametrize("data", NAMES)
def test_a_published_network_has_its_own_width_where_none_is_named(data):
    def width(name, told=None):
        given = {"data": {"name": data}, "model": {"name": name, "width": told}}
        return TrainConfig.from_json(given).settled().model.width

    assert {name: width(name) for name in MODELS} == {
        "convnet": PRESETS[data].width, "resnet18": PRESETS[data].width, "resnet50": 64, "preactresnet18": 64,
        "wideresnet28-10": 16, "wideresnet34-10": 16, "vgg11-bn": 64, "vgg13-bn": 64, "vgg16-bn": 64, "vgg19-bn": 64,
    }  # fmt: skip
    assert (width(None), width("vgg16-bn", 5)) == (PRESETS[data].width, 5)


def test_a_config_says_its_activation_where_it_is_not_the_one_that_all_had():
    plain, smooth = TrainConfig().settled(), TrainConfig(model=ModelConfig(activation="silu")).settled()
    assert "activation" not in plain.as_json()["model"]
    assert smooth.as_json()["model"]["activation"] == "silu"
    assert [TrainConfig.from_json(one.as_json()) for one in (plain, smooth)] == [plain, smooth]
    with pytest.raises(InputError, match=r"activation is 'tanh', a str; .* 'relu' or 'silu' or 'softplus'"):
        TrainConfig.from_json({"model": {"activation": "tanh"}})


def test_wrong_models_are_named():
    with pytest.raises(InputError, match="model is 'vgg'; allowed are convnet, resnet18, resnet50, preactres"):
        build_model("vgg", (1, 8, 8), 10, 8)
    with pytest.raises(InputError, match=r"image_shape is \(1, 3, 8\)"):
        build_model("convnet", (1, 3, 8), 10, 8)
    with pytest.raises(InputError, match="depth is 30; it must be 6 n \\+ 4, such as 28 or 34"):
        WideResNet(depth=30)
    with pytest.raises(InputError, match="depth is 4; it must be a finite number >= 10"):
        WideResNet(depth=4)
    with pytest.raises(InputError, match="depth is 12; allowed are 11, 13, 16, 19"):
        VGG((3, 32, 32), 12)
    for name in MODELS:
        with pytest.raises(InputError, match="activation is 'gelu'; allowed are relu, silu, softplus"):
            build_model(name, (3, 32, 32), 10, 2, "gelu")
        with pytest.raises(InputError, match="width is 0"):
            build_model(name, (3, 32, 32), 10, 0)
        with pytest.raises(InputTypeError, match=r"width is 1.5, a float; it must be a whole number"):
            build_model(name, (3, 32, 32), 10, 1.5)


def test_images_of_a_test_data_set_pass_through_every_network_in_training():
    torch.manual_seed(0)
    images = Images(torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4), 255.0, 10, "digits")
    for name in MODELS:
        model = build_model(name, images.shape, 10, 1, "softplus").train()
        model(images.images()).square().sum().backward()
        assert all(weight.grad is not None for weight in model.parameters()), name
