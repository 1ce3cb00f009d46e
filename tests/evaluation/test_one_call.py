"""`afd.evaluation.evaluate`: one call for anybody's model and tensors, and the object that it returns."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from afd.evaluation import Result, evaluate
from afd.evaluation.attacks import Epsilon
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.measure import prepare
from afd.evaluation.model import Model, UnusableModelError
from afd.evaluation.outcome import Outcome
from afd.evaluation.protocol import quick
from afd.metrics import interval

EPS = "0.0525"


class Brightest(nn.Module):
    """Logits are the pixels: an L∞ attack needs half of the margin between the two brightest."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.scale * x.flatten(1)


class Masked(Brightest):
    """The same answers, and gradients that lead away from other ones."""

    def forward(self, x):
        logits = super().forward(x)
        return 2 * logits.detach() - logits


@pytest.fixture
def bright():
    """Images of four pixels, whose class is the brightest of these; the first three are labelled wrongly."""
    x = torch.randint(0, 101, (60, 1, 2, 2), generator=torch.Generator().manual_seed(1)).float() / 100
    y = x.flatten(1).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    return x, y


def withstand(x, y, eps):
    top = x.flatten(1).topk(2).values
    return (top[:, 0] - top[:, 1] > 2 * eps + 1e-6) & (x.flatten(1).argmax(1) == y)


@pytest.fixture
def result(bright):
    return evaluate(Brightest().eval(), *bright, EPS, protocol="quick", batch_size=25)


def test_the_figures_are_exact(result, bright):
    x, y = bright
    left = withstand(x, y, 0.0525)
    assert result.accuracy == 57 / 60
    assert result.robust_accuracy == float(left.double().mean())
    assert torch.equal(result.broken, ~left)
    assert result.accuracy_interval == pytest.approx(interval(57, 60))
    assert result.robust_accuracy_interval == pytest.approx(interval(int(left.sum()), 60))
    assert result.left == {"pgd-20": result.robust_accuracy, "apgd-ce": result.robust_accuracy}
    assert result.verdict == "pass"
    assert result.checks["Square beats white-box"].verdict == "pass"


def test_adversarial_images_fool_the_model_and_lie_in_the_ball(result, bright):
    x, y = bright
    assert torch.equal(Brightest()(result.adversarial).argmax(1) != y, result.broken)
    assert (result.adversarial - x).abs().max() <= 0.0525 + 1e-6
    assert torch.equal(result.adversarial[~result.broken], x[~result.broken])
    assert torch.equal(result.adversarial[:3], x[:3])  # wrong as they are


def test_it_prints_a_table_with_intervals_and_checks(result):
    printed = str(result)
    low, high = result.robust_accuracy_interval
    line = next(line for line in printed.splitlines() if line.startswith("worst case"))
    share = f"{100 * result.robust_accuracy:.2f}"
    assert line.split() == ["worst", "case", share, f"{100 * low:.2f}", "to", f"{100 * high:.2f}"]
    assert printed.startswith("Brightest on 60 images, protocol quick, L∞, ε = 0.0525")
    for name, check in result.checks.items():
        assert any(line.startswith(name) and check.verdict in line for line in printed.splitlines())
    assert "Every check that could be made passed." in printed
    assert repr(result) == f"Result(accuracy 95.00%, robust {result.robust_accuracy:.2%}, verdict 'pass')"
    assert isinstance(result, Result)


def test_its_json_is_that_of_the_command(result, bright, tmp_path):
    x, y = bright
    eps = Epsilon.of(EPS)
    model = Model("Brightest", "model", Brightest())
    from afd.data import Images

    images = Images((x * 100).round().to(torch.uint8), y, 100.0, 4, "x")
    folder = evaluate_to_folder(model, images, quick("Linf", (eps,), eps), tmp_path / "out", batch_size=25)
    found = json.loads(json.dumps(result.as_json()))
    for key in ("clean", "worst_case", "intervals", "protocol", "checks", "verdict", "precision"):
        assert found[key] == json.loads(json.dumps(folder[key])), key
    assert found.keys() == folder.keys()


def test_the_model_is_left_as_it_was_and_training_mode_is_told(bright):
    model = Brightest().train()
    result = evaluate(model, *bright, EPS, protocol="quick")
    assert model.training
    assert model.scale.grad is None
    assert result.checks["training mode"].verdict == "warn"


def test_it_does_not_hang_on_the_split_into_batches(result, bright):
    other = evaluate(Brightest(), *bright, EPS, protocol="quick", batch_size=60)
    assert (other.robust_accuracy, other.left) == (result.robust_accuracy, result.left)


@pytest.mark.parametrize(("norm", "share"), [("Linf", 2.0), ("L2", 2**0.5), ("L1", 1.0)])
def test_autoattack_in_every_norm(norm, share, bright):
    x, y = (one[:20] for one in bright)
    top = x.flatten(1).topk(2).values
    left = (top[:, 0] - top[:, 1] > 0.1 * share + 1e-6) & (x.flatten(1).argmax(1) == y)
    result = evaluate(Brightest(), x, y, 0.1, norm=norm)
    assert torch.equal(result.broken, ~left)
    assert [*result.left] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert result.content["protocol"]["name"] == "autoattack"


def test_images_may_be_of_any_shape(bright):
    x, y = bright
    flat = evaluate(Brightest(), x.flatten(1).double(), y, EPS, protocol="quick")
    assert flat.adversarial.shape == (60, 4)
    assert flat.adversarial.dtype == torch.float64
    assert torch.equal(flat.broken, ~withstand(x, y, 0.0525))


# --- Surrogates -----------------------------------------------------------------------------------------------------


def test_what_surrogates_find_counts_and_shows_masked_gradients(bright):
    x, y = bright
    alone = evaluate(Masked(), x, y, EPS, protocol="quick")
    helped = evaluate(Masked(), x, y, EPS, protocol="quick", surrogates=[Other(0.0), Other()])
    assert alone.checks["transfer beats white-box"].verdict == "skipped"
    assert helped.checks["transfer beats white-box"].verdict == "fail"
    assert torch.equal(helped.broken, ~withstand(x, y, 0.0525))
    assert helped.robust_accuracy == helped.left["transfer-2"] < helped.left["transfer-1"]
    assert helped.robust_accuracy < alone.robust_accuracy
    assert torch.equal(Masked()(helped.adversarial).argmax(1) != y, helped.broken)
    assert [one["source"] for one in helped.as_json()["surrogates"]] == ["surrogates[0]", "surrogates[1]"]


class Other(Brightest):
    """Another model with the same classes; of scale 0, one whose gradients lead nowhere."""

    def __init__(self, scale=5.0):
        super().__init__()
        self.scale.data.fill_(scale)


def test_honest_models_lose_nothing_to_surrogates(bright):
    helped = evaluate(Brightest(), *bright, EPS, protocol="quick", surrogates=[Other()])
    assert helped.checks["transfer beats white-box"].verdict == "pass"
    assert torch.equal(helped.broken, ~withstand(*bright, 0.0525))


# --- Bad input ------------------------------------------------------------------------------------------------------


class One(Brightest):
    def forward(self, x):
        return super().forward(x)[:, :1]


X, Y = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": Y.int()}, "y is torch.int32; labels must be torch.int64"),
        ({"y": Y[:5]}, r"y has shape \[5\]; it must be \[6\], one label for each image"),
        ({"y": Y + 1}, "y holds the label 4; the model has classes 0 ... 3"),
        ({"y": Y - 1}, "y holds the label -1; labels must be >= 0"),
        ({"x": X + 1}, r"x has values in \[.*\]; images must be finite and in \[0.0, 1.0\]"),
        ({"x": X * float("nan")}, "images must be finite"),
        ({"x": (255 * X).to(torch.uint8)}, "x is torch.uint8; an attack needs torch.float32"),
        ({"x": X[:0], "y": Y[:0]}, "x holds no images; an evaluation needs at least one"),
        ({"x": X.tolist()}, "x is a list; it must be a torch.Tensor"),
        ({"eps": 0}, "eps is 0, where nothing is attacked; it needs a radius > 0"),
        ({"eps": -0.1}, "eps is -0.1; it must be at least 0"),
        ({"eps": "8"}, r"eps is 8 in Linf; no two images in \[0, 1\] are further apart than 1; did you mean 8/255"),
        ({"eps": "much"}, "eps is 'much'; it must be a number such as 0.3 or a fraction such as 8/255"),
        ({"norm": "L3"}, "norm is 'L3'; allowed are Linf, L2, L1"),
        ({"protocol": "paper"}, "protocol is 'paper'; allowed are autoattack, quick"),
        ({"precision": "bf16"}, "precision is 'bf16'; allowed are fp32, auto"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch-size is 0"),
        ({"model": lambda x: x}, "model is a function; it must be a torch.nn.Module"),
        ({"surrogates": Other()}, "surrogates is a Other; it must be a list of models"),
        ({"surrogates": None}, "surrogates is a NoneType; it must be a list of models"),
        ({"eps": torch.full((6,), 0.1)}, "eps is a Tensor; evaluate takes one radius for all images"),
        ({"device": "nope"}, "device is 'nope'; allowed are auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"surrogates": [None]}, r"surrogates\[0\] is a NoneType; it must be a torch.nn.Module"),
        ({"surrogates": [Brightest()]}, r"surrogates\[0\] holds the model's own weights; name another model"),
        (
            {"surrogates": [nn.Sequential(nn.Flatten(), nn.Linear(4, 5))]},
            r"surrogates\[0\] has 5 classes, but .* has 4",
        ),
        ({"model": Brightest().to("meta")}, "model is on meta; it must be on the images' device, cpu"),
        ({"surrogates": [Other().to("meta")]}, r"surrogates\[0\] is on meta; it must be on the images' device, cpu"),
        ({"model": One()}, r"a logit for each of at least 2 classes \(of one score s, make \[-s / 2, s / 2\]\)"),
        ({"model": nn.Linear(3, 3)}, "model model does not take x's 1x2x2 images"),
    ],
)
def test_mistakes_are_told_before_anything_runs(change, message, monkeypatch):
    monkeypatch.setattr(Outcome, "empty", None)  # which running begins with
    arguments = {"model": Brightest(), "x": X, "y": Y, "eps": EPS, "protocol": "quick", **change}
    with pytest.raises((ValueError, TypeError, UnusableModelError), match=message):
        evaluate(**arguments)


def test_a_surrogate_is_tried_before_anything_runs(bright):
    x, y = bright
    with pytest.raises(UnusableModelError, match=r"model surrogates\[0\] does not take x's 1x2x2 images"):
        evaluate(Brightest(), x, y, EPS, surrogates=[nn.Linear(3, 3)])


def test_it_needs_torch_and_numpy_alone():
    code = """
    import sys
    for name in ("rich", "tyro", "matplotlib", "jinja2", "foolbox", "pyautoattack", "sklearn", "pooch", "tomli_w"):
        sys.modules[name] = None
    import torch
    from afd.evaluation import evaluate
    x = torch.rand(8, 1, 4, 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    print(evaluate(model, x, model(x).argmax(1), 0.01, protocol="quick"))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "worst case" in ran.stdout


def test_it_is_prepared_once(bright):
    """An `Evaluation` names all that a figure hangs on."""
    x, y = bright
    from afd.evaluation.model import Given

    eps = Epsilon.of(EPS)
    made = [
        prepare(Model("m", "m", Brightest()), Given(x, y, 1.0, 4, "x"), quick("Linf", (eps,), eps), precision=precision)
        for precision in ("fp32", "auto")
    ]
    one, other = (evaluation.fingerprint() for evaluation in made)
    assert one["settings"] == {"seed": 0, "batch_size": 250}  # unfinished evaluations of before go on
    assert {key for key in one if one[key] != other[key]} == {"settings"}
