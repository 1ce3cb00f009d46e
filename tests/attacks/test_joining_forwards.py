"""BatchNorm joined to convolutions whatever a forward does: the result is what it would be without."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from joined_networks import TWIN, Pair, assert_computes_the_same, gradient, images, unsettled
from torch import nn
from torch.overrides import TorchFunctionMode

from afd.attacks import joining as joining_module
from afd.attacks.engine import evaluating, logits_alone
from afd.attacks.joined import KERNELS
from afd.attacks.joining import Joining
from afd.errors import ModelError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(autouse=True, params=[False, True], ids=["norms alone", "norms and ReLU"])
def _kernel(request, monkeypatch):
    """What a CPU joins, and what is joined where the device has a kernel for it."""
    if request.param:
        monkeypatch.setitem(KERNELS, "cpu", TWIN)


# --- Forwards that differ from call to call -------------------------------------------------------------------------


def test_a_switch_on_the_model_is_followed():
    model, joining = Pair(), Joining()
    for use_other, pairs in ((False, 1), (True, 2), (False, 2)):
        model.use_other = use_other
        assert_computes_the_same(model, images(), pairs, joining)


class Draws(Pair):
    """Takes one of the norms at random."""

    def forward(self, x):
        norm = self.norm if torch.rand(()) < 0.5 else self.other
        return self.finish(norm(self.conv(x)))


def test_random_draws_are_followed_and_are_the_same():
    model, joining = Draws(), Joining()
    torch.manual_seed(0)
    written = [gradient(model, images()) for _ in range(8)]
    torch.manual_seed(0)
    for one in written:
        torch.testing.assert_close(gradient(model, images(), joining), one, atol=1e-10, rtol=1e-10)
    assert len(joining.pairs) == 2


class Shared(Pair):
    """Uses the convolution's output beside its BatchNorm, too."""

    def forward(self, x):
        out = self.conv(x)
        return self.finish(out + self.norm(out))


class SharedLater(Pair):
    """The other way round: what is not BatchNorm comes first."""

    def forward(self, x):
        out = self.conv(x)
        half = out * 0.5
        return self.finish(half + self.norm(out))


class Twice(Pair):
    """Runs the pair twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def forward(self, x):
        return self.finish(self.norm(self.conv(self.norm(self.conv(x)))))


class Reshaped(Pair):
    """Something lies between the two."""

    def forward(self, x):
        return self.finish(self.norm(self.conv(x).relu()))


class InPlace(Pair):
    """What lies between writes to the output of the convolution, under its old name."""

    def forward(self, x):
        out = self.conv(x)
        out.mul_(2.0)
        out[:, 0] += 1.0
        return self.finish(self.norm(out))


class Chooses(Pair):
    """Asks the values."""

    def forward(self, x):
        out = self.conv(x)
        return self.finish(self.norm(out)) * (1 if float(out.detach().sum()) > 0 else 2)


class Functional(Pair):
    """Calls BatchNorm by its function, with settings of its own."""

    def forward(self, x):
        norm = self.norm
        return self.finish(F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, None, eps=0.3))


class Conditional(Pair):
    """Scales by what it computes from the images, so that the gradient goes through the scales."""

    def forward(self, x):
        norm, scale = self.norm, x.mean((0, 2, 3))
        return self.finish(F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, scale, norm.bias))


class BatchStatistics(Pair):
    """BatchNorm that has no statistics of its own takes the batch's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False).double()


class Unbatched(Pair):
    """Convolutions take single images; BatchNorm1d then takes their rows for a batch."""

    def __init__(self):
        super().__init__()
        self.norm = unsettled(nn.BatchNorm1d(4)).double()

    def forward(self, x):
        return torch.stack([self.norm(self.conv(image)).mean((1, 2)) for image in x])


class WithoutGradient(Pair):
    """No gradient goes through the convolution, though one goes through what follows."""

    def forward(self, x):
        with torch.no_grad():
            out = self.conv(x)
        return self.finish(self.norm(out) * x.mean())


class InAutocast(Pair):
    """The convolution alone is computed in bfloat16."""

    def __init__(self):
        super().__init__()
        self.float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.conv(x.float())
        return self.finish(self.norm(out.float()).double())


class InputWrittenTo(Pair):
    """The convolution's input has other values when BatchNorm comes."""

    def forward(self, x):
        with torch.no_grad():
            fixed = x * 1.0
            out = self.conv(fixed)
            fixed.mul_(3.0)
            out = self.norm(out)
        return self.finish(out) * x.mean()


class WeightWrittenTo(Pair):
    """So have its weights, in the end as they were."""

    def forward(self, x):
        with torch.no_grad():
            out = self.conv(x)
            self.conv.weight.mul_(2.0)
            out = self.norm(out)
            self.conv.weight.mul_(0.5)
        return self.finish(out) + x.mean((2, 3))


class WeightsDrawn(Pair):
    """New weights, in the memory of old ones or elsewhere, before each convolution."""

    def forward(self, x):
        with torch.no_grad():
            self.norm.running_mean.add_(0.25)
            self.conv.weight.data = self.conv.weight.detach() * 1.5
        return self.finish(self.norm(self.conv(x)))


class Unused(Pair):
    """Runs a convolution for nothing."""

    def forward(self, x):
        self.conv(x)
        return super().forward(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, grad):
        return grad * 2


class OwnFunction(Pair):
    """An autograd.Function takes the output, past all that could be asked."""

    def forward(self, x):
        return self.finish(self.norm(Doubled.apply(self.conv(x))))


class ReturnsOutput(Pair):
    """The convolution is the last layer, and what it gives is returned as it is."""

    def forward(self, x):
        return self.conv(F.adaptive_avg_pool2d(self.norm(self.conv(x)), 3))[..., 0, 0] if x.shape[-1] > 3 else None


class Checkpointed(Pair):
    """Computes the pair once more in the backward."""

    def forward(self, x):
        pair = lambda x: self.norm(self.conv(x))  # noqa: E731
        return self.finish(torch.utils.checkpoint.checkpoint(pair, x, use_reentrant=False))


class CheckpointedHalf(Pair):
    """The BatchNorm alone is computed once more."""

    def forward(self, x):
        return self.finish(torch.utils.checkpoint.checkpoint(self.norm, self.conv(x), use_reentrant=False))


class Vectorised(Pair):
    """A function of one image, mapped over the batch."""

    def forward(self, x):
        return torch.func.vmap(lambda image: self.finish(self.norm(self.conv(image[None])))[0])(x)


class Dilated(Pair):
    """One convolution at three dilations, and only then its norm."""

    def forward(self, x):
        outs = []
        for d in (1, 2):
            self.conv.dilation = self.conv.padding = (d, d)
            outs.append(self.conv(x))
        return self.finish(sum(self.norm(out) for out in outs))


class Swapped(Pair):
    """The convolution runs with other weights than it has before and after."""

    def __init__(self):
        super().__init__()
        self.spare = copy.deepcopy(self.conv)
        with torch.no_grad():
            self.spare.weight.mul_(2.0)

    def forward(self, x):
        return self.finish(self.norm(torch.func.functional_call(self.conv, dict(self.spare.named_parameters()), (x,))))


class Quantised(Pair):
    """The weights are rounded for as long as the convolution runs, by what counts no version."""

    def forward(self, x):
        weight = self.conv.weight.detach().clone()
        self.conv.weight.data.copy_((weight * 4).round() / 4)
        out = self.norm(self.conv(x))
        self.conv.weight.data.copy_(weight)
        return self.finish(out)


class Domains(Pair):
    """The norm's scale is set for each use."""

    def forward(self, x):
        total = 0
        for scale in (0.5, 2.0):
            set_scale(self.norm, scale)
            total = total + self.norm(self.conv(x)).relu()
        return total.mean((2, 3))


def set_scale(norm, scale):
    norm.weight.data.fill_(scale)


class Sines(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.sin() if getattr(func, "__name__", "") == "conv2d" else out


class Moded(Pair):
    """Torch's functions compute something else here."""

    def forward(self, x):
        with Sines():
            return self.finish(self.norm(self.conv(x)))


class Typed(Pair):
    """Asks for the very type of what lies between."""

    def forward(self, x):
        out = self.conv(x)
        return self.finish(self.norm(out if type(out) is torch.Tensor else out * 0))


class GradientHook(Pair):
    """Hooks into the gradient of what lies between, once it has been used."""

    def forward(self, x):
        out = self.conv(x)
        result = self.norm(out)
        if out.requires_grad:
            out.register_hook(torch.neg)
        return self.finish(result)


class Attention(Pair):
    """Weighs by the gradient of its own logits with respect to what lies between."""

    def forward(self, x):
        out = self.conv(x)
        logits = self.finish(self.norm(out))
        if not out.requires_grad:
            return logits
        (grad,) = torch.autograd.grad(logits.amax(1).sum(), [out], create_graph=True)
        return logits + self.finish(out * grad)


class HookedMeanwhile(Pair):
    """The convolution has a backward hook for this call alone."""

    def forward(self, x):
        handle = self.conv.register_full_backward_hook(lambda *_: None)
        out = self.norm(self.conv(x))
        handle.remove()
        return self.finish(out)


class ByKeyword(Pair):
    """Names the argument."""

    def forward(self, x):
        return self.finish(self.norm(self.conv(input=x)))


class InsideInference(Pair):
    """Looks at the images without gradients first."""

    def forward(self, x):
        with torch.inference_mode():
            seen = float(self.norm(self.conv(x)).mean())
        return self.finish(self.norm(self.conv(x))) * (1 + seen)


class Scripted(Pair):
    """A compiled function is handed what the convolution gives."""

    def forward(self, x):
        gate = swish(self.conv(x))
        return self.finish(self.norm(self.conv(x)) * gate)


swish = torch.jit.trace(lambda x: x * x.sigmoid(), torch.rand(2, 2))


class Switches(Pair):
    """Another norm takes the place of the one that was about to be called."""

    def forward(self, x):
        return self.finish(self.norm(self.conv(self.switched(x))))

    def switched(self, x):
        self.norm, self.other = self.other, self.norm
        return x


class Returned(Pair):
    """The convolution's result is returned to who calls the norm, as in DenseNet's bottleneck."""

    def bottleneck(self, x):
        result = self.conv(x)
        return result  # noqa: RET504

    def forward(self, x):
        if x.dim() != 4:  # noqa: SIM108
            out = x
        else:
            out = self.bottleneck(x)
        result = self.finish(self.norm(out))
        return result  # noqa: RET504


class ReturnedThroughMap(Returned):
    """The same, with C code between the two that may do anything."""

    def forward(self, x):
        (out,) = map(self.bottleneck, [x])
        out = self.norm(next(iter(map(self.bottleneck, [x]))) if x.dim() < 4 else out)
        return self.finish(out)


class InLists(Pair):
    """Layers in lists, called in loops."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)).double()
        self.norms = nn.ModuleList([self.norm, self.other])

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = self.norms[i](x)
        return self.finish(x)


class UsedAgain(Pair):
    """The name that is given away keeps its value for the next turn."""

    def forward(self, x):
        total = 0
        for turn in range(2):
            if turn == 0:
                out = self.conv(x)
            total = total + self.norm(out)
        return self.finish(total)


class Closure(Pair):
    """A nested function sees the name."""

    def forward(self, x):
        look = lambda: out.mean((2, 3))  # noqa: E731
        out = self.conv(x)
        out = self.norm(out)
        return self.finish(out) + look()


PAIRS = {
    Shared: 0, SharedLater: 0, Twice: 1, Reshaped: 0, InPlace: 0, Chooses: 0, Functional: 0, Conditional: 0,
    BatchStatistics: 0, Unbatched: 0, WithoutGradient: 0, InputWrittenTo: 0, WeightWrittenTo: 0, Unused: 1,
    OwnFunction: 0, ReturnsOutput: 1, Checkpointed: 1, CheckpointedHalf: 0, Vectorised: 0, Dilated: 0, Swapped: 0,
    Quantised: 0, Domains: 0, Moded: 0, Typed: 0, GradientHook: 0, Attention: 0, HookedMeanwhile: 0, ByKeyword: 1,
    InsideInference: 1, Scripted: 1, Returned: 1, ReturnedThroughMap: 0, InLists: 2, UsedAgain: 0,
    Closure: 0,
}  # fmt: skip


def test_the_norm_that_is_called_is_the_one_that_counts():
    model, twin, joining = Switches(), Switches(), Joining()
    for _ in range(4):
        torch.testing.assert_close(gradient(model, images(), joining), gradient(twin, images()), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", PAIRS, ids=lambda kind: kind.__name__)
def test_whatever_a_forward_does_is_what_is_computed(kind):
    assert_computes_the_same(kind(), images(), PAIRS[kind])


def test_a_convolution_in_another_precision_than_its_norm_is_left_alone():
    assert_computes_the_same(InAutocast(), images(), 0)


def test_weights_that_each_forward_changes_are_followed():
    written = gradient(WeightsDrawn(), images())
    model, joining = WeightsDrawn(), Joining()
    torch.testing.assert_close(gradient(model, images(), joining), written, atol=1e-10, rtol=1e-10)
    again = WeightsDrawn()
    gradient(again, images())
    written, found = gradient(again, images()), gradient(model, images(), joining)
    torch.testing.assert_close(found, written, atol=1e-10, rtol=1e-10)


def test_statistics_that_are_removed_and_channels_that_are_pruned():
    model, x, joining = Pair(), images(), Joining()
    assert_computes_the_same(model, x, 1, joining)
    model.norm.running_mean = model.norm.running_var = None
    torch.testing.assert_close(gradient(model, x, joining), gradient(model, x), atol=1e-10, rtol=1e-10)
    model = Pair()
    assert_computes_the_same(model, x, 1, joining := Joining())
    keep = torch.tensor([0, 2])
    model.conv.weight, model.conv.bias = (nn.Parameter(t.detach()[keep]) for t in (model.conv.weight, model.conv.bias))
    for name in ("weight", "bias"):
        setattr(model.norm, name, nn.Parameter(getattr(model.norm, name).detach()[keep]))
    model.norm.running_mean, model.norm.running_var = model.norm.running_mean[keep], model.norm.running_var[keep]
    x = x[:2]  # two classes are left
    torch.testing.assert_close(gradient(model, x, joining), gradient(model, x), atol=1e-10, rtol=1e-10)
    model.norm = nn.BatchNorm2d(3).double().eval()  # and one that does not fit any more
    with pytest.raises(RuntimeError, match="running_mean should contain 2 elements not 3"):
        gradient(model, x, joining)


class Keeps(Pair):
    """Keeps what the convolution gave, as an attribute."""

    def forward(self, x):
        self.kept = self.conv(x)
        return self.finish(self.norm(self.kept))


def test_what_a_model_keeps_is_a_tensor_with_its_values():
    model = Keeps()
    assert_computes_the_same(model, images(), 0)
    assert type(model.kept) is torch.Tensor
    torch.testing.assert_close(model.kept, model.conv(images()))


class Remembers(Pair):
    """Counts, draws and keeps, in all the places where a module can."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails, self.forwards, self.inputs = fails, 0, []
        self.register_buffer("sum", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.forwards += 1
        self.inputs.append(x.shape)
        self.sum += x.detach().sum()
        if self.fails:
            raise ValueError("no")
        out = self.norm(self.conv(x))
        self.kept = self.conv(x)
        return self.finish(out) * torch.rand(())


def test_a_forward_runs_once_and_is_what_it_would_be_without_us():
    found = []
    for joining in (None, Joining()):
        model = Remembers()
        torch.manual_seed(0)
        logits = [gradient(model, images(), joining)[0] for _ in range(3)]
        found.append((logits, model.forwards, model.inputs, model.kept, torch.rand(())))
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)
    assert found[0][1] == 3


def test_what_a_model_raises_is_raised():
    model = Remembers(fails=True)
    with pytest.raises(ValueError, match="no") as raised:
        gradient(model, images(), Joining())
    assert raised.value.__context__ is None
    assert "forward" not in vars(model.conv)


@pytest.mark.parametrize("how", ["method", "closure"])
def test_a_compiled_part_of_a_model_is_left_alone(how):
    class Compiled(Pair):
        def block(self, x):
            return self.norm(self.conv(x))

        def forward(self, x):
            return self.finish(compiled(self, x) if how == "method" else torch.compile(self.block, backend="eager")(x))

    compiled = torch.compile(Compiled.block, backend="eager")
    model, joining = Compiled(), Joining()
    written = gradient(Compiled(), images())
    for _ in range(3):
        torch.testing.assert_close(gradient(model, images(), joining), written, atol=1e-10, rtol=1e-10)


def test_a_norm_that_is_given_another_forward_is_left_alone():
    model, joining = Pair(), Joining()
    assert_computes_the_same(model, images(), 1, joining)
    model.norm.forward = lambda out: out.tanh()
    torch.testing.assert_close(gradient(model, images(), joining), gradient(model, images()), atol=1e-10, rtol=1e-10)
    assert model.norm.forward(torch.zeros(1)) == 0


def test_another_thread_sees_the_model_as_it_is():
    model, joining, found = Pair(), Joining(), []
    with evaluating(model), joining.joined(model):
        logits_alone(model, images())
        for use in (model, lambda x: model.conv(x)):
            thread = threading.Thread(target=lambda use=use: found.append(use(images()).detach()))
            thread.start()
            thread.join()
    assert torch.equal(found[0], model(images()))
    assert torch.equal(found[1], model.conv(images()))


def test_an_attack_can_be_copied_and_pickled_after_a_call():
    joining = assert_computes_the_same(Pair(), images(), 1)
    for other in (copy.deepcopy(joining), pickle.loads(pickle.dumps(joining))):
        assert other.pairs == {}
        assert_computes_the_same(Pair(), images(), 1, other)


def test_a_result_that_goes_elsewhere_than_it_was_seen_to_go_is_an_error(monkeypatch):
    monkeypatch.setattr(joining_module, "consumers", lambda *_: iter([model.norm]))  # a reader of code who is wrong
    model = Shared()
    model.forward = lambda x: model.finish(model.conv(x).relu() + model.other(model.conv(x)))
    with pytest.raises(ModelError, match="did not reach its BatchNorm; attack with fold_batchnorm=False"):
        gradient(model, images(), Joining())


# --- What is no parameter, grad mode, other ways out ----------------------------------------------------------------


class Hyper(Pair):
    """Its convolution's weights depend on the images."""

    def __init__(self):
        super().__init__()
        self.own, self.shift = nn.Parameter(self.conv.weight.detach().clone()), nn.Parameter(torch.zeros(3).double())
        del self.conv.weight, self.conv.bias

    def forward(self, x):
        self.conv.weight, self.conv.bias = self.own * x.mean(), self.shift + x.amax()
        return self.finish(F.relu(self.norm(self.conv(x))))


class HyperBias(Hyper):
    """Only the bias does."""

    def __init__(self):
        super().__init__()
        self.conv.weight = self.own

    def forward(self, x):
        self.conv.bias = self.shift + x.amax()
        return self.finish(F.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize("kind", [Hyper, HyperBias])
def test_weights_that_a_forward_computes_are_left_alone(kind):
    assert_computes_the_same(kind().eval(), images(), 0)


class Halves(Pair):
    """Records no gradient at the convolution, or none behind it."""

    def __init__(self, at_conv, behind):
        super().__init__()
        self.at_conv, self.behind = at_conv, behind
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def made(self, x):
        with torch.set_grad_enabled(self.at_conv):
            return self.conv(x)

    def normed(self, x):
        with torch.set_grad_enabled(self.at_conv):
            return self.norm(self.conv(x))

    def forward(self, x):
        other = x * 2.0
        with torch.set_grad_enabled(self.behind):
            out = self.norm(self.made(x)) + x
        with torch.set_grad_enabled(self.behind):
            out = out + F.relu(self.normed(x))
        with torch.set_grad_enabled(self.behind):
            out = out + F.relu(self.made(x))
        with torch.set_grad_enabled(self.behind):
            out = out + F.relu(self.normed(x) + other)
        return (out + x).mean((2, 3))


@pytest.mark.parametrize(("at_conv", "behind"), [(False, True), (True, False), (False, False), (True, True)])
def test_a_gradient_is_recorded_where_it_was(at_conv, behind):
    model = Halves(at_conv, behind).eval()
    expected, found = gradient(model, images()), gradient(model, images(), Joining())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


class InFinally(Pair):
    def made(self, x):
        try:
            out = self.conv(x)
            return self.norm(out)
        finally:
            self.kept = out

    def forward(self, x):
        return self.finish(self.made(x) + self.kept)


class ByLocals(Pair):
    def forward(self, x):
        out = self.conv(x)
        both = self.norm(out) + locals()["out"]
        return self.finish(both)


@pytest.mark.parametrize("kind", [InFinally, ByLocals])
def test_a_name_may_be_looked_at_in_other_ways(kind):
    assert_computes_the_same(kind().eval(), images(), 0)


def test_layers_that_a_model_has_no_more_are_forgotten():
    model, joining = Pair().eval(), Joining()
    gradient(model, images(), joining)
    before = len(joining._stand_ins)
    for _ in range(3):
        model.conv = nn.Conv2d(3, 3, 3).double()
        gradient(model, images(), joining)
    assert len(joining._stand_ins) == before


# --- Writes that are not counted, by others than a forward ----------------------------------------------------------


class Halver:
    """What halves a layer's weights for a forward, past the count of writes."""

    def halve(self, layer):
        self.kept = layer.weight.detach().clone()
        layer.weight.data.mul_(0.5)

    def restore(self, layer):
        layer.weight.data.copy_(self.kept)


halver = Halver()


class ByGlobal(Pair):
    def forward(self, x):
        halver.halve(self.conv)
        out = self.norm(self.conv(x))
        halver.restore(self.conv)
        return self.finish(out)


class Halvers:
    @staticmethod
    def halve(layer):
        halver.halve(layer)


class ByClass(Pair):
    def forward(self, x):
        Halvers.halve(self.conv)
        out = self.norm(self.conv(x))
        halver.restore(self.conv)
        return self.finish(out)


class ByAttribute(Pair):
    def __init__(self):
        super().__init__()
        self.helpers = [Halver()]

    def forward(self, x):
        self.helpers[0].halve(self.conv)
        out = self.norm(self.conv(x))
        self.helpers[0].restore(self.conv)
        return self.finish(out)


class Halving(nn.Conv2d):
    def halve(self):
        self.weight.data.mul_(0.5)

    @property
    def doubled(self):
        return torch.from_numpy(self.weight.numpy()).mul_(2.0)


class ByChild(Pair):
    def __init__(self):
        super().__init__()
        self.child = Halving(3, 3, 1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.child.weight = self.conv.weight

    def forward(self, x):
        self.child.halve()
        out = self.norm(self.conv(x))
        return self.finish(out + 0 * self.child.doubled.sum())


class ByName(Pair):
    def forward(self, x):
        weight = getattr(self.conv.weight, "data")  # noqa: B009
        weight.mul_(0.5)
        out = self.norm(self.conv(x))
        weight.mul_(2.0)
        return self.finish(out)


@pytest.mark.parametrize("kind", [ByGlobal, ByClass, ByAttribute, ByChild, ByName])
def test_writes_by_those_that_a_forward_reaches_are_not_missed(kind):
    assert_computes_the_same(kind().eval(), images(), 0)


@pytest.mark.parametrize("before", [True, False])
def test_writes_by_hooks_are_not_missed(before):
    model = Pair().eval()
    own = model.conv.weight.detach().clone()

    def hook(*_):
        model.conv.weight.data.copy_(own * torch.rand(()))

    (model.register_forward_pre_hook if before else model.norm.register_forward_hook)(hook)
    found = []
    for joining in (None, Joining()):
        model.conv.weight.data.copy_(own)
        torch.manual_seed(0)
        found.append([gradient(model, images(), joining) for _ in range(2)])
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


class InitialisedByData(Pair):
    """Writes to its weights when it is made, which is no forward's business."""

    def __init__(self):
        super().__init__()
        self.begin()

    def begin(self):
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data.normal_(0, 0.1)


def test_writes_when_a_model_is_made_do_not_count():
    assert_computes_the_same(InitialisedByData().eval(), images(), 1)


# --- Where nothing can be gained ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "casts", "placed"),
    [
        ((nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), False, 0),
        ((nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), True, 2),
        ((nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)), False, 1),
        ((nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), False, 3),
        ((nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)), False, 3),
    ],
)
def test_layers_are_left_alone_where_nothing_can_be_gained(layers, casts, placed, monkeypatch):
    monkeypatch.delitem(KERNELS, "cpu", raising=False)
    model = nn.Sequential(*layers).eval()
    with Joining().joined(model, casts):
        assert sum("forward" in vars(layer) for layer in model) == placed
