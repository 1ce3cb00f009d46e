"""Pieces, layout and precision: how an attack runs, never what it computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from afd.attacks import PGD, execution
from afd.errors import InputError
from afd.ops import backend


def net(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 5)
    ).eval()


@given(samples=st.integers(1, 500), piece=st.integers(1, 600))
def test_pieces_are_even_and_cover_every_row_once(samples, piece):
    x = torch.empty(samples, 1)
    rows = list(execution.pieces(nn.Identity(), x, piece))
    assert [i for part in rows for i in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in rows]
    assert max(sizes) <= piece
    assert len(sizes) == -(-samples // piece)
    assert max(sizes) - min(sizes) <= len(sizes)


def test_large_activations_make_small_pieces():
    x = torch.rand(1000, 3, 8, 8)
    model = net()
    per_sample = 4 * (8 * 64 + 8 * 64 + 8 * 64 + 512 + 5)
    expected = -(-1000 // (execution.ACTIVATION_BYTES // per_sample))
    assert len(list(execution.pieces(model, x))) == expected
    assert not any(module._forward_hooks for module in model.modules())
    assert len(list(execution.pieces(nn.Sequential(nn.Upsample(scale_factor=300)), x))) == -(
        -1000 // execution.LEAST_PIECE
    )


def test_activations_half_as_large_make_pieces_twice_as_large():
    x, model = torch.rand(50_000, 3, 8, 8), net()
    most = execution.ACTIVATION_BYTES // (8 * 64 + 8 * 64 + 8 * 64 + 512 + 5)
    for precision, size in (("fp32", 4), ("bf16", 2)):
        assert len(list(execution.pieces(model, x, precision=precision))) == -(-50_000 // (most // size))


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_pieces_do_not_change_the_result(piece):
    x, y = torch.rand(10, 3, 8, 8), torch.randint(5, (10,))
    eps = torch.linspace(0.01, 0.1, 10)
    whole = PGD(net(), eps=eps, alpha=eps / 4, steps=1, piece=10)(x, y)
    cut = PGD(net(), eps=eps, alpha=eps / 4, steps=1, piece=piece)(x, y)
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
        with execution.autocast("auto", torch.device("cpu")):
            assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == dtype


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="precision is 'fp8'; allowed are fp32, bf16, auto"):
        PGD(net(), precision="fp8")
    with pytest.raises(InputError, match="piece is 0"):
        PGD(net(), piece=0)


@pytest.mark.slow
def test_a_compiled_model_is_attacked_like_any_other():
    x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
    plain, compiled = (PGD(model, eps=0.1, steps=3)(x, y) for model in (net(), torch.compile(net())))
    assert (plain - compiled).abs().gt(1e-6).float().mean() < 0.01  # signs turn where gradients are all but zero
