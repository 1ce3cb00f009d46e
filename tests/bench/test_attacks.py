"""The attack benchmark end to end on a tiny factory, and its errors."""

from __future__ import annotations

import pytest
import torch

from afd.bench import contest, models
from afd.bench.attacks import AttackBench
from afd.bench.document import read
from afd.bench.host import HostReads
from afd.bench.peers import PEERS, Peer, PeerMissingError
from afd.bench.program import run
from afd.bench.request import Request
from afd.errors import InputError
from afd.evaluation.subject import SubjectError


def options(tiny, tmp_path, **changes):
    asked = {"model": tiny, "batch": 6, "shape": (3, 4, 4), "steps": 3, "against": "eager", "rounds": 2}
    return AttackBench(out=tmp_path / "b.json", **{**asked, **changes})


def test_measures_prints_and_records(tiny, tmp_path, console):
    made = run(options(tiny, tmp_path, attack="pgd,apgd", norm="Linf,L1", against="eager,eager-tf32"), console)
    shown = console.export_text()
    for words in ("model tiny_factory:make", "PGD-3 Linf, 6x3x4x4", "APGD-3 L1", "afd auto", "accuracy"):
        assert words in shown
    assert "APGD-3 L1, left out: a loop by hand offers no APGD in L1; eager-tf32 needs --device cuda" in shown
    assert read(tmp_path / "b.json", "attacks") == made
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert list(made.cases["PGD-3 L1, 6x3x4x4"].candidates) == ["floor", "afd", "afd auto", "eager"]
    assert list(made.cases["APGD-3 L1, 6x3x4x4"].candidates) == ["floor", "afd", "afd auto"]


def test_figures_follow_from_the_times(tiny, tmp_path, console):
    case = run(options(tiny, tmp_path, attack="apgd"), console).cases["APGD-3 Linf, 6x3x4x4"]
    ours, floor = case.candidates["afd"], case.candidates["floor"]
    assert case.settings["flops_per_pass"] == 6 * 2 * 2 * 48 * 5
    assert ours.figures["images_per_second"] == pytest.approx(6 / ours.median)
    assert ours.figures["image_steps_per_second"] == pytest.approx(18 / ours.median)
    assert ours.figures["over_floor"] == pytest.approx(ours.median / floor.median)
    rate = case.settings["flops_per_pass"] * 4 / ours.median  # three steps and the start
    assert ours.figures["matmul_share"] == pytest.approx(rate / case.measured["matmul_fp32"])
    assert ours.figures["peak_bytes"] > 6 * 48 * 4
    assert floor.figures["accuracy_left"] is None
    assert floor.figures["host_reads"] == 0


def test_a_radius_of_ones_own(tiny, tmp_path, console):
    made = run(options(tiny, tmp_path, norm="L2", attack="pgd", eps=0.125), console)
    (case,) = made.cases.values()
    assert (case.settings["norm"], case.settings["eps"]) == ("L2", 0.125)


def test_the_second_run_is_compared_with_the_first(tiny, tmp_path, console):
    first = options(tiny, tmp_path, rounds=5)
    run(first, console)
    run(options(tiny, tmp_path, rounds=5, compare=first.out), console)
    assert "since 2" in console.export_text()


class Greedy:
    """A peer that has memory for so many images."""

    def __init__(self, most, error):
        self.most, self.error, self.seen = most, error, []

    def __call__(self, _model, _request):
        def attack(x, _y):
            self.seen.append(len(x))
            if len(x) > self.most:
                raise self.error
            return x.clone()

        return attack


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: not enough memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_said(tiny, tmp_path, console, monkeypatch, error):
    greedy = Greedy(3, error)
    monkeypatch.setitem(PEERS, "eager", Peer("torch", "torch", greedy))
    made = run(options(tiny, tmp_path, batch=13), console)
    assert list(made.cases) == ["PGD-3 Linf, 3x3x4x4"]
    assert set(greedy.seen) == {13, 6, 3}
    shown = console.export_text()
    assert "13 images do not fit in memory: all candidates go on with 6" in shown
    assert "6 images do not fit in memory: all candidates go on with 3" in shown


def test_not_even_one_image(tiny, tmp_path, console, monkeypatch):
    monkeypatch.setitem(PEERS, "eager", Peer("torch", "torch", Greedy(0, MemoryError())))
    with pytest.raises(InputError, match="PGD-3 Linf on tiny_factory:make does not fit in memory, not even with one"):
        run(options(tiny, tmp_path, batch=2), console)


def test_other_errors_are_not_hidden(tiny, tmp_path, console, monkeypatch):
    monkeypatch.setitem(PEERS, "eager", Peer("torch", "torch", Greedy(0, RuntimeError("mat1 and mat2"))))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(options(tiny, tmp_path), console)


def test_a_missing_peer_is_named_with_its_pip_line(tiny, tmp_path, console, monkeypatch):
    monkeypatch.setitem(PEERS, "art", Peer("no_such_module", "adversarial-robustness-toolbox", Greedy(9, None)))
    run(options(tiny, tmp_path, against="art"), console)
    assert "art is not installed; add it with: pip install adversarial-robustness-toolbox" in console.export_text()


def test_a_compiler_that_fails_is_left_out_with_its_reason(tiny, tmp_path, console, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def broken(_model):
        def call(_x):
            raise TorchDynamoException("no working C++ compiler\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = run(options(tiny, tmp_path, against="compile,eager"), console)
    assert list(made.cases["PGD-3 Linf, 6x3x4x4"].candidates) == ["floor", "afd", "afd auto", "eager"]
    assert "left out: torch.compile fails here: no working C++ compiler\n" in console.export_text().replace("  ", "")


def test_the_round_needs_its_peer_too(monkeypatch):
    from afd.bench import rounds

    monkeypatch.setitem(PEERS, "pyautoattack", Peer("no_such_module", "pyautoattack", Greedy(9, None)))
    with pytest.raises(PeerMissingError, match="pip install pyautoattack"):
        rounds.released(rounds.case("small", 2, 1, torch.device("cpu")))


def test_the_subject_classifies_its_own_images_rightly(tiny):
    target = models.subject(tiny, batch=130, shape=(3, 4, 4))
    assert contest.accuracy(target, target.x) == 1.0
    assert target.size == "130x3x4x4"
    assert target.first(5).size == "5x3x4x4"


def test_the_floor_takes_as_many_passes_as_the_attack(tiny):
    target, passes = models.subject(tiny, batch=2, shape=(3, 4, 4)), []
    target.model.register_forward_hook(lambda *_: passes.append(1))
    for attack, expected in (("pgd", 7), ("apgd", 8)):
        passes.clear()
        with HostReads():
            contest.floor(target, Request(attack, "Linf", 0.1, 0.1, 7))(target.x, target.y)
        assert len(passes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "pgd,cw"}, "attack is 'cw'; allowed are pgd, apgd"),
        ({"norm": "L7"}, "norm is 'L7'; allowed are Linf, L2, L1"),
        ({"norm": ","}, "norm names nothing; allowed are Linf, L2, L1"),
        ({"against": "cleverhans"}, "against is 'cleverhans'; allowed are torchattacks, foolbox, art"),
        ({"steps": 0}, "steps is 0; it must be"),
        ({"eps": -0.1, "norm": "L2"}, "eps is -0.1; it must be"),
        ({"eps": 0.1, "norm": "L2,L1"}, "eps is 0.1 for L2, L1; ask for one norm at a time"),
        ({"batch": 0}, "batch is 0; it must be"),
        ({"rounds": 0}, "rounds is 0; it must be"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"shape": (3, 5, 5)}, "shape is 3x5x5, which model tiny_factory:make does not take: mat1 and mat2"),
    ],
)
def test_options_that_are_not_allowed_are_named(tiny, tmp_path, console, changes, message):
    with pytest.raises(InputError, match=message):
        run(options(tiny, tmp_path, **changes), console)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("alexnet", InputError, "model is 'alexnet'; allowed are lenet, resnet18, and package.module:factory"),
        ("no_such_package:make", SubjectError, "cannot be imported: No module named 'no_such_package'"),
        ("tiny_factory:nothing", SubjectError, "tiny_factory has no 'nothing'"),
        ("tiny_factory:broken", SubjectError, "failed with ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_models_that_cannot_be_had_are_named(model, kind, message):
    with pytest.raises(kind, match=message):
        models.subject(model)
