"""Pieces, layout and precision: how an attack runs, never what it computes."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from afd import execution
from afd.attacks import APGD, FGSM, MIM, PGD, engine
from afd.attacks.losses import loss_named
from afd.errors import InputError
from afd.ops import backend


def net(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 5)
    ).eval()


@given(samples=st.integers(1, 500), chunk_size=st.integers(1, 600))
def test_chunks_are_even_and_cover_every_row_once(samples, chunk_size):
    x = torch.empty(samples, 1)
    rows = list(execution.AttackExecution(chunk_size=chunk_size).chunks(nn.Identity(), x))
    assert [i for part in rows for i in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in rows]
    assert max(sizes) <= chunk_size
    assert len(sizes) == -(-samples // chunk_size)
    assert max(sizes) - min(sizes) <= len(sizes)


def test_large_activations_make_small_pieces():
    x = torch.rand(1000, 3, 8, 8)
    model = net()
    per_sample = 4 * (8 * 64 + 8 * 64 + 8 * 64 + 512 + 5)
    expected = -(-1000 // (execution.ACTIVATION_BYTES // per_sample))
    assert len(list(execution.AttackExecution().chunks(model, x))) == expected
    assert not any(module._forward_hooks for module in model.modules())
    assert len(list(execution.AttackExecution().chunks(nn.Sequential(nn.Upsample(scale_factor=300)), x))) == -(
        -1000 // execution.LEAST_CHUNK
    )


@pytest.mark.parametrize(("scale", "rows"), [(25, 256), (40, 109), (80, 64)])
def test_beyond_the_caches_rows_share_the_cost_of_a_call_while_memory_lasts(scale, rows):
    """An image becomes 0.46, 1.2 and 4.7 MiB: 256 of the first fit MOST_BYTES, 109 of the second."""
    model = nn.Sequential(nn.Upsample(scale_factor=scale))
    chunks = list(execution.AttackExecution().chunks(model, torch.rand(1280, 3, 8, 8)))
    assert len(chunks) == -(-1280 // rows)


def test_activations_half_as_large_make_pieces_twice_as_large():
    x, model = torch.rand(50_000, 3, 8, 8), net()
    most = execution.ACTIVATION_BYTES // (8 * 64 + 8 * 64 + 8 * 64 + 512 + 5)
    for precision, size in (("fp32", 4), ("bf16", 2)):
        assert len(list(execution.AttackExecution(precision).chunks(model, x))) == -(-50_000 // (most // size))


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_do_not_change_the_result(chunk_size):
    x, y = torch.rand(10, 3, 8, 8), torch.randint(5, (10,))
    eps = torch.linspace(0.01, 0.1, 10)
    whole = PGD(net(), eps=eps, alpha=eps / 4, steps=1, chunk_size=10)(x, y)
    cut = PGD(net(), eps=eps, alpha=eps / 4, steps=1, chunk_size=chunk_size)(x, y)
    assert (whole - cut).abs().gt(1e-6).float().mean() < 0.001  # a sign may turn where a gradient is all but zero


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_see_channels_last_images_and_the_caller_gets_its_own_layout(channels):
    strides = []
    model = net(channels)
    model[0].register_forward_hook(lambda _, inputs, __: strides.append(inputs[0].stride()))
    x = torch.rand(4, channels, 8, 8)
    x_adv = PGD(model, steps=2)(x, torch.zeros(4, dtype=torch.int64))
    assert strides == [(64 * channels, 1, 8 * channels, channels)] * 2
    assert x_adv.stride() == x.stride()


def test_low_precision_is_for_the_model_only():
    dtypes = []
    model = net()
    model[2].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
    x_adv = PGD(model, eps=0.1, steps=3, precision="bf16")(x, y)
    assert dtypes == [torch.bfloat16] * 3
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    full = PGD(model, eps=0.1, steps=3)(x, y)
    assert (x_adv == full).float().mean() > 0.8


def test_auto_precision_follows_the_device(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(backend, "fast_bf16", lambda _device, fast=fast: fast)
        with execution.Passes("auto").autocast(torch.device("cpu")):
            assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == dtype


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="precision is 'fp8'; allowed are fp32, bf16, auto"):
        PGD(net(), precision="fp8")
    with pytest.raises(InputError, match="chunk_size is 0; it must be an integer >= 1"):
        PGD(net(), chunk_size=0)


@pytest.mark.slow
def test_a_compiled_model_is_attacked_like_any_other():
    x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
    plain, compiled = (PGD(model, eps=0.1, steps=3)(x, y) for model in (net(), torch.compile(net())))
    assert (plain - compiled).abs().gt(1e-6).float().mean() < 0.01  # signs turn where gradients are all but zero


EVERY_ATTACK = [
    lambda model, **running: PGD(model, eps=0.1, alpha=0.03, steps=3, **running),
    lambda model, **running: PGD(model, norm="L2", eps=torch.full((4,), 0.5), alpha=0.2, steps=3, **running),
    lambda model, **running: FGSM(model, eps=0.1, **running),
    lambda model, **running: MIM(model, eps=0.1, steps=3, **running),
    lambda model, **running: APGD(model, eps=0.1, steps=5, n_restarts=2, **running),
    lambda model, **running: APGD(model, norm="L1", eps=2.0, steps=5, loss="dlr", **running),
    lambda model, **running: APGD(model, eps=0.1, steps=5, early_stop=True, **running),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attack", EVERY_ATTACK)
def test_inference_mode_gives_the_same_points_and_leaves_nothing_behind(attack, precision):
    """Made inside of it too: images, labels and the attack itself; what it remembers of the model serves later."""
    model, joined = net(), nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    model = nn.Sequential(joined, net(8)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        x, y = torch.rand(4, 3, 8, 8, generator=generator), torch.arange(4)
        assert x.is_inference()
        inside = attack(model, precision=precision)(x, y)
    outside = attack(model, precision=precision)(x.clone(), y.clone())
    assert torch.equal(inside, outside)
    assert not inside.is_inference()
    inside.mul_(2)
    assert not torch.equal(inside, outside)


def test_a_model_made_in_inference_mode_is_named():
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(InputError, match=r"made in torch\.inference_mode; make, load .* \(here: 1\.weight, 1\.bias"):
        PGD(model)(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))


class Counted(TorchDispatchMode):
    """The ops that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def ops_of_a_step(look):
    model, x, y = net(), torch.rand(4, 3, 8, 8), torch.arange(4)
    names = []
    for steps in (2, 3):
        with Counted() as counted:
            PGD(model, eps=0.1, steps=steps, validate=look)(x, y)
        names.append(counted.names)
    return list((Counter(names[1]) - Counter(names[0])).elements())


def test_a_step_that_nobody_looks_at_runs_the_model_and_the_step_and_nothing_else():
    """On a GPU each op is a launch."""
    quiet, looked = ops_of_a_step(look=False), ops_of_a_step(look=True)
    model, x, y = net(), torch.rand(4, 3, 8, 8), torch.arange(4)
    with engine.evaluating(model), Counted() as counted:
        engine.loss_gradient(model, loss_named("ce").value, execution.channels_last(x), y)
    assert set(Counter(quiet) - Counter(counted.names)) == {"afd::pgd_step_"}
    assert "aten::linalg_vector_norm" in looked
    assert len(looked) >= len(quiet) + 8


def test_a_norm_with_an_activation_of_its_own_is_not_exchanged_for_one_without():
    class WithReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(1, 2, 3), WithReLU(2))
    with pytest.raises(InputError, match="the model has a WithReLU, which torch does not synchronise"):
        execution.Execution(sync_batchnorm=True).prepare(model)
