"""Precision auto: attacks in bfloat16, figures in float32, and the check that fails where bfloat16 misleads."""

import json

import pytest
import torch
from torch import nn

from afd.cli import main
from afd.data import Images
from afd.evaluation import confirm as confirming
from afd.evaluation import evaluate, runner
from afd.evaluation.attacks import Epsilon
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.outcome import read_results
from afd.evaluation.protocol import quick
from afd.evaluation.store import StateError
from afd.ops import backend

EPS = "0.0525"
NAME = "float32 beats bfloat16"


class Brightest(nn.Module):
    """Logits are the pixels, by a product that autocast computes in bfloat16."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift
        self.register_buffer("eye", torch.eye(3))

    def forward(self, x):
        shifted = nn.functional.linear(x.flatten(1), self.eye, torch.full((3,), self.shift))
        return 20 * (shifted - self.shift).relu()


def lost_in_bf16():
    """Pixels on top of 512 are all the same in bfloat16, and what is taken off again has no slope at zero."""
    return Brightest(512.0)


@pytest.fixture(autouse=True)
def fast_bf16(monkeypatch):
    monkeypatch.setattr(backend, "fast_bf16", lambda _: True)


@pytest.fixture
def bright():
    pixels = torch.randint(0, 101, (150, 1, 1, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return Images(pixels, pixels.flatten(1).argmax(1), scale=100.0, num_classes=3, name="bright")


def withstand(images, eps=0.0525):
    top = images.images().flatten(1).topk(2).values
    return top[:, 0] - top[:, 1] > 2 * eps + 1e-6


def found(model, images, **options):
    result = evaluate(model, images.images(), images.labels, EPS, protocol="quick", **options)
    return result, result.content["precision"]


def test_an_honest_model_withstands_in_both(bright):
    result, precision = found(Brightest(), bright, precision="auto")
    left = withstand(bright)
    assert torch.equal(result.broken, ~left)
    assert (precision["asked"], precision["attacks"]) == ("auto", "bf16")
    said = precision["confirmed"]
    assert (said["robust"], said["drawn"], said["fell"]) == (int(left.sum()), 100, 0)
    assert said["points"] > 0
    assert result.checks[NAME].verdict == "pass"
    assert "in float32, 0 of 100 robust images fell that were drawn at random" in str(result)


class Rugged(nn.Module):
    """No products, so bfloat16 changes nothing; what breaks an image hangs on where an attack starts."""

    def forward(self, x):
        waves = sum((speed * x.flatten(1)).sin().sum(1) for speed in (900, 2100))
        return torch.stack([0 * waves, waves - 5], 1)


def test_the_drawn_images_meet_the_draws_that_they_met(bright):
    """With others, of the many images that the first draws left some would fall, to no fault of bfloat16."""
    images = bright.images()
    y = Rugged()(images).argmax(1)
    options = {"protocol": "quick", "batch_size": 40}
    result = evaluate(Rugged(), images, y, "0.02", precision="auto", **options)
    plain, other = (evaluate(Rugged(), images, y, "0.02", seed=seed, **options) for seed in (0, 1))
    assert torch.equal(result.broken, plain.broken)
    assert (other.broken & ~plain.broken).sum() > 5
    said = result.content["precision"]["confirmed"]
    assert (said["drawn"], said["fell"]) == (min(100, said["robust"]), 0)
    assert 40 < said["robust"] < 150


def test_a_model_that_bfloat16_cannot_see_fails_the_check(bright):
    result, precision = found(lost_in_bf16(), bright, precision="auto")
    honest, plain = found(lost_in_bf16(), bright)
    assert torch.equal(honest.broken, ~withstand(bright, 0.0525 - 1e-4))  # 512 leaves float32 four digits
    assert (plain, NAME in honest.checks) == ({"asked": "fp32", "attacks": "fp32", "confirmed": None}, False)
    assert result.robust_accuracy > honest.robust_accuracy + 0.1
    check = result.checks[NAME]
    assert (check.verdict, result.verdict) == ("fail", "fail")
    assert check.number == precision["confirmed"]["fell"] > 5
    assert check.unit == "of 100 robust images"
    assert f"{check.number} of 100 robust images fell" in str(result)


def test_a_success_in_bfloat16_counts_only_where_float32_agrees(bright):
    """Attacks see one class for all images: what they take for fooled is not."""
    result, _ = found(lost_in_bf16(), bright, precision="auto")
    x_adv = result.adversarial
    assert torch.equal(lost_in_bf16()(x_adv).argmax(1) != bright.labels, result.broken)


def test_float32_looks_at_the_best_point_of_what_bfloat16_left(bright, monkeypatch):
    """An attack that goes to the worst corner of each ball, and a model that bfloat16 finds right there."""

    def corner(target, **_):
        def attack(x, y, **_where):
            sign = 1 - 2 * torch.nn.functional.one_hot(y, 3).view(x.shape)
            return (x + target.eps * sign).clamp(0, 1)

        return attack

    from afd.evaluation import attacks

    kinds = {name: attacks.Kind(corner, lambda _: 1) for name in ("pgd", "apgd-ce")}
    for name, kind in kinds.items():
        monkeypatch.setitem(attacks.ATTACKS, name, kind)
    monkeypatch.setattr(runner.Runner, "predict_in_bf16", lambda _, x: _nearest(bright, x))
    result, precision = found(Brightest(), bright, precision="auto")
    broken = int((~withstand(bright)).sum())
    assert torch.equal(result.broken, ~withstand(bright))
    assert precision["confirmed"]["broke"] >= 2 * broken  # of both attacks, and of probes


def _nearest(images, x):
    """The label of the clean image that each is nearest to: as if bfloat16 were never fooled."""
    clean = images.images().flatten(1)
    return images.labels[(x.flatten(1)[:, None] - clean[None]).abs().amax(2).argmin(1)]


def test_few_robust_images_are_all_attacked_again_and_none_is_no_failure(bright):
    _, few = found(Brightest(), bright.take(torch.arange(20)), precision="auto")
    assert few["confirmed"]["drawn"] == few["confirmed"]["robust"] == int(withstand(bright)[:20].sum())
    none, precision = found(Brightest(), bright.take((~withstand(bright)).nonzero()[:10, 0]), precision="auto")
    assert precision["confirmed"] | {"points": 0} == {"points": 0, "broke": 0, "robust": 0, "drawn": 0, "fell": 0}
    assert none.checks[NAME].verdict == "pass"


def test_the_drawn_images_are_drawn_by_seed(bright, monkeypatch):
    drawn = []
    take = Images.take

    def noted(self, index):
        drawn.append(index.tolist())
        return take(self, index)

    from afd.evaluation.model import Given

    monkeypatch.setattr(confirming, "DRAWN", 5)
    monkeypatch.setattr(Given, "take", noted, raising=False)
    for seed in (0, 0, 1):
        found(Brightest(), bright, precision="auto", seed=seed)
    robust = set(withstand(bright).nonzero()[:, 0].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len({*one}) == 5 and {*one} <= robust for one in drawn)


def test_where_bfloat16_is_not_fast_nothing_is_to_confirm(bright, monkeypatch):
    monkeypatch.setattr(backend, "fast_bf16", lambda _: False)
    result, precision = found(lost_in_bf16(), bright, precision="auto")
    assert precision == {"asked": "auto", "attacks": "fp32", "confirmed": None}
    assert result.checks[NAME].verdict == "skipped"
    assert result.robust_accuracy == found(lost_in_bf16(), bright)[0].robust_accuracy


# --- In a folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(bright, tmp_path):
    eps = Epsilon.of(EPS)

    def run(out="out", **options):
        model = Model("model", "test", lost_in_bf16())
        return evaluate_to_folder(model, bright, quick("Linf", (eps,), eps), tmp_path / out, batch_size=150, **options)

    return run


def test_it_goes_on_where_it_was_stopped_also_among_the_drawn(kept, tmp_path, monkeypatch):
    whole = kept("whole", precision="auto")
    save = confirming.Runner.compute

    def stopped(self, batch, item, rows, started):
        if item.stage.name == "float32-apgd-ce":
            raise KeyboardInterrupt
        return save(self, batch, item, rows, started)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "compute", stopped)
        with pytest.raises(KeyboardInterrupt):
            kept(precision="auto")
    state = {path.name for path in (tmp_path / "out" / "state").iterdir()}
    assert "float32-pgd-20.0.0.pt" in state
    with pytest.raises(StateError, match="differs in settings"):
        kept()
    monkeypatch.setattr(runner.Runner, "compute", noted := Noted(save))
    again = kept(precision="auto")
    assert {*noted.stages} == {"float32-apgd-ce"}
    strip = json.dumps([again[key] for key in ("clean", "worst_case", "checks", "precision")])
    assert strip == json.dumps([whole[key] for key in ("clean", "worst_case", "checks", "precision")])
    assert again["settings"]["precision"] == "auto"


def Noted(compute):
    """`compute`, which notes the stages that it is called for."""

    def noted(self, batch, item, rows, started):
        noted.stages.append(item.stage.name)
        return compute(self, batch, item, rows, started)

    noted.stages = []
    return noted


def test_the_report_says_it_beside_the_figure(kept, tmp_path):
    results = kept(precision="auto")
    fell = results["precision"]["confirmed"]["fell"]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"in float32, {fell} of 100 robust images fell that were drawn at random" in report
    assert NAME in report
    assert "<dt>precision</dt><dd>auto (attacks: bf16)</dd>" in report
    assert "--precision fp32" in report
    assert read_results(tmp_path / "out")["precision"] == results["precision"]


def test_the_command_says_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_of_confirm.py").write_text(
        "import torch\ndef model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afd.evaluation.protocol.QUICK_QUERIES", 2)
    words = ["evaluate", "mine_of_confirm:model", "--data", "digits", "--images", "60", "--eps", "0.001"]
    assert main([*words, "--precision", "auto", "--out", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "attacked in bfloat16; in float32, " in said
    assert "float32 beats" in said
    assert main([*words, "--precision", "bf16", "--out", "other"]) == 2
