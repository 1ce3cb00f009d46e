"""Accuracy: counted right, in evaluation mode, and independent of the batch size."""

from types import SimpleNamespace

import pytest
import torch
from ambient import MODES
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from afd.attacks import PGD
from afd.attacks.external import PlainLogits
from afd.errors import InputError, InputTypeError, ModelError, ModelWarning
from afd.metrics import accuracy, accuracy_curve, packed, unpacked


class Brightest(nn.Module):
    """Logits are the pixels; says whether it was in evaluation mode."""

    def forward(self, x):
        assert not self.training
        return x.flatten(1)


X = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.6, 0.5], [0.2, 0.5, 0.1], [0.3, 0.2, 0.4]])
Y = torch.tensor([0, 1, 0, 2])


def in_batches(size):
    return list(zip(X.split(size), Y.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_clean_accuracy(size):
    model = Brightest()
    assert accuracy(model, in_batches(size)) == 0.75
    assert model.training


@pytest.mark.parametrize("size", [1, 3, 4])
def test_curve_falls_where_the_margins_end(size):
    """Margins are 0.8, 0.1 and 0.1: radius 0.06 breaks the last two, 0.3 leaves the first, 0.41 nothing."""

    def attack(eps):
        return PGD(Brightest(), eps=eps, alpha=eps / 4, steps=20)

    assert accuracy_curve(Brightest(), in_batches(size), [0, 0.04, 0.06, 0.3, 0.41], attack) == [
        0.75,
        0.75,
        0.25,
        0.25,
        0,
    ]


def test_no_images_is_an_error():
    with pytest.raises(InputError, match="batches holds no images"):
        accuracy(Brightest(), [])
    with pytest.raises(InputTypeError, match="batches is a NoneType; it must be a loader or a list of batches"):
        accuracy(Brightest(), None)


# --- What a figure is made of ---------------------------------------------------------------------------------------


class Returning(Brightest):
    """Brightest, whose logits are returned in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x))


FORMS = {
    "tuple": lambda logits: (logits, logits[:, :2]),
    "list": lambda logits: [logits],
    "dict": lambda logits: {"loss": logits.sum(), "logits": logits},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:the model returned a:afd.errors.ModelWarning")
def test_logits_are_found_in_whatever_a_model_returns(form):
    assert accuracy(Returning(FORMS[form]), in_batches(3)) == 0.75


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, torch.arange(4)),
        [X, Y],
        {"image": X, "label": Y},
        {"pixel_values": X, "labels": Y},
        SimpleNamespace(images=X, labels=Y),
    ],
    ids=["three items", "list", "dict", "transformers", "object"],
)
def test_images_and_labels_are_found_in_whatever_a_loader_yields(batch):
    assert accuracy(Brightest(), [batch]) == 0.75
    assert accuracy(Brightest(), iter([batch])) == 0.75


def test_batches_may_differ_in_size_and_some_may_be_empty():
    batches = [(X[:0], Y[:0]), (X[:1], Y[:1]), (X[1:1], Y[1:1]), (X[1:], Y[1:])]
    assert accuracy(Brightest(), batches) == 0.75
    assert accuracy(Brightest(), DataLoader(list(zip(X, Y, strict=True)), 3)) == 0.75
    with pytest.raises(InputError, match="batches holds no images"):
        accuracy(Brightest(), batches[:1])


@pytest.mark.parametrize(
    ("x", "y", "kind", "words"),
    [
        (X, Y[:, None], InputError, r"y has shape \[4, 1\]; it must be \[4\]"),
        (X, F.one_hot(Y, 4), InputError, r"y has shape \[4, 4\]; it must be \[4\]"),
        (X, Y.float(), InputTypeError, "y is torch.float32; labels must be torch.int64"),
        (X, Y.int(), InputTypeError, "y is torch.int32"),
        (X, Y - 1, InputError, "y holds the label -1; labels must be >= 0"),
        (X, Y + 1, InputError, r"y holds the label 3; the model has classes 0 \.\.\. 2"),
        (X[:3], Y, InputError, r"y has shape \[4\]; it must be \[3\]"),
        (X * 255, Y, InputError, r"x has values in \[25.5, 229.5\]; images must be finite and in \[0.0, 1.0\]"),
        ((X - 0.5) / 0.25, Y, InputError, r"x has values in \[-1.6, 1.6\]; images must be finite and in"),
        (X.log().fmod(0.5).sqrt(), Y, InputError, "x has values in .*nan"),
        ((X * 255).byte(), Y, InputTypeError, "x is torch.uint8"),
        (X, Y.to("meta"), InputError, "y is on meta; it must be on x's device, cpu"),
    ],
)
def test_images_and_labels_are_checked_where_they_are_counted(x, y, kind, words):
    with pytest.raises(kind, match=words):
        accuracy(Brightest(), [(X, Y), (x, y)])


def test_nan_logits_are_an_error_that_counts_the_images():
    def broken(logits):
        return logits.where(logits[:, :1] < 0.25, torch.nan)  # for images 0 and 3

    assert torch.full((1, 3), torch.nan).argmax(1) == Y[0]  # what would count as right
    with pytest.raises(ModelError, match="NaN logits for 2 of 4 images"):
        accuracy(Returning(broken), in_batches(1))


def test_infinite_logits_are_counted_and_their_order_stands():
    model = Returning(lambda logits: logits.where(logits < 0.55, torch.inf))  # for images 0 and 1
    with pytest.warns(ModelWarning, match="infinite logits for 2 of 4 images"):
        assert accuracy(model, in_batches(3)) == 0.75


@pytest.mark.parametrize(
    ("form", "kind", "words"),
    [
        (lambda logits: logits[:, :1], InputError, r"shape \[4, 1\]"),
        (lambda logits: logits[:, 0], InputError, r"shape \[4\]"),
        (lambda logits: logits[:2], InputError, r"shape \[2, 3\]"),
        (lambda logits: logits.argmax(1), InputTypeError, "torch.int64"),
        (lambda _: None, InputTypeError, "NoneType"),
    ],
)
def test_what_holds_no_logits_is_refused(form, kind, words):
    with pytest.raises(kind, match=words):
        accuracy(Returning(form), [(X, Y)])


def test_a_model_may_write_to_its_input():
    class Normalising(Brightest):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    given = X.clone()
    assert accuracy(Normalising(), [(given, Y)]) == 0.75
    assert torch.equal(given, X)


@pytest.mark.parametrize("mode", MODES)
def test_a_figure_does_not_depend_on_the_mode_of_the_caller(mode):
    """Images 1 and 3 of 4 are decided by less than bfloat16 can tell apart."""
    x = torch.tensor([[0.9, 0.1], [0.5, 0.5001], [0.2, 0.3], [0.5001, 0.5]])
    y = torch.tensor([0, 1, 0, 0])
    net = nn.Linear(2, 2, bias=False)
    nn.init.eye_(net.weight)
    with MODES[mode]():
        assert accuracy(net, [(x, y)]) == 0.75
        assert accuracy(net, [(x.clone().requires_grad_(), y)]) == 0.75


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_wrapped_models_are_measured_and_left_as_they_are():
    compiled, scripted = torch.compile(Brightest(), backend="eager"), torch.jit.trace(Brightest().eval(), X).train()
    for wrapped in (nn.DataParallel(Brightest()), scripted, compiled):
        assert accuracy(wrapped, in_batches(3)) == 0.75
        assert wrapped.training


# --- What an attack of one's own returns ----------------------------------------------------------------------------


def test_what_an_attack_returns_out_of_bounds_or_undefined_breaks_nothing_and_is_told():
    swapped = X.flip(1)  # breaks images 0 and 3

    def returning(value):
        first = torch.tensor([True, False, False, False])[:, None]
        return lambda *_, **__: torch.where(first, swapped + value, swapped)

    for value in (10.0, -10.0, torch.nan, torch.inf):
        with pytest.warns(ModelWarning, match="the attack returned 1 of 4 images out of bounds or not finite"):
            assert accuracy(Brightest(), [(X, Y)], returning(value)) == 0.5
    assert accuracy(Brightest(), [(X, Y)], returning(0.0)) == 0.25


@pytest.mark.parametrize(
    ("attack", "kind", "words"),
    [
        (
            lambda x, *_, **__: x[:1],
            InputError,
            r"what the attack returned has shape \[1, 3\]; it must match x, \[4, 3\]",
        ),
        (lambda x, *_, **__: x[..., None], InputError, "what the attack returned has shape"),
        (lambda x, *_, **__: x.double(), InputTypeError, "what the attack returned is torch.float64"),
        (lambda x, *_, **__: x.to("meta"), InputError, "what the attack returned is on meta"),
        (lambda x, *_, **__: (x, x), InputTypeError, "the attack returned a tuple"),
    ],
)
def test_what_an_attack_returns_must_be_like_the_images(attack, kind, words):
    with pytest.raises(kind, match=words):
        accuracy(Brightest(), [(X, Y)], attack)


def test_images_live_in_the_bounds_of_the_attack():
    attack = PGD(Brightest(), eps=0.01, steps=1, bounds=(-1.0, 1.0))
    assert accuracy(Brightest(), [(2 * X - 1, Y)], attack) == 0.75
    assert accuracy(Brightest(), [(2 * X - 1, Y)], bounds=(-1.0, 1.0)) == 0.75
    with pytest.raises(InputError, match=r"x has values in \[-0.8, 0.8\]"):
        accuracy(Brightest(), [(2 * X - 1, Y)])


def test_a_curve_refuses_what_can_be_read_once_before_the_first_pass():
    calls = []

    def attack(eps):
        calls.append(eps)
        return PGD(Brightest(), eps=eps)

    with pytest.raises(InputError, match="a list_iterator, which can be read only once; a curve over 2 radii"):
        accuracy_curve(Brightest(), iter(in_batches(2)), [0, 0.1], attack)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(InputError, match="eps is"):
            accuracy_curve(Brightest(), in_batches(2), [0.1, wrong], attack)
    assert not calls
    assert accuracy_curve(Brightest(), iter(in_batches(2)), [0], attack) == [0.75]


def test_an_attack_may_write_to_its_input():
    def breaking(x, y, **_):
        return x.scatter_(1, y[:, None], 0.0)

    batches = in_batches(4)
    assert accuracy(Brightest(), batches, breaking) == 0
    assert torch.equal(batches[0][0], X)
    assert accuracy(Brightest(), batches) == 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "pgd"}, "attack is 'pgd'; it must be an attack of the model"),
        ({"attack": PGD}, r"attack is the class PGD without a model; give the attack of a model, PGD\(model"),
        ({"attack": PGD.partial(eps=0.1)}, r"attack is the class PGD without a model"),
        ({"attack": lambda x, _y: x}, r"cannot be called as attack\(x, y, first_sample=...\)"),
        ({"bounds": (1.0, 0.0)}, r"bounds is \(1.0, 0.0\); the lowest value of an image comes first"),
        ({"bounds": 1.0}, "bounds is 1.0; it must be two numbers"),
        ({"model": nn.Linear(3, 3, device="meta")}, "the model's weight is on the device meta"),
        ({"batches": DataLoader}, "batches is a type; it must be a loader"),
        ({"batches": [(X.to("meta"), Y)]}, "x is on the device meta"),
    ],
)
def test_what_cannot_be_meant_is_named(settings, message):
    with pytest.raises((InputTypeError, InputError), match=message):
        accuracy(**{"model": Brightest(), "batches": in_batches(2), **settings})


@pytest.mark.parametrize(
    ("epsilons", "attack", "message"),
    [
        ("0.1", PGD, "epsilons is '0.1'; it must be a list of numbers"),
        (["0.1"], PGD, "eps is '0.1', a str; it must be a number"),
        ([0.1], lambda _eps: None, r"attack\(0.1\) returned None; it must return an attack"),
        ([0.1], PGD(Brightest()), "attack is a PGD; a curve needs a function from eps to an attack"),
    ],
)
def test_what_no_curve_can_be_made_of_is_named(epsilons, attack, message):
    with pytest.raises(InputTypeError, match=message):
        accuracy_curve(Brightest(), in_batches(2), epsilons, attack)


def test_an_attack_that_writes_to_its_labels_changes_no_count():
    def attack(x, y, **_settings):
        y.fill_(1)
        return x

    batches = [(X.clone(), Y.clone())]
    assert accuracy(Brightest(), batches, attack) == 0.75
    assert torch.equal(batches[0][1], Y)


def test_other_libraries_are_shown_logits_of_float32_at_least():
    class Narrow(Brightest):
        def forward(self, x):
            return super().forward(x).bfloat16()

    assert PlainLogits(Narrow().eval())(X).dtype == torch.float32
    assert PlainLogits(Brightest().eval())(X.double()).dtype == torch.float64


# --- Images that were withstood ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 7, 8, 9, 1000])
def test_packed_images_are_unpacked_as_they_were(images):
    withstood = torch.rand(images, generator=torch.Generator().manual_seed(images)) < 0.3
    assert torch.equal(unpacked(packed(withstood), images), withstood)
    assert len(packed(withstood)) == 2 * -(-images // 8)


def test_packed_images_come_first_bit_first():
    assert packed(torch.tensor([True, False, False, False, False, False, False, True, True])) == "8180"


@pytest.mark.parametrize(("text", "images"), [("81", 9), ("8180", 8), ("8", 4), ("zz", 8)])
def test_what_was_not_packed_of_so_many_images_is_refused(text, images):
    with pytest.raises(InputError, match="the images that were withstood are"):
        unpacked(text, images)
