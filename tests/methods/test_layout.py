"""Which tensors are laid out channels-last, and which models are not."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from afd import execution
from afd.methods import AFD, Execution, Natural
from afd.nn import build_model, split


def test_four_dimensions_are_laid_out_and_others_are_left():
    model = nn.ModuleDict({"flat": nn.Conv2d(2, 4, 3), "deep": nn.Conv3d(2, 4, 3), "line": nn.Conv1d(2, 4, 3)})
    model.bank = nn.Parameter(torch.randn(2, 4, 2, 3, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Execution().prepare(model)
    assert model["flat"].weight.is_contiguous(memory_format=torch.channels_last)
    for weight in (model["deep"].weight, model["line"].weight, model.bank):
        assert weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", [AFD(lr=0.01), AFD.adam(), AFD(lr=0.01, schedule="alternating"), Natural(lr=0.01)])
def test_a_network_of_volumes_is_trained(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4))
    network, x = Execution().prepare(split(model)), torch.rand(4, 3, 4, 8, 8)
    before = model[0].weight.detach().clone()
    losses = method.build(network)(x, torch.arange(4), x_adv=(x + 0.1).clamp(0, 1))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not torch.equal(before, model[0].weight)


def strided(channels, kernel=1, stride=2, groups=1):
    return nn.Sequential(nn.Conv2d(channels, 8, kernel, stride=stride, groups=groups), nn.Flatten(), nn.LazyLinear(4))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_models_that_would_crash_the_process_are_not_laid_out(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu, register = torch.device("cpu"), {"AVX2": 8, "AVX512": 16}[capability]
    assert execution.unsafe_channels_last(strided(3), cpu)
    assert execution.unsafe_channels_last(strided(register - 1, stride=(1, 3)), cpu)
    for safe in (strided(1), strided(register), strided(3, kernel=3), strided(3, stride=1), strided(4, groups=2)):
        assert not execution.unsafe_channels_last(safe, cpu)
    assert not execution.unsafe_channels_last(strided(3), torch.device("cuda"))
    x = torch.rand(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert execution.channels_last(x, strided(3)).is_contiguous()
    assert execution.channels_last(x.contiguous(), strided(16)).is_contiguous(memory_format=torch.channels_last)
    model = strided(3)
    model(x)
    Execution().prepare(model)
    assert model[0].weight.is_contiguous()


def test_built_in_networks_of_usual_widths_are_laid_out():
    for name, shape, width in (("convnet", (3, 8, 8), 4), ("resnet18", (3, 8, 8), 16), ("resnet18", (3, 8, 8), 64)):
        model = Execution().prepare(build_model(name, shape, 4, width))
        assert not execution.unsafe_channels_last(model, torch.device("cpu"))
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_strided_convolution_of_few_channels_trains_to_the_end():
    """In a process of its own, which it would take along."""
    code = """
        import torch
        from torch import nn
        from afd.methods import Execution, Natural
        from afd.nn import split
        torch.manual_seed(0)
        torch.set_num_threads(1)
        for channels in (2, 3, 7):
            stem = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 32, 1, stride=2))
            model = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
            x = torch.rand(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
            step = Natural(lr=0.01).build(Execution().prepare(split(model)))
            for _ in range(3):
                step(x, torch.arange(8) % 4, x_adv=x)
        kept = [torch.rand(1000) for _ in range(50)]  # a damaged heap shows when it is used
        print("to the end")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert ran.stdout == "to the end\n", (ran.returncode, ran.stderr)
