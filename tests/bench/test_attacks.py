"""The attack benchmark end to end on a tiny factory; and every adapter: its points, its strength, and its absence."""

import importlib.util
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from afd.bench import attacks
from afd.bench.attacks import AttackBench, TimedModel
from afd.bench.base import run
from afd.bench.baselines import BASELINES, Baseline, BaselineMissingError, NotOfferedError, Request, adapted, ours
from afd.bench.metering import HostReads
from afd.bench.results import read
from afd.errors import InputError
from afd.evaluation.model import UnusableModelError

CPU = torch.device("cpu")
NORMS = {"Linf": (0.08, float("inf")), "L2": (0.5, 2), "L1": (3.0, 1)}


@pytest.fixture
def bench(tiny, tmp_path, console):
    """A function that runs a benchmark of the tiny model, and returns its document and what was shown."""

    def made(**changes):
        asked = {"model": tiny, "batch": 6, "shape": (3, 4, 4), "steps": 3, "against": "eager", "repeats": 2}
        document = run(AttackBench(out=tmp_path / "b.json", **{**asked, **changes}), console)
        return document, console.export_text()

    return made


def test_measures_prints_and_records(bench, tmp_path):
    made, shown = bench(attack="pgd,apgd", norm="Linf,L1", against="eager,eager-tf32")
    for words in ("model tiny_factory:make", "PGD-3 Linf, 6x3x4x4", "APGD-3 L1", "afd auto", "accuracy"):
        assert words in shown
    assert "APGD-3 L1, left out: a loop by hand offers no APGD in L1; eager-tf32 needs --device cuda" in shown
    assert read(tmp_path / "b.json", "attacks") == made
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert list(made.cases["PGD-3 L1, 6x3x4x4"].candidates) == ["floor", "afd", "afd auto", "eager"]
    case = made.cases["APGD-3 Linf, 6x3x4x4"]
    assert list(case.candidates) == ["floor", "afd", "afd auto"]
    ours, floor = case.candidates["afd"], case.candidates["floor"]
    assert case.settings["flops_per_pass"] == 6 * 2 * 2 * 48 * 5
    assert ours.figures["images_per_second"] == pytest.approx(6 / ours.median)
    assert ours.figures["image_steps_per_second"] == pytest.approx(18 / ours.median)
    assert ours.figures["over_floor"] == pytest.approx(ours.median / floor.median)
    rate = case.settings["flops_per_pass"] * 4 / ours.median  # three steps and the start
    assert ours.figures["matmul_share"] == pytest.approx(rate / case.measured["matmul_fp32"])
    assert ours.figures["peak_bytes"] > 6 * 48 * 4
    assert (floor.figures["accuracy_left"], floor.figures["host_reads"]) == (None, 0)


def test_a_radius_of_ones_own_and_a_comparison_with_an_earlier_run(bench, tmp_path):
    made, _ = bench(norm="L2", attack="pgd", eps=0.125, repeats=5)
    assert [(case.settings["norm"], case.settings["eps"]) for case in made.cases.values()] == [("L2", 0.125)]
    assert "since 2" in bench(norm="L2", eps=0.125, repeats=5, since=tmp_path / "b.json")[1]


def test_a_missing_baseline_is_named_with_its_pip_line(bench, monkeypatch):
    monkeypatch.setitem(BASELINES, "art", Baseline("no_such_module", "adversarial-robustness-toolbox", None))
    assert "art is not installed; add it with: pip install adversarial-robustness-toolbox" in bench(against="art")[1]


def test_a_compiler_that_fails_is_left_out_with_its_reason(bench, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def broken(_x):
        raise TorchDynamoException("no working C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", lambda _model: broken)
    made, shown = bench(against="compile,eager")
    assert list(made.cases["PGD-3 Linf, 6x3x4x4"].candidates) == ["floor", "afd", "afd auto", "eager"]
    assert "left out: torch.compile fails here: no working C++ compiler\n" in shown.replace("  ", "")


def test_the_model_and_its_floor(tiny):
    target, passes = AttackBench(model=tiny, batch=130, shape=(3, 4, 4)).timed(CPU), []
    assert (target.accuracy(target.x), target.size) == (1.0, "130x3x4x4")
    target.model.register_forward_hook(lambda *_: passes.append(1))
    for attack, expected in (("pgd", 7), ("apgd", 8)):
        passes.clear()
        with HostReads():
            attacks.floor(target, Request(attack, "Linf", 0.1, 0.1, 7))(target.x[:2], target.y[:2])
        assert len(passes) == expected, "as many as the attack's"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"norm": ","}, InputError, "norm names nothing; allowed are Linf, L2, L1"),
        ({"eps": 0.1, "norm": "L2,L1"}, InputError, "eps is 0.1 for L2, L1; ask for one norm at a time"),
        ({"device": "tpu"}, InputError, "device is 'tpu'"),
        ({"shape": (3, 5, 5)}, InputError, "shape is 3x5x5, which model tiny_factory:make does not take: mat1 and"),
        ({"model": "tiny_factory:nothing"}, UnusableModelError, "tiny_factory has no 'nothing'"),
        ({"model": "tiny_factory:broken"}, UnusableModelError, "failed with ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_not_allowed_is_named(bench, changes, kind, message):
    with pytest.raises(kind, match=message):
        bench(**changes)


def test_requests():
    made = AttackBench(attack="pgd,apgd", norm="L2", eps=0.5, steps=10).requests()
    assert [(request.name, request.passes) for request in made] == [("PGD-10 L2", 10), ("APGD-10 L2", 11)]
    assert made[0].alpha == pytest.approx(0.125)


def test_the_first_line_is_told_before_anything_is_built(tmp_path, monkeypatch):
    shown, seen = Console(file=io.StringIO(), force_terminal=False, width=60), []

    def built():
        seen.append(shown.file.getvalue())
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    monkeypatch.setitem(attacks.MODELS, "tiny", (built, (1, 4, 4), 4))
    run(AttackBench(model="tiny", steps=1, repeats=1, against="eager", out=tmp_path / "a.json"), shown)
    assert "bench attacks: building tiny\n" in seen[0]
    assert "bench attacks: PGD-1 Linf, 4x1x4x4\n" in shown.file.getvalue()


# --- Other libraries -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 10)).eval()
    x = torch.rand(100, 1, 8, 8)
    return TimedModel("small", model, x, model(x).argmax(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"compile"}))
def test_adapters_keep_to_the_ball_and_are_about_as_strong(target, name, attack, norm):
    if not BASELINES[name].installed:
        pytest.skip(f"{name} is not installed")
    eps, order = NORMS[norm]
    request = Request(attack, norm, eps, eps / 4, 20)
    try:
        run = adapted(name, target.model, request)
    except NotOfferedError as error:
        assert norm in str(error) or str(error) == "eager-tf32 needs --device cuda"  # noqa: PT017
        return
    x_adv = run(target.x, target.y)
    assert torch.linalg.vector_norm((x_adv - target.x).flatten(1), order, dim=1).max() <= eps * (1 + 1e-4)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    own = target.accuracy(ours(target.model, request)(target.x, target.y))
    assert 0 < own < 0.9
    weak = {("foolbox", "L1"), ("art", "L1"), ("art-defaults", "L1")}  # no steepest ascent there
    slack = 0.5 if (name, norm) in weak else 0.2 if name == "pyautoattack-defaults" else 0.1
    assert abs(target.accuracy(x_adv) - own) <= slack


def test_unknown_and_missing_baselines_are_named(target, monkeypatch):
    request = Request("pgd", "Linf", 0.1, 0.02, 3)
    with pytest.raises(InputError, match="against is 'cleverhans'; allowed are torchattacks, foolbox"):
        adapted("cleverhans", target.model, request)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BaselineMissingError, match="art is not installed; add it with: pip install adversarial-rob"):
        adapted("art", target.model, request)


@pytest.mark.parametrize(("name", "images"), [("art", 100), ("art-defaults", 32)])
def test_art_by_default_takes_32_images_at_a_time(target, name, images):
    if not BASELINES["art"].installed:
        pytest.skip("art is not installed")
    sizes = []
    hook = target.model[0].register_forward_hook(lambda _module, inputs, _out: sizes.append(len(inputs[0])))
    adapted(name, target.model, Request("pgd", "Linf", 0.08, 0.02, 2))(target.x, target.y)
    hook.remove()
    assert max(sizes) == images
