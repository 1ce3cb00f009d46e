"""Every method stands beside its released flow in the same mode; a graph is recorded before it is timed."""

import json
from dataclasses import replace

import pytest
import torch
from readme import methods as rows
from torch import nn

from afd.attacks import CaptureWarning
from afd.bench import metering, methods, released_players
from afd.bench.base import run
from afd.bench.baselines import BaselineMissingError
from afd.bench.methods import GRAPH, METHODS, RELEASED, MethodsBench, RecordingError, Setting
from afd.bench.results import DocumentError, read
from afd.methods import AFD
from afd.nn import FeatureClassifier
from afd.ops.spectral import schema
from afd.training import recording

CPU = torch.device("cpu")
OTHERS = [name for name in METHODS if name != "afd"]  # whose released flow needs no other library
SEVERAL = "free", "jarn"  # whose first calls are several steps, or begin with one of another kind


class Counting(nn.Module):
    """Counts forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        out = self.linear(x.flatten(1))
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, _grad):
        self.backwards += 1


@pytest.fixture
def setting():
    """With few images and BatchNorm."""
    return Setting.of("small", 4, 2, CPU)


@pytest.mark.parametrize(
    ("build", "forwards", "backwards"),
    [
        (lambda model: released_players.AFD(model, 0.1).trained, 5, 4),
        (lambda model: AFD().build(model), 2, 2),
        (lambda model: AFD(schedule="alternating").build(model), 3, 2),
    ],
)
def test_passes_through_the_features_after_the_attack(build, forwards, backwards):
    encoder = Counting()
    step = build(FeatureClassifier(encoder, 6, 3))
    x = torch.rand(5, 1, 2, 2)
    step(x, torch.arange(5) % 3, x_adv=x)
    assert (encoder.forwards, encoder.backwards) == (forwards, backwards)


def test_every_player_of_the_released_step_moves():
    torch.manual_seed(0)
    step = released_players.AFD(FeatureClassifier(Counting(), 6, 3), 0.1, attack=lambda x, _: (x + 0.1).clamp(max=1))
    before = {name: p.clone() for name, p in (*step.model.named_parameters(), *step.judge.named_parameters())}
    step(torch.rand(5, 1, 2, 2), torch.arange(5) % 3)
    after = dict((*step.model.named_parameters(), *step.judge.named_parameters()))
    assert len(after) == 11
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "w.bias")


# --- Both sides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_both_sides_are_the_same_method_in_the_same_mode_and_leave_weights_as_they_are(name, setting):
    call = methods.of_released(name, setting)
    method = methods.settings_of(name, setting, "simultaneous")
    call(), call()
    weights = zip(call.func.model.parameters(), setting.model.parameters(), strict=True)
    assert all(torch.allclose(one, other) for one, other in weights)
    flow, settings = call.func, getattr(method, "core", method)
    assert flow.batchnorm == METHODS[name].batchnorm
    assert flow.eps == (settings.eps if settings.attack is None else settings.attack.eps) == setting.eps
    if settings.attack is not None:
        assert settings.attack.batchnorm == flow.batchnorm
        assert (settings.attack.alpha, settings.attack.steps) == (flow.alpha, flow.steps)
    if hasattr(method, "gamma"):
        assert method.gamma in (None, flow.gamma)
    for number in ("beta", "weight", "label_smoothing", "distance"):
        if hasattr(flow, number):
            assert getattr(flow, number) == getattr(settings, number)
    assert getattr(flow, "repeats", 1) == method.repeats
    (group,) = flow.optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (settings.lr, settings.momentum) == (methods.LR, 0.9)
    assert group["weight_decay"] == settings.weight_decay


@pytest.mark.parametrize("name", methods.NETWORKS)
def test_labels_are_what_the_network_says_and_stay_so(name):
    setting = Setting.of(name, 4, 1, CPU)
    methods.of_ours(methods.settings_of("afd", setting, "simultaneous"), setting, "fp32")()
    assert (setting.model(setting.x).argmax(1) == setting.y).all()


def test_methods_have_one_candidate_a_precision_and_afd_one_a_schedule_too(setting, monkeypatch):
    monkeypatch.setattr(methods, "of_released", lambda *_: print)
    asked = setting, ["simultaneous", "alternating"], ["fp32", "auto"]
    assert list(methods.candidates("mart", *asked, graphs=False)) == [RELEASED, "afd fp32", "afd auto"]
    ways = [f"afd {schedule} {precision}" for schedule in methods.SCHEDULES for precision in methods.PRECISIONS]
    assert list(methods.candidates("afd", *asked, graphs=False)) == [RELEASED, *ways]


# --- The run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["at,trades+awp,free", "fgsm-rs"])
def test_a_run_has_passes_times_and_memory_of_both_sides(names, tmp_path, console):
    bench = MethodsBench(methods=names, batch=4, steps=2, repeats=2, precisions="fp32", out=tmp_path / "r.json")
    made = run(bench, console)
    assert read(bench.out, "methods") == made
    assert made.finished
    assert made.settings == {"case": "small", "batch": 4, "steps": 2, "eps": 0.3}
    costs = {"at": (11, 7), "trades+awp": (24, 17), "free": (12, 12), "fgsm-rs": (6, 5)}
    assert list(made.cases) == names.split(",")
    for name, case in made.cases.items():
        assert case.settings == {"batchnorm": METHODS[name].batchnorm}
        assert list(case.candidates) == [RELEASED, "afd fp32"]
        assert tuple(one.figures["cost"] for one in case.candidates.values()) == costs[name]
        for one in case.candidates.values():
            figures = one.figures
            assert figures["speedup"] == pytest.approx(case.candidates[RELEASED].median / one.median)
            assert figures["images_per_second"] == pytest.approx(4 / one.median)
            assert figures["ms_per_image"] == pytest.approx(250 * one.median)
            assert figures["peak_bytes"] > 4 * 28 * 28 * 16
    headings, *lines = rows([made])
    assert len(lines) == 2 * len(costs) - 2 * (len(costs) - len(made.cases))
    assert all(len(line) == len(headings) for line in lines)


def test_a_method_is_written_as_soon_as_it_is_timed(tmp_path, console, monkeypatch):
    """What goes wrong later takes nothing away."""

    def broken(*_):
        raise RuntimeError("cut off")

    monkeypatch.setattr(methods, "memory", broken)
    bench = MethodsBench(methods="free,at", batch=2, steps=1, repeats=1, precisions="fp32", out=tmp_path / "r.json")
    with pytest.raises(RuntimeError, match="cut off"):
        run(bench, console)
    kept = json.loads(bench.out.read_text())
    assert not kept["finished"]
    assert list(kept["cases"]) == ["free"]
    assert kept["cases"]["free"]["candidates"]["afd fp32"]["figures"]["images_per_second"] > 0


def test_a_library_that_is_missing_is_named_before_anything_is_timed(tmp_path, console, monkeypatch):
    def missing(*_):
        raise BaselineMissingError("pyautoattack is not installed")

    monkeypatch.setattr(methods, "adapted", missing)
    bench = MethodsBench(methods="at,afd", batch=2, steps=1, repeats=1, out=tmp_path / "r.json")
    with pytest.raises(BaselineMissingError):
        run(bench, console)
    assert not bench.out.exists()
    assert list(bench.packages) == ["pyautoattack"]
    assert list(replace(bench, methods="at").packages) == []


def test_afd_runs_beside_the_released_program(tmp_path, console):
    pytest.importorskip("pyautoattack")
    schedules = "simultaneous,alternating"
    bench = MethodsBench(methods="afd", schedules=schedules, batch=4, steps=2, repeats=1, precisions="fp32",
                         out=tmp_path / "r.json")  # fmt: skip
    case = run(bench, console).cases["afd"]
    assert {name: one.figures["cost"] for name, one in case.candidates.items() if name != RELEASED} == {
        "afd simultaneous fp32": 13, "afd alternating fp32": 14,
    }  # fmt: skip
    assert case.candidates[RELEASED].figures["weight_backwards"] == 4


def test_a_document_of_the_step_alone_is_of_another_benchmark(document, tmp_path):
    document({"whole": {"released": (1.0, 2.0, 3.0)}}, benchmark="step").write(tmp_path / "old.json")
    with pytest.raises(DocumentError, match="is of benchmark 'step'; it must be of 'methods'"):
        read(tmp_path / "old.json", "methods")


# --- Graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tape, monkeypatch):
    """What happens to graphs, for which tapes stand, and when a call is timed."""
    happened = []

    class Logged(tape.Tape):
        def __init__(self):
            super().__init__()
            happened.append("recorded")

        def replay(self):
            happened.append("replayed")
            super().replay()

    clock = metering.on_cpu
    monkeypatch.setattr(metering, "on_cpu", lambda call: happened.append("timed") or clock(call))
    monkeypatch.setattr(recording, "Graph", lambda _device: Logged())
    monkeypatch.setattr(schema, "labels", lambda *_: None)  # it looks at labels where they cost no waiting: on the CPU
    monkeypatch.setitem(methods.WARMUP, "cpu", methods.WARMUP["cuda"])
    return happened


def graphed(name, setting, schedule="simultaneous", precision="fp32"):
    return methods.of_graph(methods.settings_of(name, setting, schedule), setting, precision)


@pytest.mark.parametrize("name", [*(name for name in METHODS if name not in SEVERAL), "alternating"])
def test_a_graph_is_recorded_in_the_warm_up_and_timed_calls_replay_it(name, setting, log):
    way = ("afd", setting, "alternating") if name == "alternating" else (name, setting)
    methods.timed(way[0], {RELEASED: graphed(*way)}, 4, 2, CPU)
    kinds = METHODS[way[0]].kinds  # each is recorded
    warmed = ["recorded", "replayed"] * kinds + ["replayed"] * kinds
    assert log == [*warmed, "timed", "replayed", "timed", "replayed"]


def test_each_replay_of_a_batch_is_one_of_the_graph(setting, log):
    methods.timed("free", {RELEASED: graphed("free", setting)}, 4, 1, CPU)
    assert log == ["recorded", *["replayed"] * 11, "timed", *["replayed"] * 4]


def test_a_step_that_cannot_be_recorded_is_left_out_and_told_at_the_end(log, tmp_path, console, monkeypatch):
    """After all others are timed."""

    def refused(*_):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(recording.CapturedStep, "of", refused)
    every = methods.candidates
    monkeypatch.setattr(methods, "candidates", lambda *given, **_: every(*given, graphs=True))
    bench = MethodsBench(methods="at,mart", batch=2, steps=1, repeats=1, precisions="auto", out=tmp_path / "r.json")
    said = "a step of AT in auto cannot be recorded as one CUDA graph"
    with pytest.warns(CaptureWarning, match="operation not permitted"), pytest.raises(RecordingError, match=said):
        run(bench, console)
    made = read(bench.out, "methods")
    assert not made.finished
    assert list(made.cases) == ["at", "mart"]
    assert all(list(case.candidates) == [RELEASED, "afd auto"] for case in made.cases.values())
    assert "at, left out: a step of AT" in console.export_text()


def test_a_graph_has_no_figure_of_memory_and_the_passes_of_its_step(setting):
    calls = {"afd fp32": lambda: torch.ones(1000), f"afd fp32 {GRAPH}": print}
    peaks = methods.memory(calls, CPU)
    assert [one["peak_bytes"] for one in peaks.values()] == [4000, None]
    found = methods.passes("mart", setting, ["simultaneous"], [RELEASED, *calls])
    assert found["afd fp32"] == found[f"afd fp32 {GRAPH}"]
    assert found["afd fp32"]["cost"] == found[RELEASED]["cost"] == 2 * 2 + 6


@pytest.mark.gpu
@pytest.mark.parametrize("precision", methods.PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_whole_steps_are_recorded_on_the_device(name, precision, cuda, monkeypatch):
    """A refusal would raise; and timed calls do nothing that waits for the device."""
    call = graphed(name, Setting.of("small", 8, 2, cuda), precision=precision)
    clock = metering.between_events

    def strict(call):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return clock(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(metering, "between_events", strict)
    assert methods.timed(name, {RELEASED: call}, 8, 3, cuda).medians[RELEASED] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_released_flows_run_on_the_device_and_are_counted_off_it(name, cuda):
    if name == "afd":
        pytest.importorskip("pyautoattack")
    setting = Setting.of("small", 8, 2, cuda)
    methods.of_released(name, setting)()
    assert methods.passes(name, setting, ["simultaneous"], [RELEASED])[RELEASED]["cost"] >= 5
