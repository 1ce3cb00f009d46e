"""Activation checkpointing: the same losses, weights and statistics, out of fewer tensors that are kept."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from afd.errors import InputError
from afd.execution import Execution
from afd.methods import METHODS
from afd.methods.registry import made
from afd.nn import Normalized, build_model, split
from afd.nn.recomputing import Recomputing

SHAPE = (3, 16, 16)
X = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.arange(8) % 10


class Block(nn.Module):
    """A residual branch with BatchNorm, a ReLU in place and dropout."""

    def __init__(self, width):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.drop = nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.second(self.drop(self.norm(self.first(x)).relu_()))


class Stage(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Dropping(nn.Module):
    """Two stages of three blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stages = nn.Sequential(Stage(4), Stage(4))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


NETWORKS = {
    "dropping": lambda: split(Dropping()),
    "normalised": lambda: split(Normalized(Dropping(), 0.4, 0.2)),
    "resnet18": lambda: build_model("resnet18", SHAPE, 10, 2, "softplus"),
    "resnet50": lambda: build_model("resnet50", SHAPE, 10, 2, "softplus"),
    "preactresnet18": lambda: build_model("preactresnet18", SHAPE, 10, 2, "softplus"),
    "wideresnet28-10": lambda: build_model("wideresnet28-10", SHAPE, 10, 1, "softplus"),
    "vgg11-bn": lambda: build_model("vgg11-bn", SHAPE, 10, 2, "softplus"),
}


def trained(method, network, sparing, steps=2, **settings):
    torch.manual_seed(0)
    model = NETWORKS[network]().double().train()
    step = made({"name": method, **settings}).build(model, Execution(checkpoint_activations=sparing))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of second derivatives
        losses = [step(X, Y, index=torch.arange(8)) for _ in range(steps)]
    return losses, model.state_dict()


def check_same(method, network, **settings):
    (losses, state), (sparing, other) = (trained(method, network, one, **settings) for one in (False, True))
    for here, there in zip(losses, sparing, strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here), (here, there)
    assert [name for name, one in state.items() if not torch.equal(one, other[name])] == []


@pytest.mark.parametrize("network", NETWORKS)
def test_losses_weights_and_running_statistics_are_the_same_in_every_network(network):
    check_same("at", network)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("llr", "at")])
def test_and_with_every_method(method):
    """Running statistics among them, which a batch enters once; and dropout, which draws the same again."""
    check_same(method, "dropping")


@pytest.mark.parametrize("method", ["trades", "afd"])
def test_and_in_micro_batches(method):
    check_same(method, "dropping", micro_batches=2)


def test_a_method_whose_passes_go_another_way_in_their_backward_says_so():
    with pytest.raises(InputError, match="as those of LLR do, by the clean batch's statistics; go without"):
        trained("llr", "resnet18", sparing=True)


def kept(model, x, sparing):
    """Bytes that a forward keeps for its backward, parameters not counted."""
    seen, held = {one.untyped_storage().data_ptr() for one in model.parameters()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    passes = Execution(checkpoint_activations=sparing).passes(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = passes(x)
    assert output[1].requires_grad
    return sum(one.untyped_storage().nbytes() for one in held)


@pytest.mark.parametrize("network", NETWORKS)
def test_less_is_kept(network):
    torch.manual_seed(0)
    model = NETWORKS[network]().double().train()
    assert kept(model, X, sparing=True) < 0.6 * kept(model, X, sparing=False)


def test_blocks_are_found_where_networks_have_them():
    def found(name):
        return [type(block).__name__ for block in Recomputing(NETWORKS[name]()).blocks]

    assert found("normalised") == ["Block"] * 6  # not the two stages
    assert found("resnet18") == ["BasicBlock"] * 8
    assert found("resnet50") == ["Bottleneck"] * 16
    assert found("wideresnet28-10") == ["WideBlock"] * 12
    assert len(Recomputing(NETWORKS["vgg11-bn"]()).rows) == 1

    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = Block(3), Block(3), nn.Linear(3, 10)

    alike = Alike()
    assert Recomputing(alike).blocks == [alike.one, alike.two]


def test_a_network_without_blocks_is_told():
    with pytest.raises(InputError, match="the model is a Sequential without blocks of several layers"):
        Execution(checkpoint_activations=True).passes(split(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))))


@pytest.mark.parametrize("other", ["compile", "graph"])
def test_what_is_neither_compiled_nor_captured_is_refused(other):
    with pytest.raises(InputError, match=f"checkpoint_activations and {other} are both set; choose one"):
        Execution(checkpoint_activations=True, **{other: True})


def test_forwards_are_the_networks_own_again_after_a_pass():
    model = NETWORKS["dropping"]()
    passes = Execution(checkpoint_activations=True).passes(model)
    passes(X.float())
    assert not any("forward" in vars(module) for module in model.modules())

    def fails(_x):
        raise KeyError("here")

    model.model.stages[1].blocks[2].forward = fails
    with pytest.raises(KeyError, match="here"):
        passes(X.float())
    assert [name for name, one in model.named_modules() if "forward" in vars(one)] == ["model.stages.1.blocks.2"]


def test_a_pass_without_gradients_is_as_it_was():
    model = NETWORKS["dropping"]().eval()
    passes = Execution(checkpoint_activations=True).passes(model)
    with torch.no_grad():
        assert torch.equal(passes(X.float())[1], Execution().passes(model)(X.float())[1])
