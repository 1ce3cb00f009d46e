"""What BatchNorm does during an attack, against loops that set and restore everything by hand."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from literal_attacks import apgd, ce_at, mim, pgd, same_points
from torch import nn
from torch.utils.checkpoint import checkpoint

from afd import ops
from afd.attacks import APGD, FGSM, MIM, PGD
from afd.attacks.batchnorm import MODES
from afd.errors import InputError, ModelError

EPS, ALPHA = 0.1, 0.03
TRACKED = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Two BatchNorm layers, the second of which is called twice, dropout, and a counter of its own."""

    def __init__(self, **norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **norm)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **norm)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(4 * 36, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.double()
        for layer in (self.bn1, self.bn2):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            if layer.running_mean is not None:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)

    def forward(self, x):
        self.seen += 1
        h = self.bn1(self.conv1(x)).relu()
        h = h + self.bn2(self.conv2(h)).relu()
        h = h + self.bn2(self.conv2(h)).relu()
        return self.out(self.drop(h.flatten(1)))


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 5


def in_training():
    return Net().train()


def in_evaluation():
    return Net().eval()


def with_a_frozen_layer():
    model = Net().train()
    model.bn1.eval()
    return model


def without_running_statistics():
    return Net(track_running_stats=False).train()


def with_cumulative_statistics():
    return Net(momentum=None).train()


STATES = [in_training, in_evaluation, with_a_frozen_layer, without_running_statistics, with_cumulative_statistics]


def norms(model):
    """The layers that the mode is for."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [layer for layer in layers if layer.training or not any(one.training for one in model.modules())]


def find_statistics(model, x):
    """Mean and biased variance at each call of each layer on the clean batch, layer by layer, by the formula."""
    layers, found = norms(model), {}
    for layer in layers:
        found[layer] = []

        def note(layer, given):
            h = given[0].detach()
            mean = h.mean((0, 2, 3))
            found[layer].append((mean, (h - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))))

        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    for layer in layers:
        layer._forward_pre_hooks.clear()
    return found


def use_statistics(found):
    """Makes each layer's k-th call in a forward normalise by what was found at its k-th call."""
    for layer, statistics in found.items():
        turn = itertools.cycle(statistics)

        def forward(h, layer=layer, turn=turn):
            return F.batch_norm(h, *next(turn), layer.weight, layer.bias, False, 0.0, layer.eps)

        layer.forward = forward


class Literal:
    """A model in a mode, as a loop would have it: a copy, whose running statistics are those that ought to be."""

    def __init__(self, model, mode, x):
        self.model, self.mode = copy.deepcopy(model), mode
        layers = norms(self.model)
        self.model.eval()
        for layer in layers:
            layer.train(mode != "eval")
        if mode == "clean":
            before = self.buffers()
            use_statistics(find_statistics(self.model, x))
            self.model.load_state_dict(before, strict=False)

    def buffers(self):
        return {name: one.clone() for name, one in self.model.state_dict().items() if name.endswith(TRACKED)}

    def at(self, y):
        inner = ce_at(self.model)

        def at(x_adv):
            before = self.buffers()
            found = inner(x_adv, y)
            if self.mode == "batch":
                self.model.load_state_dict(before, strict=False)
            return found

        return at


def flags(model):
    return [one.training for one in model.modules()], [one.requires_grad for one in model.parameters()]


def same_buffers(model, expected):
    found = {name: one for name, one in model.state_dict().items() if name.endswith(TRACKED)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = value.dtype == torch.int64 or value.equal(untouched(name))
        torch.testing.assert_close(found[name], value, atol=0 if exact else 1e-12, rtol=0)  # layouts round differently


def untouched(name):
    return Net().state_dict().get(name, torch.zeros(0))


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_loop_that_sets_each_layer_by_hand(mode, state, caller):
    model, (x, y) = state(), batch()
    model.out.weight.requires_grad_(False)
    literal, before, start = Literal(model, mode, x), flags(model), ops.random_start(x, eps=EPS, seed=3)
    expected = pgd(literal.at(y), x, start, EPS, ALPHA, 4)
    with caller():
        found = PGD(model, eps=EPS, alpha=ALPHA, steps=4, batchnorm=mode, fold_batchnorm=False)(x, y, seed=3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not found.equal(x)
    same_buffers(model, literal.buffers())
    assert flags(model) == before
    assert model.seen == 0
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_the_modes_differ():
    x, y = batch()
    found = [PGD(Net().train(), eps=EPS, alpha=ALPHA, steps=4, batchnorm=mode)(x, y) for mode in MODES]
    assert all(not one.equal(other) for one, other in itertools.combinations(found[:2] + found[3:], 2))
    assert found[1].equal(found[2])  # what is updated does not matter where it is not used


@pytest.mark.parametrize("mode", MODES)
def test_momentum_attacks_and_single_steps_follow_it_too(mode):
    x, y = batch()
    model = Net().train()
    literal = Literal(model, mode, x)
    expected = mim(literal.at(y), x, x, EPS, ALPHA, 4)
    found = MIM(model, eps=EPS, alpha=ALPHA, steps=4, batchnorm=mode, fold_batchnorm=False)(x, y)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    same_buffers(model, literal.buffers())
    expected = pgd(literal.at(y), x, x, EPS, EPS, 1)
    torch.testing.assert_close(FGSM(model, eps=EPS, batchnorm=mode)(x, y), expected, atol=1e-12, rtol=0)
    same_buffers(model, literal.buffers())


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("mode", MODES[1:])
def test_auto_pgd_follows_it_too_and_stops_for_no_sample(mode, early_stop):
    x, y = batch(12)
    model = Net().train()
    literal = Literal(model, mode, x)
    before = literal.buffers()
    clean = literal.at(y)(x)[2]
    literal.model.load_state_dict(before, strict=False)  # a look at the images updates nothing
    start = ops.random_start(x, eps=EPS, seed=0)
    expected = apgd(literal.at(y), x, y, clean, start, EPS, 9)
    same_points(APGD(model, eps=EPS, steps=9, batchnorm=mode, early_stop=early_stop)(x, y), expected)
    same_buffers(model, literal.buffers())


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("attack", "forwards"),
    [
        (PGD.partial(steps=3), 3),
        (PGD.partial(steps=0), 0),
        (PGD.partial(steps=2, loss="kl"), 2),
        (PGD.partial(steps=2, precision="bf16"), 2),
        (APGD.partial(steps=3), 4),
        (APGD.partial(steps=3, precision="bf16", n_restarts=2), 8),
    ],
)
def test_only_the_forwards_at_the_attacks_own_points_update_statistics(attack, forwards, validate):
    model, (x, y) = Net().float().train(), batch(70)
    attack(model, batchnorm="train", validate=validate, chunk_size=20)(x.float(), y)
    assert model.bn1.num_batches_tracked == forwards
    assert model.bn2.num_batches_tracked == 2 * forwards


@pytest.mark.parametrize("mode", MODES)
def test_after_an_exception_all_is_as_the_loop_would_have_left_it(mode):
    model, (x, y), calls = Net().train(), batch(), []
    literal, before = Literal(model, mode, x), flags(model)
    pgd(literal.at(y), x, x, EPS, ALPHA, 2)  # the third step's forward fails before its first layer

    def fail(*_):
        calls.append(1)
        if len(calls) == 3 + (mode == "clean"):
            raise RuntimeError("broken layer")

    model.conv1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        PGD(model, eps=EPS, alpha=ALPHA, steps=5, random_start=False, batchnorm=mode)(x, y)
    same_buffers(model, literal.buffers())
    assert flags(model) == before
    assert all("forward" not in vars(layer) for layer in model.modules())
    again = Literal(model, mode, x)
    model.conv1._forward_pre_hooks.clear()
    expected = pgd(again.at(y), x, x, EPS, ALPHA, 2)
    found = PGD(model, eps=EPS, alpha=ALPHA, steps=2, random_start=False, batchnorm=mode, fold_batchnorm=False)(x, y)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_whole_batch_is_shown_layer_by_layer_whatever_is_said_of_chunks_and_folding(mode):
    model, (x, y), sizes = Net().train(), batch(90), []
    model.conv1.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    model.bn1.eval()
    attack = PGD(model, steps=2, chunk_size=16, fold_batchnorm=True, batchnorm=mode)
    attack(x, y)
    assert set(sizes) == {90}
    assert not attack._joining.pairs  # nor is the frozen layer joined


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_model_that_takes_no_channels_last_images_is_begun_with_anew(mode):
    class Views(Net):
        def forward(self, x):
            x = self.conv1(x.expand(-1, 1, -1, -1))
            h = self.bn1(x).relu()
            return self.out(h.view(len(h), -1))

    model, (x, y) = Views().train(), batch()
    literal = Literal(model, mode, x)
    expected = pgd(literal.at(y), x, x, EPS, ALPHA, 3)
    found = PGD(model, eps=EPS, alpha=ALPHA, steps=3, random_start=False, batchnorm=mode)(x, y)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    same_buffers(model, literal.buffers())


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_attacks_own_graphs_are_off(mode, tapes):
    attack, (x, y) = PGD(Net().train(), steps=2, batchnorm=mode), batch()
    for _ in range(3):
        attack(x, y)
    assert not tapes


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_of_the_whole_call_follows_it(mode, tapes, tape):
    model, (x, y) = Net().train(), batch()
    plain = copy.deepcopy(model)
    attack, by_hand = (
        PGD(one, eps=EPS, alpha=ALPHA, steps=2, batchnorm=mode, validate=False) for one in (model, plain)
    )
    attack.own_graphs = by_hand.own_graphs = False
    held = x.clone()
    recorded = tape.Tape()
    with recorded.capture():
        out = attack(held, y)
    for factor in (1.0, 0.5):
        held.copy_(x * factor)
        recorded.replay()
        torch.testing.assert_close(out, by_hand(x * factor, y), atol=1e-12, rtol=0)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-12, rtol=0)


class Checkpointed(nn.Module):
    """A layer whose forward is run again in the backward."""

    def __init__(self):
        super().__init__()
        self.inner = Net()
        self.inner.bn2 = nn.Identity()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_clean_statistics_serve_forwards_that_are_run_again():
    x, y = batch()
    model = Checkpointed().train()
    expected = PGD(model.inner, eps=EPS, steps=3, batchnorm="clean")(x, y)
    found = PGD(model, eps=EPS, steps=3, batchnorm="clean")(x, y)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_layer_that_is_called_more_often_than_at_the_images_is_named():
    class Deeper(Net):
        def forward(self, x):
            return super().forward(x) if self.seen < 2 else super().forward(x) + 0 * self.bn2(self.conv2(h4(x))).sum()

    def h4(x):
        return x.expand(-1, 4, -1, -1)

    with pytest.raises(ModelError, match=r"a BatchNorm2d is called more often .*, 2 times, so that batchnorm='clean'"):
        PGD(Deeper().train(), steps=3, batchnorm="clean")(*batch())


def test_layers_that_cannot_be_given_statistics_are_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SyncBatchNorm(2), nn.Flatten(), nn.Linear(32, 3)).double()
    with pytest.raises(InputError, match=r"has a SyncBatchNorm.*allowed are eval, train, batch"):
        PGD(model, batchnorm="clean")(*batch())
    scripted = torch.compile(Net().train(), backend="eager")
    with pytest.raises(InputError, match="batchnorm is 'clean' and the model is compiled"):
        PGD(scripted, batchnorm="clean")(*batch())


def test_low_precision_keeps_statistics_in_full():
    model, (x, y) = Net().float().train(), batch()
    kinds = []
    model.bn1.register_forward_pre_hook(lambda layer, given: kinds.append((given[0].dtype, layer.running_mean.dtype)))
    found = PGD(model, eps=EPS, alpha=ALPHA, steps=2, precision="bf16", batchnorm="clean")(x.float(), y)
    assert set(kinds) == {(torch.bfloat16, torch.float32)}
    full = PGD(Net().float().train(), eps=EPS, alpha=ALPHA, steps=2, batchnorm="clean")(x.float(), y)
    assert (found == full).float().mean() > 0.8


def test_a_forward_that_somebody_put_in_a_layers_place_stays_there():
    model, (x, y), calls = Net().train(), batch(), []
    own = model.bn1.forward

    def forward(h):
        calls.append(1)
        return own(h)

    model.bn1.forward = forward
    expected = PGD(Net().train(), eps=EPS, steps=2, batchnorm="clean")(x, y)
    assert PGD(model, eps=EPS, steps=2, batchnorm="clean")(x, y).equal(expected)
    assert model.bn1.forward is forward
    assert len(calls) == 3


def test_nothing_is_kept_of_a_call():
    model, (x, y) = Net().train(), batch()
    attack = PGD(model, steps=1, batchnorm="clean")
    attack(x, y)
    layer = weakref.ref(model.bn1)
    model.bn1 = nn.Identity()
    gc.collect()
    assert layer() is None
    copy.deepcopy(attack)(x, y)
