"""The projection discriminator against its formula, with singular values from an SVD, and against torch's layers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from afd.errors import InputError
from afd.nn import ProjectionDiscriminator


@pytest.fixture
def settled():
    """A discriminator whose power iterations have converged, with weights far from norm 1."""
    torch.manual_seed(0)
    net = ProjectionDiscriminator(6, 4, hidden=5).double()
    with torch.no_grad():
        for layer in (*net.layers, net.w, net.e):
            layer.weight.mul_(7)
        for _ in range(300):
            net(torch.rand(2, 6, dtype=torch.float64), torch.tensor([0, 1]))
    return net.eval()


def formula(net, z, y):
    def normalised(layer):
        weight = layer.weight
        return weight / torch.linalg.svdvals(weight)[0]

    h = z
    for layer in net.layers:
        h = F.leaky_relu(h @ normalised(layer).T + layer.bias, 0.2)
    score = h @ normalised(net.w)[0] + net.w.bias
    return score if y is None else score + (normalised(net.e)[y] * h).sum(1)


@pytest.mark.parametrize("labelled", [True, False])
def test_equals_its_formula(settled, labelled):
    z = torch.randn(9, 6, dtype=torch.float64)
    y = torch.randint(4, (9,)) if labelled else None
    torch.testing.assert_close(settled(z, y), formula(settled, z, y), rtol=1e-9, atol=1e-9)


def test_three_layers_counting_w_as_in_the_paper():
    net = ProjectionDiscriminator(512, 100)
    shapes = [tuple(layer.weight.shape) for layer in (*net.layers, net.w, net.e)]
    assert shapes == [(512, 512), (512, 512), (1, 512), (100, 512)]
    assert len(ProjectionDiscriminator(8, 2, depth=1).layers) == 0


def test_w_and_e_start_xavier_uniform():
    torch.manual_seed(0)
    net = ProjectionDiscriminator(64, 10, hidden=200)
    for layer, fan in ((net.w, 201), (net.e, 210)):
        weight, limit = layer.weight, (6 / fan) ** 0.5
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.9 * limit


def test_power_iterations_happen_in_training_mode_only():
    net = ProjectionDiscriminator(6, 4)
    z, y = torch.rand(3, 6), torch.tensor([0, 1, 2])
    before = [buffer.clone() for buffer in net.buffers()]
    net.eval()(z, y)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    net.train()(z, y)
    assert not all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def trained_alike(ours, theirs, steps, batch, lr):
    """Trains both on the same batches to tell two clouds apart; yields after each step."""
    generator = torch.Generator().manual_seed(3)
    dtype = ours.w.weight.dtype
    centres = torch.randn(2, ours.num_features, generator=generator, dtype=dtype)
    optimizers = [torch.optim.SGD(net.parameters(), lr, momentum=0.9) for net in (ours, theirs)]
    for _ in range(steps):
        y = torch.randint(ours.num_classes, (batch,), generator=generator)
        z = torch.randn(2 * batch, ours.num_features, generator=generator, dtype=dtype) + centres.repeat_interleave(
            batch, 0
        )
        losses = []
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            natural, attacked = net(z, y.repeat(2)).chunk(2)
            loss = F.softplus(-natural).mean() + F.softplus(attacked).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        yield losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_trains_like_torchs_layers(torchs, dtype, tolerance):
    torch.manual_seed(0)
    ours = ProjectionDiscriminator(6, 4, hidden=5).to(dtype)
    theirs = torchs.beside(ours, "parametrized")
    start = {key: value.clone() for key, value in ours.state_dict().items()}
    for losses in trained_alike(ours, theirs, 20, 8, 0.1):
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    for key, want in torchs.in_our_form(theirs).items():
        torch.testing.assert_close(ours.state_dict()[key], want, rtol=tolerance, atol=tolerance, msg=key)
        assert "bias" in key or (want - start[key]).abs().max() > (1e-3 if key not in ("w.u",) else -1), key


def test_stays_beside_torchs_layers_for_a_thousand_steps(torchs):
    torch.manual_seed(0)
    ours = ProjectionDiscriminator(64, 10)
    theirs = torchs.beside(ours, "parametrized")
    for _ in trained_alike(ours, theirs, 1000, 16, 0.01):
        pass
    state = ours.state_dict()
    for key, want in torchs.in_our_form(theirs).items():
        assert (state[key] - want).norm() <= 1e-3 * want.norm(), key


def test_natural_and_attacked_features_in_one_pass_take_one_iteration():
    """Two passes, as in the released code, take two: a different, and slower, algorithm."""
    torch.manual_seed(0)
    one = ProjectionDiscriminator(6, 4)
    with torch.no_grad():
        one.layers[0].weight.add_(torch.randn(6, 6))
    two = copy.deepcopy(one)
    z, z_adv, y = torch.rand(3, 6), torch.rand(3, 6), torch.tensor([0, 1, 2])
    one(torch.cat([z, z_adv]), y.repeat(2))
    two(z, y)
    torch.testing.assert_close(one.layers[0].u, two.layers[0].u)
    two(z_adv, y)
    assert (one.layers[0].u - two.layers[0].u).abs().max() > 1e-6


def test_an_earlier_forward_keeps_its_gradients_when_a_later_one_iterates(settled):
    """L_D first, then D in training mode again, then L_D's backward."""
    settled.train()
    with torch.no_grad():
        settled.layers[0].weight.add_(torch.randn(5, 6))
    other = copy.deepcopy(settled)
    z, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(4, (4,))
    late = settled(z, y).sum()
    settled(z, y)
    early = other(z, y).sum()
    for a, b in zip(
        *(torch.autograd.grad(s, list(n.parameters())) for s, n in ((late, settled), (early, other))), strict=True
    ):
        assert torch.equal(a, b)


def test_gradient_penalty_is_differentiable_twice(torchs):
    """Against torch's layers: the slope at z, and what its penalty asks of every weight."""
    torch.manual_seed(0)
    ours = ProjectionDiscriminator(6, 4, hidden=5).double()
    theirs = torchs.beside(ours, "parametrized")
    z = torch.randn(7, 6, dtype=torch.float64)
    results = []
    for net in (ours.eval(), theirs.eval()):
        at = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        (slope.norm(dim=1) - 1).square().mean().backward()
        layers = [*net.layers, net.w]
        weights = [layer.weight if net is ours else layer.parametrizations.weight.original for layer in layers]
        results.append([slope.detach(), *(weight.grad for weight in weights)])
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_bad_input_is_named(settled):
    z = torch.rand(3, 6, dtype=torch.float64)
    with pytest.raises(InputError, match=r"y holds 4; labels must be in \[0, 4\)"):
        settled(z, torch.tensor([0, 4, 1]))
    with pytest.raises(InputError, match="z is an empty batch"):
        settled(z[:0], torch.zeros(0, dtype=torch.int64))
    settled.layers[1].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the spectral norm of layers\.1\.weight is nan"):
        settled(z)


def test_wrong_shapes_are_named(settled):
    with pytest.raises(InputError, match=r"z has shape \[3, 5\]; it must be \[N, 6\]"):
        settled(torch.rand(3, 5, dtype=torch.float64))
    with pytest.raises(InputError, match=r"y has shape \[2\]; it must be \[3\]"):
        settled(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="depth is 0"):
        ProjectionDiscriminator(4, 2, depth=0)
