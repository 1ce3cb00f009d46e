"""The projection discriminator against its formula, with singular values from an SVD."""

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


def test_wrong_shapes_are_named(settled):
    with pytest.raises(InputError, match=r"z has shape \[3, 5\]; it must be \[N, 6\]"):
        settled(torch.rand(3, 5, dtype=torch.float64))
    with pytest.raises(InputError, match=r"y has shape \[2\]; it must be \[3\]"):
        settled(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="depth is 0"):
        ProjectionDiscriminator(4, 2, depth=0)
