"""ResNet-50, ConvNeXt-T and ViT-S at 224 pixels: AT, TRADES and AFD, activations computed anew, in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afd.attacks import PGD
from afd.execution import Execution
from afd.methods.registry import made
from afd.nn import build_named
from afd.nn.recomputing import Recomputing

NETWORKS = {
    "resnet50": "ResNet-50 of afd's",
    "timm:convnext_tiny": "ConvNeXt-T",
    "timm:vit_small_patch16_224": "ViT-S",
}
X = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)
STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_of(name, drop_path=0.0):
    torch.manual_seed(0)
    return build_named(name, (3, 224, 224), 10, input_stats=STATS, drop_path=drop_path).train()


def two_steps(method, name, sparing, micro_batches=2, drop_path=0.0):
    model = model_of(name, drop_path)
    attack = {"eps": 4 / 255, "steps": 1, "alpha": 4 / 255}
    own = {"loss": "kl"} if method == "trades" else {}
    settings = {"name": method, "optimizer": "adamw", "lr": 1e-4, "micro_batches": micro_batches}
    step = made({**settings, "attack": {"name": "pgd", **attack, **own}}).build(
        model, Execution(checkpoint_activations=sparing)
    )
    torch.manual_seed(1)
    return [step(X, Y) for _ in range(2)], model


def check_close(some, others, **tolerances):
    for here, there in zip(some, others, strict=True):
        for name, loss in here.items():
            assert torch.isfinite(loss)
            torch.testing.assert_close(there[name], loss, **tolerances)


@pytest.mark.parametrize("method", ["at", "trades", "afd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_two_steps_are_the_same_with_activations_computed_anew(name, method):
    (plain, model), (sparing, other) = (two_steps(method, name, one) for one in (False, True))
    check_close(plain, sparing, rtol=1e-5, atol=1e-6)
    for key, one in model.state_dict().items():  # BatchNorm's statistics among them, which are renewed once
        torch.testing.assert_close(other.state_dict()[key], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm:convnext_tiny", "timm:vit_small_patch16_224"])
def test_without_batchnorm_micro_batches_are_the_whole_batch(name):
    (whole, _), (parts, _) = (two_steps("at", name, True, micro_batches=count) for count in (1, 2))
    check_close(whole, parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["timm:convnext_tiny", "timm:vit_small_patch16_224"])
def test_stochastic_depth_is_drawn_alike_where_activations_are_computed_anew(name):
    (plain, _), (sparing, _) = (two_steps("at", name, one, drop_path=0.5) for one in (False, True))
    check_close(plain, sparing, rtol=1e-5, atol=1e-6)


def bytes_kept(model, sparing):
    """What a training pass keeps for its backward."""
    seen, held = {one.untyped_storage().data_ptr() for one in model.parameters()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    passes = Execution(checkpoint_activations=sparing).passes(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = passes(X)
    return sum(one.untyped_storage().nbytes() for one in held)


@pytest.mark.parametrize(("name", "share"), [(name, 0.45 if name == "resnet50" else 0.2) for name in NETWORKS])
def test_less_memory_is_kept(name, share):
    model = model_of(name)
    assert bytes_kept(model, sparing=True) < share * bytes_kept(model, sparing=False)


def without_dropout(model):
    """What is left that draws is stochastic depth."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


@pytest.mark.parametrize(
    "name",
    ["timm:convnext_tiny", "timm:vit_small_patch16_224", "timm:swin_tiny_patch4_window7_224", "torchvision:swin_t",
     "torchvision:efficientnet_b0", "hf:convnext"],
)  # fmt: skip
def test_stochastic_depth_is_on_in_training_and_off_in_attacks(name):
    model, few = without_dropout(model_of(name, drop_path=0.5)), X[:2]
    passes = Execution().passes(model)
    with torch.no_grad():
        assert not torch.equal(passes(few)[1], passes(few)[1])
    attack = PGD(model, eps=4 / 255, steps=1, random_start=False)
    assert torch.equal(attack(few, Y[:2]), attack(few, Y[:2]))
    assert model.training
    still = without_dropout(model_of(name))
    with torch.no_grad():
        passes = Execution().passes(still)
        torch.testing.assert_close(passes(few)[1], passes(few)[1])


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("timm:resnet50", "Bottleneck", 16),
        ("timm:convnext_tiny", "ConvNeXtBlock", 18),
        ("timm:vit_small_patch16_224", "Block", 12),
        ("timm:swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12),
        ("timm:densenet121", "DenseLayer", 58),
        ("torchvision:resnet50", "Bottleneck", 16),
        ("torchvision:convnext_tiny", "CNBlock", 18),
        ("torchvision:efficientnet_b0", "MBConv", 16),
        ("torchvision:googlenet", "Inception", 9),
        ("hf:resnet", "ResNetBottleNeckLayer", 16),
        ("hf:vit", "ViTLayer", 12),
    ],
)
def test_the_blocks_are_those_that_each_library_calls_so(name, kind, count):
    with torch.device("cpu"):
        found = Recomputing(build_named(name, (3, 224, 224), 10).model).blocks
    assert sum(type(block).__name__ == kind for block in found) == count
