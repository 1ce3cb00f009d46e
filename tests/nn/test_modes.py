"""Evaluation mode for other people's models: by their own train(), one thread at a time, given back as they were."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization

from afd.errors import InputError, InputTypeError
from afd.nn.modes import eager, evaluating, local


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def flags(model):
    return [module.training for module in model.modules()], [one.requires_grad for one in model.parameters()]


def mixed():
    """Some layers in training mode, some not; some weights frozen."""
    model = network().train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    return model


def outer_alone():
    model = network().eval()
    model.training = True
    return model


@pytest.mark.parametrize("build", [network, mixed, outer_alone, lambda: network().eval()])
def test_flags_are_put_back_also_when_the_body_raises(build):
    model = build()
    before = flags(model)
    with evaluating(model):
        assert flags(model) == ([False] * 5, [False] * 6)
    assert flags(model) == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert flags(model) == before


def test_buffers_of_modules_that_are_kept_stay_as_the_body_leaves_them():
    model = network()
    model.register_buffer("count", torch.zeros(()))
    with evaluating(model, keep=[model[1]]):
        model[1].running_mean.fill_(7)
        model.count.fill_(7)
    assert (model[1].running_mean == 7).all()
    assert model.count == 0


class Adapter(nn.Linear):
    """Adds its factors to its weight in evaluation mode, and takes them out in training mode."""

    def __init__(self):
        super().__init__(4, 3)
        self.factors, self.merged, self.told = nn.Parameter(torch.randn(3, 4)), False, []

    def train(self, mode=True):
        self.told.append(mode)
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.factors * (-1 if mode else 1)
            self.merged = not mode
        return self


def test_modes_are_set_by_the_modules_own_train():
    model = nn.Sequential(Adapter(), nn.ReLU())
    weight = model[0].weight.detach().clone()
    with evaluating(model):
        assert model[0].merged
        torch.testing.assert_close(model[0].weight, weight + model[0].factors)
    assert not model[0].merged
    torch.testing.assert_close(model[0].weight.detach(), weight)
    assert model[0].told == [False, True]


def test_a_model_in_evaluation_mode_is_told_nothing():
    model = nn.Sequential(Adapter()).eval()
    weight, model[0].told[:] = model[0].weight.detach().clone(), []
    with evaluating(model), evaluating(model):
        pass
    assert model[0].told == []
    assert torch.equal(model[0].weight, weight)


class KeepsNormFixed(nn.Sequential):
    """Its BatchNorm never trains, as in fine-tuning, whatever it is told."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("norm_training", [False, True])
def test_a_train_of_its_own_mind_is_respected_and_the_flags_found_are_kept(norm_training):
    model = KeepsNormFixed(*network()).train()
    model[1].training = norm_training
    before = flags(model)
    with evaluating(model):
        pass
    assert flags(model) == before


class Observes(nn.Module):
    """Writes to its buffers in every forward, and puts another in the place of one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.full((2,), -0.0))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.count += 1
        self.largest.copy_(torch.maximum(self.largest, x.detach().amax(0)))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.seen |= True
        return x


def test_buffers_that_a_forward_writes_to_are_put_back():
    model = Observes().eval()
    before = {name: (one, one.clone()) for name, one in model.named_buffers()}
    with evaluating(model):
        model(torch.rand(4, 2))
        assert model.count == 1
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, values) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer, values), name
    assert torch.signbit(model.largest).all()  # -0 is not 0


def test_what_cannot_be_put_into_evaluation_mode_is_named():
    exported = torch.export.export(network().eval(), (torch.rand(2, 1, 4, 4),)).module()
    with (
        pytest.raises(
            InputError, match=r"model is a GraphModule.* cannot leave it .*pass the module that it was made from"
        ),
        evaluating(exported),
    ):
        pass
    with (
        pytest.raises(InputTypeError, match=r"model is a method; it must be a torch\.nn\.Module"),
        evaluating(network().forward),
    ):
        pass


def test_the_module_inside_of_parallel_wrappers():
    inner = network()
    assert local(nn.DataParallel(nn.DataParallel(inner))) is inner
    assert local(inner) is inner
    assert eager(inner)
    compiled = network()
    compiled.compile(backend="eager")
    for wrapped in (nn.DataParallel(inner), torch.jit.script(inner), torch.compile(inner, backend="eager"), compiled):
        assert not eager(wrapped)
        assert not eager(nn.Sequential(wrapped))


# --- Threads --------------------------------------------------------------------------------------------------------


def meets(first, second):
    """Whether a thread gets `second` while this one holds `first`."""
    entered = threading.Event()

    def work():
        with evaluating(second):
            entered.set()

    thread = threading.Thread(target=work)
    with evaluating(first):
        thread.start()
        met = entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()
    return met


def test_models_that_share_a_module_exclude_each_other_and_others_do_not():
    inner = network()
    assert not meets(inner, inner)
    assert not meets(nn.Sequential(inner), nn.Sequential(nn.Identity(), inner))
    assert not meets(nn.Sequential(inner), inner[3])
    assert meets(inner, network())


def test_the_same_thread_may_ask_again():
    inner = network()
    with evaluating(inner), evaluating(nn.Sequential(inner)), evaluating(inner[3]):
        assert not inner.training
    assert inner.training
    assert not meets(inner, inner)  # given back once, not three times


def test_two_threads_that_need_two_models_each_do_not_wait_in_a_ring():
    left, right, done = network(), network(), []

    def work(model):
        for _ in range(200):
            with evaluating(model):
                done.append(1)

    threads = [threading.Thread(target=work, args=(nn.ModuleList(pair),)) for pair in ((left, right), (right, left))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 400
    assert left.training
    assert right.training


def test_a_module_that_equals_others_is_itself():
    """A module may define equality of its own."""

    class Alike(nn.Linear):
        def __hash__(self):
            return 0

        def __eq__(self, other):
            return isinstance(other, nn.Linear)

    assert meets(Alike(2, 3), Alike(2, 3))


# --- Models that write past torch's counters, forks, lazy layers ----------------------------------------------------


class Uncounted(nn.Module):
    """Writes to its buffers in ways that torch does not count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("grown", torch.ones(2))
        self.register_buffer("shared", torch.ones(1).expand(4))  # which nothing may write to

    def forward(self, x):
        self.mean.data.mul_(2)
        self.grown.data = torch.zeros(5)
        return x


def test_what_torch_does_not_count_as_a_write_is_put_back_and_graphs_stay_valid():
    model = Uncounted()
    buffers = dict(model.named_buffers())
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * model.mean).sum()  # autograd keeps the buffer
    with evaluating(model):
        model(torch.zeros(1))
    assert dict(model.named_buffers()) == buffers
    assert [buffer.tolist() for buffer in buffers.values()] == [[1.0] * 3, [1.0] * 2, [1.0] * 4]
    loss.backward()
    assert weight.grad.tolist() == [1.0] * 3


def test_ranges_of_a_fused_observer_are_put_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 3), quantization.DeQuantStub())
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        model = quantization.prepare_qat(model.train())
    model(torch.rand(5, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model):
        model(10 * torch.rand(5, 4))
    assert {name: value.equal(before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not():
    model, held, done = network(), threading.Event(), threading.Event()

    def hold():
        with evaluating(model):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if not child:
        signal.alarm(5)  # ends a child that waits
        with evaluating(model):
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


def test_a_lazy_layer_without_weights_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy layers are a feature under development
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with (
        pytest.raises(InputError, match=r"Sequential with a LazyLinear, which has no weights.*run it once"),
        evaluating(model),
    ):
        pass
    model(torch.zeros(1, 4))
    with evaluating(model):
        assert not model[1].weight.requires_grad
