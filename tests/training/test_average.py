"""The average of the weights: what is averaged, what is copied, and in which precision."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from afd.checkpoint import CheckpointError
from afd.errors import InputError
from afd.methods import Natural
from afd.runtime import Group
from afd.training import EpochReport, Trainer, load_checkpoint
from afd.training.data import ResumableLoader
from afd.training.schedules import averaged
from afd.training.validation import recompute_statistics


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


@pytest.mark.parametrize("decay", [0.5, 0.9995])
def test_the_decay_grows_with_the_updates(decay):
    """By hand: of update t, min(d, (1 + t) / (10 + t)), from the weights that the model began with."""
    model = Everything()
    average = averaged(model, decay, warmup=True)
    expected, narrow = float(model.wide[0].detach()), float(model.narrow[0].detach())
    for update in range(30):
        change(model)
        average.update_parameters(model)
        now = min(decay, (1 + update) / (10 + update))
        expected = now * expected + (1 - now) * float(model.wide[0].detach())
        narrow = now * narrow + (1 - now) * float(model.narrow[0].detach())
        assert float(average.module.wide[0]) == pytest.approx(expected, abs=1e-12)
        assert float(average.wide["narrow"][0]) == pytest.approx(narrow, rel=1e-6)


def test_buffers_are_copied_where_that_is_asked_for():
    model = Everything()
    average = averaged(model, 0.9, buffers="copied")
    average.update_parameters(model)
    change(model)
    average.update_parameters(model)
    assert torch.equal(average.module.statistics, model.statistics)
    assert torch.equal(average.module.phases, model.phases)
    torch.testing.assert_close(average.module.wide, torch.full((2,), 0.1, dtype=torch.float64))


class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()) / 10, y


def with_batchnorm():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))


def noisy(workers=0):
    generator = torch.Generator().manual_seed(1)
    data = Noisy(torch.rand(22, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 2, torch.arange(22) % 3)
    return DataLoader(data, 8, shuffle=True, generator=generator, num_workers=workers, persistent_workers=workers > 0)


X, Y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 3


def recomputing(**settings):
    return Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, ema_buffers="recomputed", epochs=3, **settings)


def test_batchnorm_statistics_are_recomputed_as_torch_does_it_before_each_validation():
    torch.manual_seed(5)
    made, loader, seen = recomputing(), noisy(), []
    real = made._measure

    def measure(validation, attack, *more):
        model = copy.deepcopy(made.evaluated)
        before = torch.get_rng_state(), loader.generator.get_state()
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        update_bn(loader, model)
        torch.set_rng_state(before[0])
        loader.generator.set_state(before[1])
        ours, torchs = made.evaluated.state_dict(), model.state_dict()
        for name in torchs:
            torch.testing.assert_close(ours[name], torchs[name], rtol=0, atol=1e-6)
        seen.append(ours["model.1.running_mean"].clone())
        return real(validation, attack, *more)

    made._measure = measure
    made.fit(loader, [(X, Y)])
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    layers = [layer for layer in made.evaluated.modules() if hasattr(layer, "momentum")]
    assert [layer.momentum for layer in layers] == [0.3, 0.1]
    assert torch.equal(made.state_dict()["average"]["weights"]["1.running_mean"], seen[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_pass_for_statistics_changes_nothing_else(workers):
    """The weights of the model, and the batches to come, are those of a run whose buffers are averaged."""
    ends = []
    for buffers in ("recomputed", "averaged"):
        torch.manual_seed(5)
        made = Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, ema_buffers=buffers, epochs=2)
        made.fit(noisy(workers), [(X, Y)])
        ends.append(made)
    states = [made.network.state_dict() for made in ends]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())
    averages = [dict(made.evaluated.named_parameters()) for made in ends]
    assert all(torch.equal(one, averages[1][name]) for name, one in averages[0].items())


@pytest.mark.parametrize("stop_at", [2, 3, 5, 6])
def test_recomputed_statistics_are_those_of_a_run_that_was_not_interrupted(stop_at):
    torch.manual_seed(5)
    whole = recomputing()
    whole.fit(noisy(), [(X, Y)])
    torch.manual_seed(5)
    first = recomputing(log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == stop_at else None]
    first.fit(noisy(), [(X, Y)])
    torch.manual_seed(99)
    second = recomputing(log_every=1)
    second.load_state_dict(first.state_dict())
    second.fit(noisy(), [(X, Y)])
    ours, expected = second.average.state_dict(), whole.average.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in ours.items())


def test_several_processes_keep_the_mean_of_what_each_has_met():
    x = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    shares, means = [[(x[:8], Y[:8])], [(x[8:], Y[:8])]], []

    class Pair(Group):
        def mean(self, values):
            means[-1].append(values.clone())
            return (values + means[0].pop(0)) / 2 if len(means) == 2 else values

    for share in shares:
        means.append([])
        model = with_batchnorm().eval()
        recompute_statistics(model, ResumableLoader(share, torch.device("cpu"), 3, 1), Pair(size=2))
    plain = nn.Sequential(*list(with_batchnorm())[:1])
    both = [plain(part[0][0]).detach().transpose(0, 1).flatten(1) for part in shares]
    torch.testing.assert_close(model[1].running_mean, (both[0].mean(1) + both[1].mean(1)) / 2)
    torch.testing.assert_close(model[1].running_var, (both[0].var(1) + both[1].var(1)) / 2)
    assert not model[1].training


def test_a_checkpoint_of_before_means_an_average_without_warm_up():
    made = Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, epochs=1, ema_warmup=False)
    made.fit(noisy(), [(X, Y)])
    state = made.state_dict()
    for name in ("ema_warmup", "ema_buffers", "lr_warmup"):
        del state["metadata"]["run"][name]
    Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, epochs=1, ema_warmup=False).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"of another run: ema_warmup is False there and True here$"):
        Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, epochs=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="ema_buffers is averaged there and copied here; ema_warmup is False"):
        Trainer(with_batchnorm(), Natural(lr=0.1), ema=0.9, epochs=1, ema_buffers="copied").load_state_dict(state)


def test_settings_of_an_average_are_refused_where_there_is_none():
    with pytest.raises(InputError, match="ema_buffers is 'copied', but ema is None: there is no average that has them"):
        Trainer(with_batchnorm(), Natural(lr=0.1), epochs=1, ema_buffers="copied")
    made = Trainer(with_batchnorm(), Natural(lr=0.1), epochs=1, ema_warmup=False)
    Trainer(with_batchnorm(), Natural(lr=0.1), epochs=1).load_state_dict(made.state_dict())


def test_statistics_of_layers_that_are_frozen_are_not_recomputed():
    """Those of a model whose own train() leaves a BatchNorm in evaluation mode are its own, as trained with."""

    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    torch.manual_seed(5)
    model = Frozen(*with_batchnorm())
    model[1].running_mean.fill_(3.0)
    made = Trainer(model, Natural(lr=0.1), ema=0.9, ema_buffers="recomputed", epochs=1)
    before = model[6].running_mean.clone()
    made.fit(noisy(), [(X, Y)])
    kept = made.state_dict()["average"]["weights"]
    assert torch.equal(kept["1.running_mean"], torch.full((4,), 3.0))
    assert not torch.equal(kept["6.running_mean"], before)


def test_another_kind_of_buffers_is_refused():
    with pytest.raises(InputError, match="ema_buffers is 'mine'; allowed are averaged, copied, recomputed"):
        Trainer(with_batchnorm(), Natural(), ema=0.9, ema_buffers="mine")
