"""The released flow spends what it is said to spend, and afd's round less; one graph is recorded before it is timed."""

import pytest
import torch
from torch import nn

from afd.attacks import CaptureWarning
from afd.bench import round_candidates, rounds, timing
from afd.bench.document import read
from afd.bench.program import run
from afd.bench.released import ReleasedRound
from afd.bench.round_candidates import OUTSIDE, WHOLE
from afd.methods import AFD
from afd.nn import FeatureClassifier
from afd.ops.spectral import checks
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
        (lambda model: ReleasedRound(model, 0.1).step, 5, 4),
        (lambda model: AFD().build(model), 2, 2),
        (lambda model: AFD(schedule="alternating").build(model), 3, 2),
    ],
)
def test_passes_through_the_features(build, forwards, backwards):
    encoder = Counting()
    round_ = build(FeatureClassifier(encoder, 6, 3))
    x = torch.rand(5, 1, 2, 2)
    round_(x, torch.arange(5) % 3, x_adv=x)
    assert (encoder.forwards, encoder.backwards) == (forwards, backwards)


def test_every_player_of_the_released_round_moves():
    torch.manual_seed(0)
    round_ = ReleasedRound(FeatureClassifier(Counting(), 6, 3), 0.1)
    before = {name: p.clone() for name, p in (*round_.whole.named_parameters(), *round_.judge.named_parameters())}
    x = torch.rand(5, 1, 2, 2)
    round_.step(x, torch.arange(5) % 3, x_adv=(x + 0.1).clamp(max=1))
    after = dict((*round_.whole.named_parameters(), *round_.judge.named_parameters()))
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "l7.bias")


@pytest.mark.parametrize("name", round_candidates.CASES)
def test_all_images_of_a_case_are_attacked(name):
    case = round_candidates.case(name, 4, 1, CPU)
    round_, outside = round_candidates.ours(case, "fp32", "simultaneous")
    round_()
    outside()
    assert (case.model(case.x).argmax(1) == case.y).all()


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

    clock = timing._on_cpu
    monkeypatch.setattr(timing, "_on_cpu", lambda call: happened.append("timed") or clock(call))
    monkeypatch.setattr(recording, "Graph", lambda _device: Logged())
    monkeypatch.setattr(checks, "labels", lambda *_: None)  # it looks at labels where they cost no waiting: on the CPU
    return happened


@pytest.mark.parametrize("schedule", rounds.SCHEDULES)
def test_a_graph_is_recorded_in_the_warm_up_and_timed_calls_replay_it(schedule, log):
    case = round_candidates.case("small", 4, 2, CPU)
    played = {"afd graph": round_candidates.recorded(case, "fp32", schedule)}
    taken = dict(rounds.measure(played, rounds=2, warmup=rounds.WARMUP["cuda"], device=CPU))
    assert list(taken) == [WHOLE, OUTSIDE]
    assert log == ["recorded", "replayed", "replayed", "timed", "replayed", "timed", "replayed"] * 2


def test_a_recorded_round_is_the_round(log):
    """Replays move every player as eager calls do."""
    case = round_candidates.case("small", 4, 2, CPU)
    ends = []
    for graphs in (True, False):
        torch.manual_seed(5)  # of the discriminator
        model, round_ = round_candidates.built(case, "fp32", "simultaneous")
        for optimizer in round_.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.1
        before = [p.clone() for p in model.parameters()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(round_candidates, "built", lambda *_, made=(model, round_): made)
            if not graphs:
                patch.setattr(recording.Recordings, "_record", lambda *_: None)
            whole, _ = round_candidates.recorded(case, "fp32", "simultaneous")
            for _ in range(4):
                whole()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        ends.append([*model.state_dict().values(), *round_.players["discriminator"].state_dict().values()])
    assert log.count("replayed") == 3
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_round_that_cannot_be_recorded_is_not_timed(log, monkeypatch):
    def refused(*_):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(recording.Recording, "of", refused)
    case = round_candidates.case("small", 4, 1, CPU)
    played = {"afd graph": round_candidates.recorded(case, "auto", "alternating")}
    said = r"the alternating round in auto \(whole\) cannot be recorded as one CUDA graph"
    with (
        pytest.warns(CaptureWarning, match="operation not permitted"),
        pytest.raises(round_candidates.RecordingError, match=said),
    ):
        dict(rounds.measure(played, rounds=2, warmup=3, device=CPU))
    assert "timed" not in log


def test_the_others_are_timed_and_written_before_a_refusal_ends_the_run(tmp_path, console, monkeypatch):
    def refuses():
        raise round_candidates.RecordingError("the round cannot be recorded")

    ways = dict.fromkeys(["released", "afd simultaneous fp32"], (lambda: None, lambda: None))
    ways["afd simultaneous fp32 graph"] = (lambda: None, refuses)
    monkeypatch.setattr(rounds, "candidates", lambda *_, **__: dict(ways))
    bench = rounds.RoundBench(batch=2, steps=1, rounds=2, out=tmp_path / "r.json")
    with pytest.raises(round_candidates.RecordingError, match="cannot be recorded"):
        run(bench, console)
    left = read(bench.out, "round")
    assert not left.finished
    assert [list(case.candidates) for case in left.cases.values()] == [["released", "afd simultaneous fp32"]] * 2
    assert left.cases[WHOLE].candidates["released"].figures["share"] > 0


@pytest.mark.parametrize("graphs", [False, True])
def test_candidates_by_name(graphs, log, monkeypatch):
    monkeypatch.setattr(rounds, "released", lambda _case: (print, print))
    case = round_candidates.case("small", 2, 1, CPU)
    found = rounds.candidates(case, ["simultaneous", "alternating"], ["fp32"], graphs)
    plain = ["released", "afd simultaneous fp32", "afd alternating fp32"]
    assert [name for name in found if not name.endswith(" graph")] == plain
    assert [name for name in found if name.endswith(" graph")] == [f"{name} graph" for name in plain[1:]] * graphs


def test_both_parts_are_written_and_graphs_have_bars(tmp_path, console, monkeypatch):
    names = ["released", "afd simultaneous fp32", "afd simultaneous fp32 graph"]
    monkeypatch.setattr(rounds, "candidates", lambda *_, **__: dict.fromkeys(names, (lambda: None, lambda: None)))
    bench = rounds.RoundBench(batch=2, steps=1, rounds=2, out=tmp_path / "r.json")
    made = run(bench, console)
    assert read(bench.out, "round") == made
    assert list(made.cases) == [WHOLE, OUTSIDE]
    for name in names:
        whole, outside = (made.cases[part].candidates[name] for part in (WHOLE, OUTSIDE))
        assert whole.figures["share"] == pytest.approx(outside.median / whole.median)
        assert outside.figures["share"] is None
    lines = list(bench.remarks(made.cases))
    assert [line.split(":")[0] for line in lines] == names[1:]
    assert all("1.7x the released round? " in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", rounds.PRECISIONS)
@pytest.mark.parametrize("schedule", rounds.SCHEDULES)
def test_whole_rounds_are_recorded_on_the_device(schedule, precision, cuda, monkeypatch):
    """A refusal would raise; and timed calls do nothing that waits for the device."""
    case = round_candidates.case("small", 8, 2, cuda)
    played = {"graph": round_candidates.recorded(case, precision, schedule)}
    clock = timing.between_events

    def strict(call):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return clock(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(timing, "between_events", strict)
    found = dict(rounds.measure(played, rounds=3, warmup=rounds.WARMUP["cuda"], device=cuda))
    assert all(taken["graph"].p50 > 0 for taken in found.values())
