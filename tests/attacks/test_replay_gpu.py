"""Attacks as real CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from recorded_attacks import ATTACKS, eagerly, held, images, net
from torch import nn

from afd.attacks import APGD, PGD, CaptureWarning
from afd.errors import InputError


@pytest.fixture
def batch(cuda, monkeypatch):
    """Images and labels; convolutions give equal bits every time, for a step goes by the sign of the gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return images(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_replays_equal_the_eager_steps(name, batch, cuda):
    model = net(cuda)
    captured, plain = ATTACKS[name](model), ATTACKS[name](model)
    eagerly(plain)
    for seed in range(4):
        x, y = batch[0].roll(seed, 0), batch[1].roll(seed, 0)
        torch.testing.assert_close(captured(x, y, seed=seed), plain(x, y, seed=seed), atol=1e-5, rtol=0)
        assert torch.equal(captured.report.evaluations, plain.report.evaluations)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert not captured._graphs.cache.refused
    assert held(captured._graphs.cache)


@pytest.mark.gpu
def test_a_partial_batch_between_full_ones(batch, cuda):
    model = net(cuda)
    captured, plain = ATTACKS["pgd"](model), ATTACKS["pgd"](model)
    eagerly(plain)
    for rows in (8, 8, 3, 8, 3, 3, 8):
        x, y = batch[0][:rows], batch[1][:rows]
        torch.testing.assert_close(captured(x, y), plain(x, y), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_pieces_keep_to_their_own_radii_and_rows(batch, cuda):
    model, eps = net(cuda), torch.linspace(0, 0.2, 8).cuda()
    captured = PGD(model, eps=eps, steps=3, chunk_size=3)
    for _ in range(3):
        x_adv = captured(*batch)
        assert ((x_adv - batch[0]).flatten(1).abs().amax(1) <= eps + 1e-6).all()
        assert captured.report.evaluations.tolist() == [3] * 8


@pytest.mark.gpu
def test_restarts_on_the_samples_that_are_left_keep_to_their_own_radii(batch, cuda):
    attack = APGD(net(cuda), norm="L1", eps=torch.linspace(0, 2, 8).cuda(), steps=10, n_restarts=3, early_stop=True)
    for seed in range(3):
        x_adv = attack(*batch, seed=seed)
        assert ((x_adv - batch[0]).flatten(1).abs().sum(1) <= attack.eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.gpu
def test_a_label_that_the_model_lacks_is_named_though_the_attack_is_captured(batch, cuda):
    x, y = batch
    attack = PGD(net(cuda), eps=0.1, steps=2)
    for _ in range(3):
        attack(x, y)
    y[2] = 5
    with pytest.raises(InputError, match="y holds the label 5"):
        attack(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTACKS)
def test_no_wait_for_the_device_between_first_and_last_step(name, batch, cuda):
    model = net(cuda)
    attack = ATTACKS[name](model)
    attack.validate = False
    attack(*batch)  # libraries load
    plain = ATTACKS[name](model)
    plain.validate, plain._graphs.cache.refused = False, True
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_model_that_waits_cannot_be_captured_and_is_attacked_all_the_same(batch, cuda):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(cuda)

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.sum()) > 0 else 2.0)

    attack = PGD(Waits(), eps=0.1, steps=2)
    first = attack(*batch)
    with pytest.warns(CaptureWarning):
        second = attack(*batch)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(attack(*batch), first, atol=1e-5, rtol=0)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    other = PGD(net(cuda), eps=0.1, steps=2)
    assert torch.equal(other(*batch), other(*batch))
    assert not other._graphs.cache.refused
