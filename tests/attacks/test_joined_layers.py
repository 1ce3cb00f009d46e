"""What a convolution does beside BatchNorm: sums, ReLU, pooling first, few channels, and the weights it is given."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from joined_networks import FAMILIES, ONEDNN, TWIN, Pair, assert_computes_the_same, gradient, images, unsettled
from launches import launches_of
from torch import nn
from torch.overrides import TorchFunctionMode

from afd.attacks import PGD, joined
from afd.attacks.engine import evaluating
from afd.attacks.joined import CUDNN, KERNELS, Geometry, JoinedConv, input_gradient, passes_nan
from afd.attacks.joining import Joining
from afd.bench.attacks import lenet
from afd.bench.metering import peak_bytes
from afd.errors import ModelError
from afd.nn import build_model
from afd.nn.encoders import ResNet18

CPU = torch.device("cpu")


@pytest.fixture
def twin(monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", TWIN)


@pytest.fixture
def found(monkeypatch):
    """A pair for each joined convolution that ran: whether it did a sum, and a ReLU."""
    calls, own = [], JoinedConv.apply

    def apply(*args):
        calls.append((args[1] is not None, args[5] is not None))
        return own(*args)

    monkeypatch.setattr(JoinedConv, "apply", apply)
    return calls


def assert_joins(model, x, relus, sums, found):
    """The same function and gradient, in float64, by so many joined convolutions."""
    with torch.no_grad():
        model(x)
    written = gradient(model, x)
    found.clear()
    torch.testing.assert_close(gradient(model, x, Joining()), written, atol=1e-10, rtol=1e-10)
    assert (sum(relu for _, relu in found), sum(other for other, _ in found)) == (relus, sums)


# --- Which layers are joined ----------------------------------------------------------------------------------------

RELUS = {  # of all convolutions those with a ReLU behind them, and of these those with a shortcut before it
    "resnet": (17, 8), "wide_resnet": (4, 0), "vgg": (5, 0), "densenet": (4, 0), "preactresnet18": (8, 0),
    "wideresnet28-10": (12, 0), "vgg16-bn": (13, 0), "resnet18, silu": (0, 0), "wideresnet28-10, softplus": (0, 0),
}  # fmt: skip


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_networks_join_their_relus_and_shortcuts(family, found):
    build, _ = FAMILIES[family]
    assert_joins(build().double(), torch.rand(4, 3, 16, 16, dtype=torch.float64), *RELUS[family], found)


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, inputs=4, outputs=4, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out  # noqa: RET504


class FunctionalBlock(Block):
    """One of functions, whose shortcut comes first."""

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return torch.relu(shortcut + out)


class ShortcutLast(Block):
    """One whose shortcut may have nothing to do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shortcut = nn.Sequential() if self.downsample is None else self.downsample

    def forward(self, x):
        out = nn.functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = nn.functional.relu(out)
        return out  # noqa: RET504


class LeftAlone(Block):
    """Blocks of which only the first ReLU can be joined."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.ends(self.bn2(self.conv2(out)), x)


class KeepsTheSum(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out) + out


class AddsANumber(Block):
    def forward(self, x):
        shift = 0.5
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shift
        return F.relu(out)


class AddsOneValueAChannel(Block):
    def forward(self, x):
        gate = x.mean((2, 3), keepdim=True)
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + gate)


class WritesToTheShortcut(Block):
    def forward(self, x):
        kept = x * 1.0
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        kept.mul_(2.0)
        out += kept
        return F.relu(out)


class AddsTheOutputOfAMethod(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.gated(x))

    def gated(self, x):
        return x.sigmoid()


class SumIsScaled(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu((self.bn2(self.conv2(out)) + x) * 0.5)


class LeakyBehind(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return F.leaky_relu(self.bn2(self.conv2(out)) + x)


BLOCKS = {  # ReLUs and sums joined, without and with a shortcut that computes something
    Block: ((2, 1), (1, 0)), FunctionalBlock: ((2, 1), (2, 1)), ShortcutLast: ((2, 1), (1, 0)),
    KeepsTheSum: ((1, 0), None), AddsANumber: ((1, 0), (1, 0)), AddsOneValueAChannel: ((1, 0), None),
    WritesToTheShortcut: ((1, 0), None), AddsTheOutputOfAMethod: ((1, 0), None), SumIsScaled: ((1, 0), None),
    LeakyBehind: ((1, 0), None),
}  # fmt: skip


def classifier(block):
    return unsettled(nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())).double()


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_whatever_a_block_does_is_what_is_computed(kind, found):
    x = torch.rand(3, 4, 7, 7, dtype=torch.float64)
    plain, downsampled = BLOCKS[kind]
    assert_joins(classifier(kind()), x, *plain, found)
    if downsampled is not None and kind is not AddsANumber:
        assert_joins(classifier(kind(4, 6, 2)), x, *downsampled, found)


@pytest.mark.usefixtures("twin")
def test_a_shortcut_of_another_dtype_is_left_alone(found):
    class Mixed(Block):
        def forward(self, x):
            wide, x = x.double(), x
            out = self.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(out)) + wide)

    model, x = classifier(Mixed()).float(), torch.rand(3, 4, 7, 7)
    written = gradient(model, x)
    found.clear()
    torch.testing.assert_close(gradient(model, x, Joining()), written, atol=1e-5, rtol=1e-5)
    assert found == [(False, True)]


@pytest.mark.usefixtures("twin")
def test_a_relu_alone_counts_as_an_approximation_too():
    model, joining = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), Joining()
    attack = PGD(model, steps=2, eps=0.1, precision="fp32")
    assert not joining.approximates
    assert not attack._approximates
    gradient(model, torch.rand(2, 3, 8, 8), joining)
    attack(torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert not joining.pairs
    assert joining.approximates
    assert attack._approximates


def test_weights_are_frozen_only_as_parameters():
    conv = nn.Conv2d(1, 32, 3).requires_grad_(False)
    assert joined.frozen(conv)
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight
    assert not joined.frozen(conv)


# --- Others who look on ---------------------------------------------------------------------------------------------


def chain():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    return unsettled(nn.Sequential(*layers)).double()


def seen_by_hooks(model, x, joining):
    seen = []
    hooks = [layer.register_forward_hook(lambda _, xs, y: seen.extend([xs[0].detach(), y.detach()])) for layer in model]
    gradient(model, x, joining)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kernel", [None, TWIN])
def test_hooks_see_what_they_would_see_without_us(kernel, monkeypatch):
    if kernel:
        monkeypatch.setitem(KERNELS, "cpu", kernel)
    model, x = chain(), torch.rand(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(seen_by_hooks(model, x, Joining()), seen_by_hooks(model, x, None))


@pytest.mark.parametrize("kernel", [None, TWIN])
@pytest.mark.parametrize("layer", [2, 3])
def test_a_layer_with_a_hook_or_another_forward_does_its_own_work(kernel, layer, monkeypatch):
    if kernel:
        monkeypatch.setitem(KERNELS, "cpu", kernel)
    model, x, seen = chain(), torch.rand(2, 3, 7, 7, dtype=torch.float64), []
    joining = assert_computes_the_same(model, x, 1)
    handle = model[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    expected = gradient(model, x)
    torch.testing.assert_close(gradient(model, x, joining), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(*seen, atol=1e-10, rtol=1e-10)
    handle.remove()
    model[layer].forward = lambda out: F.max_pool2d(out.tanh(), 2) if layer == 3 else out.tanh()
    assert_computes_the_same(model, x, 1, joining)


class Switched(Pair):
    """Another ReLU, and another shortcut, than those that the convolution sees take their places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.relu, self.other = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = x * 1.0
        out = self.relu(self.norm(self.conv(self.switched(x))))
        return F.relu(y + self.norm(self.conv(y := out * 2.0))).mean((2, 3)) + y.mean((2, 3))

    def switched(self, x):
        self.relu, self.other = self.other, self.relu
        return x


@pytest.mark.usefixtures("twin")
def test_the_layer_that_is_called_is_the_one_that_counts():
    torch.testing.assert_close(
        gradient(Switched(), images(), Joining()), gradient(Switched(), images()), atol=1e-10, rtol=1e-10
    )


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if getattr(func, "__name__", "") in ("relu", "conv2d") else out


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_mode_of_somebody_elses_sees_every_function(where, found):
    class Moded(Pair):
        def forward(self, x):
            with Doubles():
                return F.relu(self.norm(self.conv(x))).mean((2, 3))

    class Plain(Pair):
        def forward(self, x):
            return F.relu(self.norm(self.conv(x))).mean((2, 3))

    if where == "inside":
        assert_joins(Moded(), images(), 0, 0, found)
        return
    with Doubles():
        assert_joins(Plain(), images(), 0, 0, found)
    assert_joins(Plain(), images(), 1, 0, found)


class Energy(Pair):
    """Weighs by the gradient of its own logits."""

    def forward(self, x):
        if not x.requires_grad:
            return F.relu(self.norm(self.conv(x))).mean((2, 3))
        out = F.relu(self.norm(self.conv(x))).pow(2).mean((2, 3))
        (grad,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
        return out + grad.pow(2).mean((2, 3))


@pytest.mark.usefixtures("twin")
def test_a_gradient_has_a_gradient(found):
    assert_joins(Energy(), images(), 1, 0, found)


@pytest.mark.usefixtures("twin")
def test_the_model_and_its_modes_are_given_back_even_when_it_raises():
    class Fails(Pair):
        def forward(self, x):
            raise ValueError(x.shape)

    class Goes(Pair):
        def forward(self, x):
            return F.relu(self.norm(self.conv(x))).mean((2, 3))

    for kind in (Goes, Fails):
        model = kind()
        before = [sorted(vars(module)) for module in model.modules()]
        try:
            gradient(model, images(), Joining())
        except ValueError:
            assert kind is Fails
        assert [sorted(vars(module)) for module in model.modules()] == before
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.usefixtures("twin")
def test_a_result_that_goes_elsewhere_than_it_was_seen_to_go_is_an_error(monkeypatch):
    model = Pair()
    model.relu = nn.ReLU()
    monkeypatch.setattr("afd.attacks.joining.consumers", lambda *_: iter([model.norm, model.relu]))
    model.forward = lambda x: model.norm(model.conv(x)).mean((2, 3)) + model.conv(x).mean((2, 3))
    with pytest.raises(ModelError, match="did not reach the layers behind it; attack with fold_batchnorm=False"):
        gradient(model, images(), Joining())


# --- Pooling before ReLU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)]
)
def test_pooling_first_is_the_same_bit_for_bit(pool, monkeypatch):
    """Also where all of a window is negative, equal, or NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), pool, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(4, 1, 9, 9).mul(4).round().div(4)
    calls = []
    monkeypatch.setattr(F, "relu", lambda x, inplace=False, own=F.relu: calls.append(x.shape) or own(x, inplace))
    written, joined_ = gradient(model, x), gradient(model, x, Joining())
    assert calls[0] == (4, 8, 7, 7)
    assert calls[1][2] < 7
    assert torch.equal(joined_[0], written[0])
    assert torch.equal(joined_[1], written[1])
    x[0, 0, 4, 4] = math.nan
    torch.testing.assert_close(gradient(model, x, Joining()), gradient(model, x), equal_nan=True, atol=0, rtol=0)


def test_a_pooling_that_tells_where_its_maxima_were_comes_last():
    class Unpooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.pool = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            out, at = self.pool(self.relu(self.conv(x)))
            return (out * at).mean((2, 3))

    assert_computes_the_same(Unpooled().eval().double(), torch.rand(3, 3, 8, 8, dtype=torch.float64), 0)


@pytest.mark.parametrize("written", [lambda out: out.mul_(2.0), lambda out: F.leaky_relu(out, inplace=True)])
def test_a_model_may_write_to_what_it_pooled(written):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.pool = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)

        def forward(self, x):
            out = self.pool(self.relu(self.conv(x))).flatten(2)
            out += 0.5
            out = written(out).pow(2).mean(2)
            if not x.requires_grad:
                return out
            (grad,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
            return out + grad.pow(2).mean((2, 3)).sum(1, keepdim=True)

    model, x = Writes().double().eval(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    assert_computes_the_same(model, x, 0)


# --- The gradient at few channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 9, 8), (2, 3, 11, 10), (2, 4, 6, 6)])
@pytest.mark.parametrize(
    ("window", "stride", "padding"), [((5, 5), (1, 1), (2, 2)), ((3, 2), (2, 1), (0, 1)), ((4, 3), (3, 2), (1, 0))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_matrix_product_finds_the_gradient_at_images(shape, window, stride, padding, dtype):
    torch.manual_seed(0)
    x = torch.rand(shape).to(memory_format=torch.channels_last).double().requires_grad_()
    weight = torch.randn(16 * shape[1], shape[1], *window).double()
    out = F.conv2d(x, weight, None, stride, padding)
    grad = torch.randn(out.shape).to(memory_format=torch.channels_last).to(dtype)
    (expected,) = torch.autograd.grad(out, x, grad.double())
    at = Geometry(stride, padding, (1, 1), 1)
    found = joined._of_few_channels(grad, weight.to(dtype), x.shape, at)
    error = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # sums are float32
    assert (found - expected).norm() <= error * expected.norm()
    assert torch.equal(input_gradient(grad, weight.to(dtype), x.shape, at, torch.channels_last), found.to(dtype))


def test_it_is_taken_where_it_is_faster(found):
    model = lenet().eval()
    for count, few in ((8, []), (64, [(False, False)])):
        x = torch.rand(count, 1, 28, 28)
        found.clear()
        PGD(model, eps=0.3, steps=1)(x, torch.arange(count) % 10)
        assert found == few


# --- Weights --------------------------------------------------------------------------------------------------------


def plain_resnet(width=16):
    torch.manual_seed(0)
    return unsettled(nn.Sequential(ResNet18(3, width), nn.Linear(8 * width, 10)))


NETWORKS = {
    "lenet": (lenet, (1, 28, 28)), "resnet18": (plain_resnet, (3, 16, 16)),
    "convnet": (lambda: build_model("convnet", (3, 16, 16), 10, 8), (3, 16, 16)),
    **{name: (build, (3, 16, 16)) for name, (build, _) in FAMILIES.items()},
}  # fmt: skip


@pytest.mark.parametrize("kernel", [None, TWIN, ONEDNN], ids=["torch", "twin", "onednn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_model_as_written(name, kernel, monkeypatch):
    """In float32 to rounding, and in bfloat16 as near to float32 as those of the model under autocast are."""
    if kernel:
        monkeypatch.setitem(KERNELS, "cpu", kernel)
    build, shape = NETWORKS[name]
    model = build().eval()
    x = torch.rand(24, *shape).contiguous(memory_format=torch.channels_last)
    (written_logits, written), (logits, grad) = gradient(model, x), gradient(model, x, Joining())
    torch.testing.assert_close(logits, written_logits, atol=1e-4, rtol=1e-4)
    cosine = lambda a, b: float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))  # noqa: E731
    assert cosine(grad, written) > 0.99999
    with torch.autocast("cpu", torch.bfloat16):
        low, low_joined = gradient(model, x)[1], gradient(model, x, Joining())[1]
    assert cosine(low_joined, written) > 0.97 * cosine(low, written)


def test_weights_in_bfloat16_are_taken_anew_at_each_call():
    """Also those that no version counter has seen written to."""
    model, x, y = lenet().eval(), torch.rand(8, 1, 28, 28), torch.arange(8)
    attack = PGD(model, eps=0.1, steps=2, precision="bf16")
    before = attack(x, y)
    assert len(attack._joining.kept) == 4
    assert {kept.weight.dtype for kept in attack._joining.kept.values()} == {torch.bfloat16}
    for parameter in model.parameters():
        parameter.data.mul_(-1.0)
    after = attack(x, y)
    assert torch.equal(after, PGD(model, eps=0.1, steps=2, precision="bf16")(x, y))
    assert not torch.equal(after, before)
    assert model[0].weight.dtype == torch.float32


def test_weights_written_to_during_a_call_are_not_the_kept_ones():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.mul_(1.5)
                self.conv.weight.mul_(1.5)
            return self.linear(self.conv(x).relu().mean((2, 3)))

    found, x = [], torch.rand(3, 3, 6, 6)
    for joining in (None, Joining()):
        model = Grows().eval()
        with torch.autocast("cpu", torch.bfloat16):
            found.append([gradient(model, x, joining)[0] for _ in range(3)])
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


def test_a_float64_model_under_autocast_is_left_alone():
    model, x = chain(), torch.rand(2, 3, 7, 7, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_computes_the_same(model, x, 1)


# --- Attacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, ONEDNN], ids=["torch", "onednn"])
def test_the_same_images_are_broken(kernel, monkeypatch):
    """By a joined attack and by one on the model as written, of a network that has learned something."""
    if kernel:
        monkeypatch.setitem(KERNELS, "cpu", kernel)
    torch.manual_seed(0)
    centres = torch.rand(4, 3, 8, 8)
    y = torch.arange(256) % 4
    x = (centres[y] + 0.15 * torch.randn(256, 3, 8, 8)).clamp(0, 1)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), Block(8, 8), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(72, 4))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    broken = [model(PGD(model, eps=0.12, steps=10, fold_batchnorm=fold)(x, y)).argmax(1) != y for fold in (True, False)]
    assert 20 < broken[1].sum() < 236
    assert (broken[0] != broken[1]).sum() <= 1


def test_no_more_memory_than_unjoined_but_for_the_weights(monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", TWIN)
    model, x, y = plain_resnet(), torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for precision, share in (("fp32", 1.1), ("bf16", 0.6)):
        attacks = [PGD(model, steps=2, precision=precision, fold_batchnorm=fold) for fold in (True, False)]
        for attack in attacks:
            attack(x, y)
        joined_, unjoined = (peak_bytes(lambda attack=attack: attack(x, y), CPU) for attack in attacks)
        assert joined_ <= unjoined + share * weights


def test_a_step_of_resnet18_in_bfloat16_has_at_most_a_hundred_launches(monkeypatch):
    """With all that an attack looks at; oneDNN's convolutions are one launch each, as cuDNN's are."""
    model, x, y = plain_resnet(), torch.rand(4, 3, 32, 32), torch.arange(4)
    counts = {}
    for name, kernel, fold in (("written", None, False), ("norms", None, True), ("joined", ONEDNN, True)):
        if kernel:
            monkeypatch.setitem(KERNELS, "cpu", kernel)
        attacks = [PGD(model, steps=steps, precision="bf16", fold_batchnorm=fold) for steps in (2, 3)]
        for attack in attacks:
            attack(x, y)
        fewer, more = (launches_of(lambda attack=attack: attack(x, y)) for attack in attacks)
        counts[name] = sum(more.values()) - sum(fewer.values())
    assert counts["joined"] <= 100, counts
    assert counts["joined"] < counts["norms"] < counts["written"], counts


# --- cuDNN's kernels ------------------------------------------------------------------------------------------------


def test_a_kernel_that_hides_nan_is_found_out():
    """As oneDNN's is, for which CPUs have none: a broken model would look sound."""
    assert passes_nan(TWIN, CPU, torch.float32)
    assert not passes_nan(ONEDNN, CPU, torch.float32)


def test_a_device_without_cudnn_has_no_such_kernel():
    assert not passes_nan(CUDNN, CPU, torch.float32)
    assert "cpu" not in KERNELS


def test_cudnns_functions_take_their_arguments_in_this_order():
    names = [[a.name for a in op.default._schema.arguments] for op in (
        torch.ops.aten.cudnn_convolution_relu, torch.ops.aten.cudnn_convolution_add_relu
    )]  # fmt: skip
    window = ["stride", "padding", "dilation", "groups"]
    assert names[0] == ["self", "weight", "bias", *window]
    assert names[1] == ["self", "weight", "z", "alpha", "bias", *window]
    assert list(Geometry._fields) == window


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_other", [False, True])
def test_cudnn_computes_what_its_twin_does(dtype, with_other):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 9, 9, device="cuda", dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 16, 3, 3, device="cuda", dtype=dtype).to(memory_format=torch.channels_last) / 12
    bias, at = torch.randn(32, device="cuda", dtype=dtype), Geometry((2, 2), (1, 1), (1, 1), 1)
    other = torch.randn(4, 32, 5, 5, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    found = []
    for kernel in (TWIN, CUDNN):
        out = joined.joined_conv(x, weight, bias, at, kernel, other if with_other else None)
        found.append((out, torch.autograd.grad(out.float().sum(), x)[0]))
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_is_taken_where_it_passes_nan(dtype, found):
    """Says, on the device, whether it is: what it computes is right either way."""
    model, x = plain_resnet().cuda(), torch.rand(4, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16), evaluating(model):
        gradient(model, x, Joining())
    device = torch.device("cuda", torch.cuda.current_device())
    assert (len(found) == 17) == passes_nan(CUDNN, device, dtype)
