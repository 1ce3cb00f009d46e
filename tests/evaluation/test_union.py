"""Evaluation in several balls: each as if alone, and all of them together, image by image."""

import json

import pytest
import torch

from afd import config as configs
from afd.checkpoint import load_checkpoint, save_checkpoint
from afd.cli import main
from afd.config import DataConfig, ModelConfig, TrainConfig
from afd.errors import InputError
from afd.evaluation import protocol as protocols
from afd.evaluation.attacks import Epsilon
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.outcome import Outcome, read_results
from afd.evaluation.protocol import Protocol, Stage, in_union, named, probes
from afd.evaluation.report import union_table
from afd.presets import method_for

BALLS = {"Linf": Epsilon.of("0.12"), "L2": Epsilon.of("1/2"), "L1": Epsilon.of("1.5")}
WORDS = "Linf=0.12,L2=1/2,L1=1.5"


@pytest.fixture(autouse=True, scope="module")
def few_queries():
    """Square's queries have their tests elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "QUICK_QUERIES", 2)
        yield


def cascade(norm, epsilons, reference):
    stages = [
        Stage(name, attack, norm, tuple(epsilons), chosen, scope="remaining")
        for name, attack, chosen in (("first", "pgd", {"steps": 1}), ("second", "pgd", {"steps": 10}))
    ]
    return Protocol("cascade", norm, reference, (*stages, *probes(norm, reference, queries=2)))


@pytest.fixture(scope="module")
def found(robust, images, tmp_path_factory):
    """Results of a cascade in all balls, and in each alone."""
    out = tmp_path_factory.mktemp("cascades")
    model = Model("robust", "test", robust)
    union = evaluate_to_folder(model, images, in_union(cascade, BALLS), out / "union", batch_size=60)
    alone = {
        norm: evaluate_to_folder(model, images, cascade(norm, (eps,), eps), out / norm, batch_size=60)
        for norm, eps in BALLS.items()
    }
    return union, alone


def test_each_ball_is_evaluated_as_if_alone(found):
    union, alone = found
    by_norm = {ball["norm"]: ball for ball in union["union"]["balls"]}
    assert [*by_norm] == ["Linf", "L2", "L1"]
    for norm, one in alone.items():
        assert one["union"] is None
        assert by_norm[norm]["accuracy"] == one["worst_case"][norm][str(BALLS[norm])]
        assert by_norm[norm]["fraction"] == str(BALLS[norm].exact)
        attacks = {attack["name"]: attack for attack in union["attacks"]}
        for attack in (attack for attack in one["attacks"] if attack["role"] == "score"):
            twin = attacks[f"{attack['name']}-{norm.lower()}"]
            assert (twin["attacked"], twin["accuracies"]) == (attack["attacked"], attack["accuracies"])


def test_the_checks_are_those_of_the_first_ball(found):
    union, alone = found
    of_first = {check["name"]: check["number"] for check in alone["Linf"]["checks"]}
    summed = ("re-verification", "not finite under attack", "robust to a blind attack")
    for check in union["checks"]:
        if check["name"] not in summed:
            assert check["number"] == of_first[check["name"]]


def test_an_image_counts_only_where_it_withstands_everything_in_every_ball():
    protocol = in_union(cascade, BALLS)
    outcome = Outcome.empty(protocol, 8)
    outcome.correct = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]).bool()
    for stage, image in (("first-linf", 0), ("second-linf", 1), ("second-l2", 2), ("second-l2", 0), ("first-l1", 3)):
        outcome.found[stage][0, image] = True
    outcome.found["probe-pgd-20"][0, 4] = True  # looks for self-deception only
    union = outcome.union()
    assert [ball["accuracy"] for ball in union["balls"]] == [5 / 8, 5 / 8, 6 / 8]
    assert union["accuracy"] == 3 / 8
    assert outcome.withstands("L2", BALLS["L2"]).tolist() == [False, True, False, True, True, True, True, False]


def test_the_union_is_no_more_than_any_ball_and_no_less_than_what_they_lose_together(found):
    union = found[0]["union"]
    alone = [ball["accuracy"] for ball in union["balls"]]
    clean = found[0]["clean"]
    assert clean - sum(clean - one for one in alone) <= union["accuracy"] <= min(alone)
    assert union["accuracy"] < min(alone)  # no ball says it by itself


@pytest.mark.parametrize("name", ["quick", "autoattack"])
def test_named_protocols_are_run_in_every_ball(name):
    options = {"data": "digits", "norm": "Linf", "epsilons": None, "trained_at": Epsilon.of("0.2")}
    protocol = named(name, **options, union=BALLS)
    alone = named(name, **options | {"epsilons": (BALLS["Linf"],)})
    scored = [stage for stage in alone.stages if stage.role == "score"]
    names = [stage.name for stage in protocol.stages if stage.role == "score"]
    assert names == [f"{stage.name}-{norm}" for norm in ("linf", "l2", "l1") for stage in scored]
    assert (protocol.norm, protocol.reference, protocol.name) == ("Linf", BALLS["Linf"], name)
    assert [stage for stage in protocol.stages if stage.role == "probe"] == [
        stage for stage in alone.stages if stage.role == "probe"
    ]
    assert protocol.as_json()["union"]["L2"]["fraction"] == "1/2"
    assert "union" not in alone.as_json()  # unfinished evaluations of before go on
    for stage in protocol.stages:
        if stage.role == "score":
            assert stage.epsilons == (BALLS[stage.norm],)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("paper", {}, "union is set, but the paper's protocol has its own radii and norms; leave it out"),
        ("quick", {"epsilons": (Epsilon.of("0.1"),)}, "union is set, and eps or norm too; it names the radius in each"),
        ("quick", {"norm": "L2"}, "union is set, and eps or norm too"),
        ("quick", {"union": {"L2": Epsilon.of("0")}}, "union has a radius of 0, where nothing is attacked"),
    ],
)
def test_what_does_not_go_with_a_union_is_named(name, given, message):
    options = {"data": "digits", "norm": "Linf", "epsilons": None, "trained_at": Epsilon.of("0.2"), "union": BALLS}
    with pytest.raises(InputError, match=message):
        named(name, **options | given)


# --- From the command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of a minute's small sister: AT against one of three balls for each image."""
    out = tmp_path_factory.mktemp("runs") / "union"
    words = "train at --attack union --attack-choice random --eps 0.1 --eps-l1 none --data digits --limit 60"
    words += " --epochs 1 --width 4 --attack-steps 2 --eval-steps 2 --batch-size 30"
    assert main([*words.split(), "--out", str(out)]) == 0
    return out


def test_a_run_says_in_what_balls_it_was_validated_and_tested(trained, capsys, tmp_path):
    result = json.loads((trained / "result.json").read_text())
    assert result["union"] == {"Linf": 0.1, "L2": 0.75}
    assert result.keys().isdisjoint({"norm", "eps"})
    run = (trained / "run.toml").read_text()
    assert 'name = "union"' in run
    assert "eps_l1" not in run
    again = ["train", "--config", str(trained / "run.toml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert "eps 0.1 in Linf, 0.75 in L2" in " ".join(capsys.readouterr().out.replace("┃", " ").split())
    assert (tmp_path / "again" / "run.toml").read_text() == run
    twin = json.loads((tmp_path / "again" / "result.json").read_text())
    assert twin["measured"] == result["measured"]
    states = [load_checkpoint(folder / "last.pt")[0]["model"] for folder in (trained, tmp_path / "again")]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_a_checkpoint_that_was_trained_in_a_union_is_evaluated_in_it(trained, tmp_path, capsys):
    assert main(["evaluate", str(trained), "--images", "40", "--out", str(tmp_path / "own")]) == 0
    own = read_results(tmp_path / "own")
    assert [(ball["norm"], ball["text"]) for ball in own["union"]["balls"]] == [("Linf", "0.1"), ("L2", "0.75")]
    told = " ".join(capsys.readouterr().out.split())
    assert "all balls" in told
    assert "Union of balls: accuracy (%) on digits, protocol quick" in told
    page = (tmp_path / "own" / "report.html").read_text()
    assert "union of L∞ ε = 0.1, L2 ε = 0.75" in page
    assert "Union of balls: accuracy (%) on digits" in page
    alone = ["evaluate", str(trained), "--images", "40", "--eps", "0.1", "--out", str(tmp_path / "alone")]
    assert main(alone) == 0
    assert read_results(tmp_path / "alone")["union"] is None


def test_any_checkpoint_is_evaluated_in_balls_that_are_named_and_compared(robust, tmp_path, capsys):
    method = method_for("digits", "natural")
    config = TrainConfig(data=DataConfig("digits"), model=ModelConfig("convnet", 8), method=method).settled()
    path = tmp_path / "robust.pt"
    save_checkpoint(path, {"model": robust.state_dict(), "players": {}}, {"config": config.as_json()})
    command = ["evaluate", str(path), "--images", "40"]
    assert main([*command, "--union", WORDS, "--out", str(tmp_path / "three")]) == 0
    assert main([*command, "--union", "L2=0.5", "--out", str(tmp_path / "one")]) == 0
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    three, one, plain = (read_results(tmp_path / name) for name in ("three", "one", "plain"))
    balls = {ball["norm"]: ball["accuracy"] for ball in three["union"]["balls"]}
    assert one["union"]["accuracy"] == one["union"]["balls"][0]["accuracy"] == balls["L2"]
    assert plain["union"] is None
    del plain["union"]  # as results of before are
    (tmp_path / "plain" / "results.json").write_text(json.dumps(plain))
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("three", "one", "plain")]
    assert main(["compare", "--results", *folders, "--out", str(tmp_path / "compared")]) == 0
    table = union_table([three, one, plain])
    assert table.head == ("method", "clean", "L∞ ε = 0.12", "L2 ε = 0.5", "L1 ε = 1.5", "union")
    assert table.rows[1][2] == table.rows[1][4] == "-"
    assert len(table.rows) == 2
    assert "Union of balls" in capsys.readouterr().out
    assert "Union of balls" in (tmp_path / "compared" / "tables.md").read_text()
    assert (tmp_path / "compared" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--union", "L2"], "union is 'L2'; a union is written NORM=RADIUS"),
        (["--union", "L3=1"], "a norm of union is 'L3'; allowed are Linf, L2, L1"),
        (["--union", "L2=-1"], "eps is -1; it must be at least 0"),
        (["--union", "L2=much"], "eps is 'much'; it must be a number"),
        (["--union", "L2=1", "--eps", "0.1"], "union is set, and eps or norm too"),
        (["--union", "L2=1", "--protocol", "paper"], "union is set, but the paper's protocol"),
        (["--union", "Linf=8"], "eps is 8 in Linf; no two images"),
        (["--union", "L2=0"], "union has a radius of 0"),
    ],
)
def test_mistakes_are_told_in_one_line(trained, words, message, capsys, tmp_path):
    assert main(["evaluate", str(trained), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("at --attack union --norm L2", "norm is L2, but the attack is a union, which takes the radius of each"),
        ("at --attack union --eps none --eps-l2 none --eps-l1 none", "eps, eps_l2 and eps_l1 are None"),
        ("at --attack union --eps-l2 -1", "eps_l2 is -1.0; it must be a finite number >= 0"),
        ("at --attack union --attack-choice best", "attack-choice"),
        ("mart --attack union --attack-choice average", "MART takes one, so 'worst' and 'random' are allowed"),
        ("natural --union L2=1 --eps 0.1", "union is 'L2=1', and norm or eps is given"),
        ("natural --union L2", "union is 'L2'; a union is written"),
        ("at --attack union --eps 2", "eps is 2; images lie in [0, 1], so it is at most 1"),
    ],
)
def test_no_union_to_train_in_is_told_in_one_line(words, message, capsys, tmp_path):
    assert main(["train", *words.split(), "--data", "digits", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_natural_run_is_tested_in_balls_that_are_named():
    config = TrainConfig(
        data=DataConfig("digits"), method=method_for("digits", "natural"), test=configs.TestConfig(union=WORDS)
    )
    settled = config.settled()
    assert settled.test == configs.TestConfig(union=WORDS)
    assert settled.test.pgd(7, 3).balls == {"Linf": 0.12, "L2": 0.5, "L1": 1.5}
    assert TrainConfig.from_json(settled.as_json()) == settled
    plain = TrainConfig(data=DataConfig("digits"), method=method_for("digits", "at")).settled().as_json()
    assert plain["test"] == {"norm": "Linf", "eps": 0.2}  # as in checkpoints of before
