"""Encoders and the classifier that exposes its features."""

import pytest
import torch

from afd.errors import InputError
from afd.nn import ConvNet, ResNet18, build_model


@pytest.mark.parametrize(
    ("name", "shape", "width", "features"),
    [
        ("convnet", (1, 8, 8), 32, 128),
        ("convnet", (1, 28, 28), 8, 128),
        ("convnet", (3, 9, 13), 4, 128),
        ("resnet18", (1, 28, 28), 16, 128),
        ("resnet18", (3, 32, 32), 16, 128),
        ("resnet18", (5, 32, 32), 8, 64),
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


def test_resnet18_is_the_eighteen_layer_network_of_the_paper():
    model = build_model("resnet18", (3, 32, 32), 10, 64)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # ResNet-18 with a 3x3 stem and 10 classes
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


def test_wrong_models_are_named():
    with pytest.raises(InputError, match="model is 'vgg'; allowed are convnet, resnet18"):
        build_model("vgg", (1, 8, 8), 10, 8)
    with pytest.raises(InputError, match=r"image_shape is \(1, 3, 8\)"):
        build_model("convnet", (1, 3, 8), 10, 8)
