"""The runner on a classifier whose robust accuracy is known, and all that may happen to it on the way."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import nn

from afd.attacks.ball import NORMS, Ball
from afd.data import Images
from afd.evaluation import attacks
from afd.evaluation.attacks import Epsilon, ascending
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.outcome import Outcome, ShardingError, withstood
from afd.evaluation.protocol import Protocol, Stage, probes
from afd.evaluation.runner import AttackFailedError, Runner
from afd.evaluation.store import StateError, Store, saved_fingerprint
from afd.metrics import unpacked
from afd.runtime import Group

RADII = ascending(["0.0525", "0.1025", "0.2025", "0.4025"])  # no half margin: those are multiples of 0.005
COUNT = 23


class Brightest(nn.Module):
    """Logits are the three pixels: an L∞ attack needs half of the margin between the two brightest."""

    def forward(self, x):
        assert not self.training
        return 20 * x.flatten(1)


def pixels():
    return torch.randint(0, 101, (COUNT, 1, 1, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture
def data():
    taken = pixels()
    labels = taken.flatten(1).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3  # these are wrong from the start
    return Images(taken, labels, scale=100.0, num_classes=3, name="bright")


def margins():
    top = pixels().flatten(1).double().topk(2).values / 100
    half = (top[:, 0] - top[:, 1]) / 2
    half[:3] = -1
    return half


def robust_at(eps):
    return float((margins() > float(eps) + 1e-9).double().mean())


class Silent:
    def start(self, work):
        self.work, self.done, self.heard = work, 0, 0

    def moved(self, work, text):  # noqa: ARG002
        self.done += work
        self.heard += 1


class Impatient(Silent):
    """Interrupts after so many work items."""

    def __init__(self, items):
        self.items = items

    def moved(self, work, text):
        super().moved(work, text)
        if self.heard == self.items:
            raise KeyboardInterrupt


def runner(data, protocol, folder, *, meter=None, group=None, batch_size=7, count=None):
    return Runner(
        model=Brightest(), surrogates=(), images=data, classes=3, protocol=protocol,
        store=Store(folder, {"protocol": protocol.as_json()}), group=group or Group(), seed=0,
        batch_size=batch_size, meter=meter or Silent(), count=count,
    )  # fmt: skip


def protocol(*stages):
    return Protocol("quick", "Linf", Epsilon(Fraction("0.1025")), stages)


PGD = Stage("pgd", "pgd", "Linf", RADII, {"steps": 30})
WEAK = Stage("weak", "noise", "Linf", RADII, {"draws": 1}, scope="correct")


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("scope", ["survivors", "correct", "remaining"])
def test_accuracy_is_the_share_of_larger_margins(data, tmp_path, scope, batch_size):
    stage = dataclasses.replace(PGD, scope=scope)
    outcome = runner(data, protocol(stage), tmp_path, batch_size=batch_size).run()
    assert outcome.accuracies(stage) == pytest.approx([robust_at(eps) for eps in RADII])
    assert len(set(outcome.accuracies(stage))) == 4
    assert outcome.worst_case("Linf") == pytest.approx({str(eps): robust_at(eps) for eps in RADII})
    assert outcome.worst_case("L2") == {}


def test_it_is_told_of_each_image_whether_it_was_withstood(data, tmp_path):
    probe = dataclasses.replace(WEAK, name="probe", role="probe")
    found = withstood(runner(data, protocol(WEAK, PGD, probe), tmp_path).run())
    assert torch.equal(unpacked(found["clean"], COUNT), margins() >= 0)
    assert found["stages"].keys() == {"weak", "pgd"}
    assert found["worst_case"].keys() == {"Linf"}
    for eps in RADII:
        robust = margins() > float(eps)
        assert torch.equal(unpacked(found["stages"]["pgd"][str(eps)], COUNT), robust)
        assert torch.equal(unpacked(found["worst_case"]["Linf"][str(eps)], COUNT), robust)
        assert not (robust & ~unpacked(found["stages"]["weak"][str(eps)], COUNT)).any()


def test_a_sweep_goes_on_from_what_is_left(data, tmp_path):
    outcome = runner(data, protocol(PGD), tmp_path).run()
    right = COUNT - 3
    left = [round(COUNT * robust_at(eps)) for eps in RADII]
    assert outcome.counts["pgd"]["attacked"] == right + sum(left[:-1])


def test_all_attacks_every_image_and_counts_the_wrong_ones(data, tmp_path):
    stage = dataclasses.replace(PGD, scope="all", epsilons=RADII[:1])
    outcome = runner(data, protocol(stage), tmp_path).run()
    assert outcome.counts["pgd"]["attacked"] == COUNT
    assert outcome.found["pgd"].sum() >= COUNT - round(COUNT * robust_at("0.0525"))


def test_first_limits_a_stage(data, tmp_path):
    stage = dataclasses.replace(PGD, first=10)
    outcome = runner(data, protocol(stage), tmp_path).run()
    assert not outcome.found["pgd"][:, 10:].any()
    assert outcome.accuracies(stage)[0] == pytest.approx(float((margins()[:10] > 0.0525 + 1e-9).double().mean()))


def test_a_cascade_attacks_what_the_stage_before_it_left(data, tmp_path):
    first, second = (dataclasses.replace(PGD, name=name, scope="remaining", epsilons=RADII[1:3]) for name in "ab")
    both = protocol(first, second)
    assert [(item.stage.name, item.positions) for item in both.order()] == [
        ("a", (0,)),
        ("b", (0,)),
        ("a", (1,)),
        ("b", (1,)),
    ]
    outcome = runner(data, both, tmp_path).run()
    assert outcome.counts["b"]["attacked"] == sum(round(COUNT * robust_at(eps)) for eps in RADII[1:3])
    assert outcome.accuracies(second) == pytest.approx([robust_at(eps) for eps in RADII[1:3]])


def test_the_worst_case_is_taken_image_by_image(data, tmp_path, monkeypatch):
    """One attack fools the model on even images, one on odd ones: together they leave nothing."""

    def parity(which):
        def build(target):
            strong = attacks.pgd(target, steps=30)

            def attack(x, y, *, seed=None, first_sample=0):
                rows = (x.flatten(1)[:, 0] * 100).round().long() % 2 == which
                return torch.where(rows.view(-1, 1, 1, 1), strong(x, y), x)

            return attack

        return attacks.Kind(build, lambda _: 1)

    for name, which in (("even", 0), ("odd", 1)):
        monkeypatch.setitem(attacks.ATTACKS, name, parity(which))
    stages = [Stage(name, name, "Linf", RADII) for name in ("even", "odd")]
    outcome = runner(data, protocol(*stages), tmp_path).run()
    alone = [outcome.accuracies(stage)[2] for stage in stages]
    assert min(alone) > outcome.worst_case("Linf")["0.2025"] == pytest.approx(robust_at("0.2025"))


def test_a_minimal_attack_that_fails_leaves_the_clean_image_to_be_counted(data, tmp_path, monkeypatch):
    """What it returns then, a black image say, is no adversarial image, and is not judged as one."""
    black = attacks.Kind(lambda target: lambda x, y, **_: torch.zeros_like(x), lambda _: 1, minimal=True)  # noqa: ARG005
    monkeypatch.setitem(attacks.ATTACKS, "black", black)
    kept = Images(
        data.pixels, pixels().flatten(1).argmin(1) * 0, 100.0, 3, "bright"
    )  # black is class 0, like all labels
    stage = Stage("black", "black", "Linf", RADII)

    def count(x, y):
        return {"judged": len(y), "bright": int((x.flatten(1).amax(1) == x.flatten(1)[:, 0]).sum())}

    outcome = runner(kept, protocol(stage), tmp_path, count=count).run()
    right = int(outcome.correct.sum())
    assert right > 3
    assert [outcome.counts["black"][f"{i} bright"] for i in range(4)] == [outcome.counts["clean"]["bright"]] * 4
    assert not outcome.found["black"].any()


def test_what_leaves_the_ball_or_the_image_does_not_count(data, tmp_path, monkeypatch):
    def far(target):
        return lambda x, *_, **__: 1 - x

    def outside(target):
        return lambda x, y, **__: x - 1.05 * torch.nn.functional.one_hot(y, 3).view(x.shape)

    def nothing(target):
        return lambda x, *_, **__: x * float("nan")

    for build in (far, outside, nothing):
        monkeypatch.setitem(attacks.ATTACKS, "wild", attacks.Kind(build, lambda _: 1))
        stage = Stage("wild", "wild", "Linf", RADII[:1] if build is far else ascending(["2"]))
        outcome = runner(data, protocol(stage), tmp_path / build.__name__).run()
        assert outcome.counts["wild"]["illegal"] > 10
        assert outcome.accuracies(stage)[0] >= outcome.counts["wild"]["illegal"] / COUNT


def test_an_interrupted_run_goes_on_and_ends_the_same(data, tmp_path, monkeypatch):
    wanted = protocol(PGD, WEAK, dataclasses.replace(PGD, name="again", scope="remaining"))
    calls = []

    def counting(target, **settings):
        attack = attacks.pgd(target, **settings)

        def counted(x, y, **where):
            calls.append(where)
            return attack(x, y, **where)

        return counted

    monkeypatch.setitem(attacks.ATTACKS, "pgd", dataclasses.replace(attacks.ATTACKS["pgd"], build=counting))
    whole = runner(data, wanted, tmp_path / "whole").run()
    needed, done = len(calls), 0
    calls.clear()
    for items in (1, 5, 9, 17):
        with pytest.raises(KeyboardInterrupt):
            runner(data, wanted, tmp_path / "parts", meter=Impatient(items)).run()
    resumed = runner(data, wanted, tmp_path / "parts").run()
    done = len(calls)
    assert done == needed
    for name in whole.found:
        assert torch.equal(whole.found[name], resumed.found[name])
    strip = {name: {k: v for k, v in c.items() if k != "milliseconds"} for name, c in whole.counts.items()}
    assert strip == {name: {k: v for k, v in c.items() if k != "milliseconds"} for name, c in resumed.counts.items()}


def test_a_failing_attack_names_its_batch_and_loses_nothing(data, tmp_path, monkeypatch):
    calm = runner(data, protocol(PGD), tmp_path / "calm").run()
    build = attacks.pgd
    attacked = []

    def fragile(target, **settings):
        attack = build(target, **settings)

        def call(x, y, *, first_sample, seed=None):
            attacked.extend(first_sample.tolist())
            if broken and first_sample.min() >= 14:
                raise RuntimeError("out of luck")
            return attack(x, y, first_sample=first_sample)

        return call

    monkeypatch.setitem(attacks.ATTACKS, "pgd", dataclasses.replace(attacks.ATTACKS["pgd"], build=fragile))
    broken = True
    words = (
        r"pgd at ε = 0.0525 failed on batch 3 \(images 14 to 20\) with RuntimeError: out of luck; .*goes on from there"
    )
    with pytest.raises(AttackFailedError, match=words):
        runner(data, protocol(PGD), tmp_path / "parts").run()
    broken = False
    attacked.clear()
    outcome = runner(data, protocol(PGD), tmp_path / "parts").run()
    assert min(attacked) >= 14
    assert torch.equal(outcome.found["pgd"], calm.found["pgd"])


def test_state_of_another_run_is_refused(data, tmp_path):
    runner(data, protocol(PGD), tmp_path).run()
    with pytest.raises(StateError, match="differs in protocol"):
        runner(data, protocol(WEAK), tmp_path)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda _: b"no tensors"])
def test_a_damaged_work_item_is_computed_again_and_said(data, tmp_path, capsys, damage):
    whole = runner(data, protocol(PGD), tmp_path).run()
    kept = tmp_path / "pgd.0.1.pt"
    kept.write_bytes(damage(kept.read_bytes()))
    again = runner(data, protocol(PGD), tmp_path).run()
    assert "pgd.0.1.pt is damaged; what it held is computed again" in capsys.readouterr().err
    assert torch.equal(again.found["pgd"], whole.found["pgd"])
    assert Store(tmp_path, {"protocol": protocol(PGD).as_json()}).load("pgd.0.1") is not None


@pytest.mark.parametrize("content", [None, b"", b'{"protocol": {"na'])
def test_results_of_nobody_knows_which_evaluation_are_not_taken_for_ours(data, tmp_path, content):
    runner(data, protocol(PGD), tmp_path).run()
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StateError, match=r"run\.json is (missing|damaged), so that nobody can say .* --overwrite"):
        runner(data, protocol(PGD), tmp_path)


def test_a_fingerprint_that_was_cut_short_before_any_result_is_written_again(tmp_path):
    (tmp_path / "run.json").write_text('{"protocol": ')
    Store(tmp_path, {"protocol": 1})
    assert saved_fingerprint(tmp_path) == {"protocol": 1}


def test_processes_share_the_batches_and_find_the_same(data, tmp_path, monkeypatch):
    alone = runner(data, protocol(PGD, WEAK), tmp_path / "alone").run()
    monkeypatch.setattr(Outcome, "gathered", lambda self, _: self)
    parts = [runner(data, protocol(PGD, WEAK), tmp_path / "shared", group=Group(rank, 3)).run() for rank in range(3)]
    assert torch.equal(sum(part.seen for part in parts), torch.ones(COUNT, dtype=torch.int64))
    for name in alone.found:
        assert torch.equal(sum(part.found[name].int() for part in parts).bool(), alone.found[name])


def test_an_image_seen_twice_is_an_error(data):
    outcome = Outcome.empty(protocol(PGD), COUNT)
    for first in (0, 7, 7, 14):
        outcome.clean(first, torch.ones(7, dtype=torch.bool), {})
    with pytest.raises(ShardingError, match="9 of 23 images"):
        outcome.gathered(Group())


def test_progress_ends_at_all_the_work(data, tmp_path):
    meter = Silent()
    runner(data, protocol(PGD, WEAK), tmp_path, meter=meter).run()
    assert meter.done == meter.work > 0


def test_count_sees_the_images_as_the_attack_leaves_them(data, tmp_path):
    seen = []

    def count(x, y):
        seen.append(x)
        return {"judged": len(y), "moved": int((x != x.round(decimals=2)).flatten(1).any(1).sum())}

    outcome = runner(data, protocol(PGD), tmp_path, count=count).run()
    right = COUNT - 3
    assert outcome.counts["clean"]["judged"] == right
    assert outcome.counts["clean"]["moved"] == 0
    assert [outcome.counts["pgd"][f"{i} judged"] for i in range(4)] == [right] * 4
    assert all(outcome.counts["pgd"][f"{i} moved"] > 0 for i in range(4))


def test_evaluate_gives_the_exact_figure_and_cleans_up(data, tmp_path):
    reference = Epsilon.of("0.1025")
    wanted = Protocol("quick", "Linf", reference, (PGD, *probes("Linf", reference)[:5]))
    results = evaluate_to_folder(Model("brightest", "test", Brightest()), data, wanted, tmp_path / "out", batch_size=7)
    assert results["worst_case"]["Linf"]["0.1025"] == pytest.approx(robust_at("0.1025"))
    assert results["clean"] == pytest.approx(20 / 23)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.png", "examples.png", "report.html", "results.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "expected"), [("Linf", [0.5, 0.2, 0.4]), ("L2", [0.8, 0.4, 0.4]), ("L1", [0.6, 0.3, 0.4])]
)
def test_shorten_pulls_back_into_the_ball(norm, expected):
    x = torch.tensor([0.2, 0.1, 0.4]).view(1, 1, 1, 3)
    x_adv = torch.tensor([0.8, 0.2 if norm == "Linf" else 0.4, 0.4]).view(1, 1, 1, 3)
    radius = {"Linf": 0.3, "L2": 2.0, "L1": 0.6}[norm]
    ball = Ball(norm, radius)
    found = ball.shorten(x_adv, x)
    assert found.flatten().tolist() == pytest.approx(expected)
    assert ball.holds(ball.distance(found, x)).all()


def test_a_minimal_attack_is_judged_where_it_is_pulled_back(data, tmp_path, monkeypatch):
    """What it finds lies far behind the boundary, so the pulled-back image fools at every radius that can."""

    def far(target):
        return lambda x, y, **_: 1 - torch.nn.functional.one_hot(y, 3).view(x.shape).float()

    monkeypatch.setitem(attacks.ATTACKS, "far", attacks.Kind(far, lambda _: 1, minimal=True))
    stage = Stage("far", "far", "Linf", RADII)
    assert [item.positions for item in stage.work_items] == [(0, 1, 2, 3)]
    outcome = runner(data, protocol(stage), tmp_path).run()
    assert outcome.accuracies(stage) == pytest.approx([robust_at(eps) for eps in RADII])
    assert outcome.counts["far"]["attacked"] == COUNT - 3


@pytest.mark.parametrize(("norm", "length"), [("Linf", 0.5), ("L2", (0.25 + 0.09) ** 0.5), ("L1", 0.8)])
def test_distance(norm, length):
    x = torch.zeros(2, 1, 1, 3)
    x_adv = torch.tensor([[0.5, -0.3, 0], [0, 0, 0]]).view(2, 1, 1, 3)
    found = NORMS[norm].distance(x_adv, x)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([length, 0])
    assert Ball(norm, length).holds(found).all()
    assert not Ball(norm, 0.999 * length).holds(found)[0]
