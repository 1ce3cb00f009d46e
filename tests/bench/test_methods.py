"""The released flow spends what it is said to spend, and afd's step less; one graph is recorded before it is timed."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from afd.attacks import CaptureWarning
from afd.bench import metering, methods
from afd.bench.base import run
from afd.bench.baselines import ReleasedStep
from afd.bench.methods import OUTSIDE, RELEASED, WHOLE, RecordingError, Setting, StepBench
from afd.bench.results import read
from afd.methods import AFD
from afd.nn import FeatureClassifier
from afd.ops.spectral import schema
from afd.training import recording

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("build", "forwards", "backwards"),
    [
        (lambda model: ReleasedStep(model, 0.1), 5, 4),
        (lambda model: AFD().build(model), 2, 2),
        (lambda model: AFD(schedule="alternating").build(model), 3, 2),
    ],
)
def test_passes_through_the_features(build, forwards, backwards):
    encoder = Counting()
    step = build(FeatureClassifier(encoder, 6, 3))
    x = torch.rand(5, 1, 2, 2)
    step(x, torch.arange(5) % 3, x_adv=x)
    assert (encoder.forwards, encoder.backwards) == (forwards, backwards)


def test_every_player_of_the_released_step_moves():
    torch.manual_seed(0)
    step = ReleasedStep(FeatureClassifier(Counting(), 6, 3), 0.1)
    before = {name: p.clone() for name, p in (*step.model.named_parameters(), *step.judge.named_parameters())}
    x = torch.rand(5, 1, 2, 2)
    step(x, torch.arange(5) % 3, x_adv=(x + 0.1).clamp(max=1))
    after = dict((*step.model.named_parameters(), *step.judge.named_parameters()))
    assert len(after) == 11
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "w.bias")


@pytest.mark.parametrize("name", methods.NETWORKS)
def test_all_images_of_a_setting_are_attacked(name):
    setting = Setting.of(name, 4, 1, CPU)
    for part in methods.ours(setting, "fp32", "simultaneous"):
        part()
    assert (setting.model(setting.x).argmax(1) == setting.y).all()


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


def timed(parts):
    """Whole steps and what is outside the attack, of one candidate twice."""
    return {name: methods.timed(name, {RELEASED: parts}, 2, CPU) for name in (WHOLE, OUTSIDE)}


@pytest.mark.parametrize("schedule", methods.SCHEDULES)
def test_a_graph_is_recorded_in_the_warm_up_and_timed_calls_replay_it(schedule, log):
    timed(methods.recorded(Setting.of("small", 4, 2, CPU), "fp32", schedule))
    assert log == ["recorded", "replayed", "replayed", "timed", "replayed", "timed", "replayed"] * 2


def test_a_recorded_step_is_the_step(log):
    """Replays move every player as eager calls do."""
    setting = Setting.of("small", 4, 2, CPU)
    ends = []
    for graphs in (True, False):
        torch.manual_seed(5)  # of the discriminator
        model, step = methods.built(setting, "fp32", "simultaneous")
        for optimizer in step.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.1
        before = [p.clone() for p in model.parameters()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(methods, "built", lambda *_, made=(model, step): made)
            if not graphs:
                patch.setattr(recording.GraphedStep, "_capture", lambda *_: None)
            whole, _ = methods.recorded(setting, "fp32", "simultaneous")
            for _ in range(4):
                whole()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        ends.append([*model.state_dict().values(), *step.players["discriminator"].state_dict().values()])
    assert log.count("replayed") == 3
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_that_cannot_be_recorded_is_not_timed(log, monkeypatch):
    def refused(*_):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(recording.CapturedStep, "of", refused)
    parts = methods.recorded(Setting.of("small", 4, 1, CPU), "auto", "alternating")
    said = r"the alternating step in auto \(whole\) cannot be recorded as one CUDA graph"
    with pytest.warns(CaptureWarning, match="operation not permitted"), pytest.raises(RecordingError, match=said):
        timed(parts)
    assert "timed" not in log


@pytest.mark.parametrize("refuses", [False, True])
def test_both_parts_are_written_before_a_refusal_ends_the_run(refuses, tmp_path, console, monkeypatch):
    def last():
        if refuses:
            raise RecordingError("the step cannot be recorded")

    ways = dict.fromkeys([RELEASED, "afd simultaneous fp32"], (lambda: None, lambda: None))
    ways["afd simultaneous fp32 graph"] = (lambda: None, last)
    monkeypatch.setattr(methods, "candidates", lambda *_, **__: dict(ways))
    bench = StepBench(batch=2, steps=1, repeats=2, out=tmp_path / "r.json")
    with pytest.raises(RecordingError, match="cannot be recorded") if refuses else nullcontext():
        run(bench, console)
    made = read(bench.out, "step")
    assert (made.finished, list(made.cases)) == (not refuses, [WHOLE, OUTSIDE])
    for name in list(ways)[: 3 - refuses]:
        whole, outside = (made.cases[part].candidates.pop(name) for part in (WHOLE, OUTSIDE))
        assert whole.figures["share"] == pytest.approx(outside.median / whole.median)
        assert outside.figures["share"] is None
    assert not any(case.candidates for case in made.cases.values())


@pytest.mark.parametrize("graphs", [False, True])
def test_candidates_by_name(graphs, log, monkeypatch):
    monkeypatch.setattr(methods, "released", lambda _setting: (print, print))
    found = methods.candidates(Setting.of("small", 2, 1, CPU), ["simultaneous", "alternating"], ["fp32"], graphs)
    ours = [f"afd {name} fp32{end}" for name in ("simultaneous", "alternating") for end in ["", " graph"][: 1 + graphs]]
    assert list(found) == [RELEASED, *ours]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", methods.PRECISIONS)
@pytest.mark.parametrize("schedule", methods.SCHEDULES)
def test_whole_steps_are_recorded_on_the_device(schedule, precision, cuda, monkeypatch):
    """A refusal would raise; and timed calls do nothing that waits for the device."""
    parts = methods.recorded(Setting.of("small", 8, 2, cuda), precision, schedule)
    clock = metering.between_events

    def strict(call):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return clock(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(metering, "between_events", strict)
    for part in (WHOLE, OUTSIDE):
        assert methods.timed(part, {RELEASED: parts}, 3, cuda).medians[RELEASED] > 0


@pytest.mark.gpu
def test_the_released_step_runs_on_the_device(cuda):
    pytest.importorskip("pyautoattack")
    for part in methods.released(Setting.of("small", 8, 2, cuda)):
        part()
