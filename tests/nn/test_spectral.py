"""SpectralLinear, SpectralEmbedding and SpectralGroup: modes, state, gradients, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.nn import SpectralEmbedding, SpectralGroup, SpectralLinear


class Critic(nn.Module):
    """Two layers and a table that share one group, as a user would write it."""

    def __init__(self, n_iter=1):
        super().__init__()
        self.layers = nn.ModuleList([SpectralLinear(5, 6, negative_slope=0.2), SpectralLinear(6, 1, bias=False)])
        self.table = SpectralEmbedding(4, 5)
        named = [("first", self.layers[0]), ("last", self.layers[1]), ("table", self.table)]
        self.spectra = SpectralGroup(named, n_iter)

    def forward(self, y):
        first, last, table = self.spectra()
        return self.layers[1](self.layers[0](self.table(y, table), first), last)


@pytest.fixture
def critic():
    torch.manual_seed(0)
    return Critic()


def normalised(layer):
    return layer.weight / torch.linalg.svdvals(layer.weight)[0]


def test_layers_equal_their_formulas(critic):
    for _ in range(300):
        critic(torch.tensor([0]))
    y, (first, last) = torch.tensor([[3, 0], [1, 1]]), critic.eval().layers
    want = (
        F.leaky_relu(F.linear(normalised(critic.table)[y[0]], normalised(first), first.bias), 0.2) @ normalised(last).T
    )
    torch.testing.assert_close(critic(y[0]), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(critic.table.eval()(y), normalised(critic.table)[y], rtol=1e-4, atol=1e-5)


def test_a_layer_alone_runs_its_own_iteration_in_training_mode_only():
    layer = SpectralLinear(5, 6)
    layer.weight.data += torch.randn(6, 5)
    before = layer.u.clone(), layer.v.clone()
    layer.eval()(torch.rand(2, 5))
    assert torch.equal(layer.u, before[0])
    layer.train()(torch.rand(2, 5))
    (want,) = ops.spectral_norm([layer.weight.detach()], [before[0]], [before[1]])
    assert torch.equal(layer.u, want.u)
    assert torch.equal(layer.v, want.v)
    still = SpectralLinear(5, 6, n_iter=0)
    before = still.u.clone()
    still(torch.rand(2, 5))
    assert torch.equal(still.u, before)


@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_a_group_takes_n_iter_iterations_of_every_layer(n_iter):
    critic = Critic(n_iter)
    layers = [critic.layers[0], critic.layers[1], critic.table]
    for layer in layers:
        layer.weight.data += torch.randn_like(layer.weight)
    us, vs = [layer.u.clone() for layer in layers], [layer.v.clone() for layer in layers]
    want = ops.spectral_norm([layer.weight.detach() for layer in layers], us, vs, n_iter=n_iter)
    got = critic.spectra()
    for layer, a, b in zip(layers, got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(layer.u, b.u)
        assert torch.equal(layer.v, b.v)


def test_state_is_plain_weights_u_and_v_and_the_group_has_none(critic):
    keys = ["layers.0.bias", "layers.0.weight", "layers.0.u", "layers.0.v"]
    keys += ["layers.1.weight", "layers.1.u", "layers.1.v", "table.weight", "table.u", "table.v"]
    assert list(critic.state_dict()) == keys
    assert len(list(critic.parameters())) == 4


def test_state_stays_where_it_is_and_spectra_are_apart_from_it(critic):
    """Memory that DistributedDataParallel or a CUDA graph knows must stay the state's; a backward's must not be it."""
    places = [buffer.data_ptr() for buffer in critic.buffers()]
    for mode in (True, False):
        spectra = critic.train(mode).spectra()
        assert [buffer.data_ptr() for buffer in critic.buffers()] == places
        assert not set(places) & {t.data_ptr() for spectrum in spectra for t in spectrum}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_a_group_of_their_own_layers(critic, copied):
    other = copied(critic)
    y = torch.tensor([1, 2])
    assert torch.equal(critic.eval()(y), other.eval()(y))
    other.layers[0].weight.data.mul_(-1)
    before = critic.layers[0].u.clone()
    other.train()(y)
    assert torch.equal(critic.layers[0].u, before)
    assert not torch.equal(critic(y), other.eval()(y))


def test_moving_to_another_dtype_moves_the_group(critic):
    assert critic.double()(torch.tensor([1])).dtype == torch.float64


def test_settle_fits_new_weights():
    layer = SpectralLinear(30, 40)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 30) + torch.outer(torch.randn(40), torch.randn(30)))
    layer.settle()
    sigma = layer.eval().spectrum().sigma.item()
    assert sigma == pytest.approx(torch.linalg.svdvals(layer.weight)[0].item(), rel=1e-3)


@pytest.mark.parametrize("modes", [(True, True), (False, True), (True, False)])
def test_two_forwards_then_two_backwards(critic, modes):
    """As in D(real) - D(fake) of the released code; an evaluation forward may come first, too."""
    critic.double()
    single = copy.deepcopy(critic)
    y, y_other = torch.tensor([0, 1, 2]), torch.tensor([3, 3])
    outs = [critic.train(mode)(labels) for mode, labels in zip(modes, (y, y_other), strict=True)]
    late = [torch.autograd.grad(out.sum(), list(critic.parameters()), allow_unused=True) for out in outs]
    for mode, labels, gradients in zip(modes, (y, y_other), late, strict=True):
        out = single.train(mode)(labels)
        now = torch.autograd.grad(out.sum(), list(single.parameters()), allow_unused=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, now, strict=True))


def test_gradcheck_of_an_embedding():
    table = SpectralEmbedding(4, 5).double().eval()
    with torch.no_grad():
        table.weight.add_(torch.randn(4, 5))

    def rows(weight):
        return torch.func.functional_call(table, {"weight": weight}, (torch.tensor([0, 3, 3]),))

    assert torch.autograd.gradcheck(rows, table.weight.detach().clone().requires_grad_())


def test_errors_name_the_layer(critic):
    critic.layers[1].weight.data[0, 2] = float("nan")
    before = [buffer.clone() for buffer in critic.buffers()]
    with pytest.raises(InputError, match=r"the spectral norm of last\.weight is nan"):
        critic(torch.tensor([0]))
    assert all(torch.equal(a, b) for a, b in zip(before, critic.buffers(), strict=True))
    critic.layers[1].double()
    with pytest.raises(InputTypeError, match=r"last\.weight is torch\.float64; it must have first\.weight's dtype"):
        critic(torch.tensor([0]))


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="n_iter is -1"):
        SpectralLinear(3, 4, n_iter=-1)
    with pytest.raises(InputError, match="n_iter is -1"):
        SpectralGroup([], n_iter=-1)
    with pytest.raises(InputError, match="negative_slope is 0"):
        SpectralLinear(3, 4, negative_slope=0)(torch.rand(2, 3))


def test_forward_compiles(critic):
    torch.compiler.reset()
    y = torch.tensor([1, 2])
    other = copy.deepcopy(critic)
    got = torch.compile(critic, backend="aot_eager")(y)
    torch.testing.assert_close(got, other(y))
    for a, b in zip(critic.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
