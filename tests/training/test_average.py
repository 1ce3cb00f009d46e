"""The average of the weights: what is averaged, what is copied, and in which precision."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune

from afd.errors import InputError
from afd.methods import Natural
from afd.training import EpochReport, Trainer, load_checkpoint
from afd.training.schedules import averaged


class Everything(nn.Module):
    """Tensors of all kinds, one of them shared by two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.full((2,), 256.0, dtype=torch.float16))
        self.brain = nn.Parameter(torch.full((2,), 256.0, dtype=torch.bfloat16))
        self.register_buffer("index", torch.arange(300))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("statistics", torch.zeros(2))
        self.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))


def change(model):
    """New values in every tensor."""
    with torch.no_grad():
        model.first.weight.add_(1)
        model.wide.add_(1)
        model.narrow.add_(1)
        model.brain.add_(2)
        model.statistics.add_(1)
        model.phases.add_(1j)
        model.index.add_(1)
        model.mask.logical_not_()


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.996, 0.9999])
def test_floating_point_tensors_are_averaged_and_others_copied(decay):
    model = Everything()
    start = model.first.weight.detach().double()
    average = averaged(model, decay)
    average.update_parameters(model)
    change(model)
    average.update_parameters(model)
    own, moved = average.module, 1 - decay
    assert torch.equal(own.index, torch.arange(1, 301))
    assert own.mask.tolist() == [False, True]
    assert own.second.weight is own.first.weight
    torch.testing.assert_close(own.first.weight.double(), start + moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.wide, torch.full((2,), moved, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(own.statistics, torch.full((2,), moved))
    torch.testing.assert_close(own.phases, torch.full((2,), moved * 1j))
    dtypes = {name: tensor.dtype for name, tensor in own.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["narrow", "brain"])
def test_an_average_of_narrow_weights_goes_on_where_one_step_is_below_their_spacing(name):
    model = Everything()
    average = averaged(model, 0.99)
    average.update_parameters(model)
    change(model)
    moved = getattr(model, name).detach().float() - 256
    for _ in range(500):
        average.update_parameters(model)
    expected = 256 + moved * (1 - 0.99**500)
    torch.testing.assert_close(average.wide[name], expected, rtol=1e-5, atol=0)
    assert torch.equal(getattr(average.module, name), average.wide[name].to(getattr(model, name).dtype))
    assert (getattr(average.module, name) > 256).all()


def test_a_resumed_average_of_narrow_weights_is_the_uninterrupted_one(tmp_path):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x * self.scale.float())

    def train(folder, epochs, **settings):
        def stop(report):
            if report.epoch == epochs and isinstance(report, EpochReport):
                trainer.stop()

        torch.manual_seed(0)
        x, y = torch.rand(8, 4), torch.arange(8) % 2
        trainer = Trainer(
            Narrow(), Natural(), ema=0.9, epochs=4, schedule=lambda _: 1.0, folder=folder, callbacks=[stop], **settings
        )
        trainer.fit([(x, y)] * 3, [(x, y)])
        return load_checkpoint(folder / "last.pt")[0]["average"]

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "part", 2)
    resumed = train(tmp_path / "part", 4, resume="auto")
    assert torch.equal(whole["wide"]["model.scale"], resumed["wide"]["model.scale"])
    assert torch.equal(whole["weights"]["scale"], resumed["weights"]["scale"])


def test_the_counter_stays_on_the_cpu_whatever_the_default_device_is():
    model = Everything()
    with torch.device("meta"):
        assert averaged(model, 0.9).n_averaged.device.type == "cpu"


class Masked(nn.Module):
    """Holds infinities from the start, and others that come later; one of its buffers is expanded."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("late", torch.zeros(2))
        self.register_buffer("same", torch.ones(1).expand(3))
        self.frozen = nn.Parameter(torch.tensor([torch.inf, 1.0]), requires_grad=False)
        self.register_buffer("narrow", torch.zeros(2).to(torch.float8_e4m3fn))


def test_infinities_are_copied_into_the_average():
    model = Masked()
    average = averaged(model, 0.9)
    average.update_parameters(model)
    model.late = torch.tensor([torch.inf, 1.0])
    model.same = torch.full((1,), 2.0).expand(3)
    average.update_parameters(model)
    own = average.module
    assert torch.equal(own.mask, model.mask)
    assert torch.equal(own.frozen, model.frozen)
    torch.testing.assert_close(own.late, torch.tensor([torch.inf, 0.1]))
    torch.testing.assert_close(own.same, torch.full((3,), 1.1))
    model.late = torch.tensor([1.0, 1.0])
    average.update_parameters(model)
    torch.testing.assert_close(own.late, torch.tensor([1.0, 0.19]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change_head",
    [utils.weight_norm, utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)],
)
def test_a_weight_that_a_hook_computes_is_averaged_by_what_it_is_computed_from(change_head):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), change_head(nn.Linear(4, 2)))
    x, y = torch.rand(8, 4), torch.arange(8) % 2
    model(x)
    trainer = Trainer(model, Natural(lr=0.1), ema=0.0, epochs=2)
    trainer.fit([(x, y)] * 2, [(x, y)])
    torch.testing.assert_close(trainer.evaluated.eval()(x), model.eval()(x))
    assert model[2].weight.requires_grad


def test_a_model_that_cannot_be_copied_is_named_where_its_average_is_asked_for():
    model = nn.Linear(3, 2)
    model.kept = [model.weight * 2]
    with pytest.raises(InputError, match="ema averages a copy of the model, which cannot be copied: a tensor"):
        averaged(model, 0.9)
