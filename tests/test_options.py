"""The command line of `afd train`: methods and attacks as their dataclasses say, files of runs, older spellings."""

import dataclasses
import math
import re
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import toy_methods
from hypothesis import given
from hypothesis import strategies as st

from afd import methods
from afd.attacks import APGDSettings, FGSMSettings, MIMSettings, PGDSettings, UnionSettings
from afd.cli import main
from afd.config import RECIPES, TestConfig, TrainConfig, recipes
from afd.data import NAMES
from afd.deprecated import OldSpellingWarning
from afd.errors import InputError
from afd.methods import AFD, AT, FGSMRS, METHODS, TRADES, WRAPPERS, Natural
from afd.methods.registry import described, made, spelled
from afd.options import method_in, train_config
from afd.presets import method_for, radius

DIGITS = PGDSettings(eps=0.2)
BALLS = {"eps": 0.2, "eps_l2": 0.75, "eps_l1": 2.0}  # that digits ask for


def asked(text):
    """The run that words describe, as nobody has said anything else of it."""
    return train_config(text.split(), "Train.")


@pytest.mark.parametrize(
    ("words", "method", "data"),
    [
        ("", AFD(attack=DIGITS), "digits"),
        ("at", AT(attack=DIGITS), "digits"),
        ("natural", Natural(), "digits"),
        ("at --data mnist", AT(attack=PGDSettings(eps=0.3)), "mnist"),
        ("--data mnist at", AT(attack=PGDSettings(eps=0.3)), "mnist"),
        ("--data=mnist at --lr 1/20", AT(lr=0.05, attack=PGDSettings(eps=0.3)), "mnist"),
        ("--eps 0.3 --loss dcgan", AFD(loss="dcgan", attack=PGDSettings(eps=0.3)), "digits"),
        ("--data cifar10 --schedule alternating", AFD(schedule="alternating", weight_decay=5e-4), "cifar10"),
        ("at --data cifar100", AT(), "cifar100"),
        ("at --eps 4/255 --data cifar10", AT(attack=PGDSettings(eps=4 / 255)), "cifar10"),
        ("at --norm L2 --data cifar10", AT(attack=PGDSettings(norm="L2", eps=0.5)), "cifar10"),
        ("--norm L1 --data mnist", AFD(attack=PGDSettings(norm="L1", eps=10.0)), "mnist"),
        ("at --norm L2 --eps 1", AT(attack=PGDSettings(norm="L2", eps=1.0)), "digits"),
        ("at --attack apgd", AT(attack=APGDSettings(eps=0.2, steps=10)), "digits"),
        ("at --attack apgd --attack-loss dlr", AT(attack=APGDSettings(eps=0.2, steps=10, loss="dlr")), "digits"),
        ("at --attack fgsm", AT(attack=FGSMSettings(eps=0.2)), "digits"),
        ("at --attack mim --attack-decay 0.5", AT(attack=MIMSettings(eps=0.2, decay=0.5)), "digits"),
        ("at --norm L1", AT(attack=PGDSettings(norm="L1", eps=2.0)), "digits"),
        ("at --attack union", AT(attack=UnionSettings(**BALLS)), "digits"),
        (
            "--attack union --attack-choice average --eps-l1 none --eps-l2 1/2 --alpha-l2 0.1",
            AFD(attack=UnionSettings(eps=0.2, eps_l2=0.5, alpha_l2=0.1, choice="average")),
            "digits",
        ),
        (
            "trades --attack union --data mnist --eps NONE",  # as the method's own attack climbs, where that is a PGD
            TRADES(attack=UnionSettings(eps_l2=2.0, eps_l1=10.0, loss="kl", init="gaussian")),
            "mnist",
        ),
        (
            "fgsm-rs --attack union",
            FGSMRS(
                attack=UnionSettings(**BALLS, alpha=0.25, alpha_l2=0.9375, alpha_l1=2.5, steps=1, batchnorm="train")
            ),
            "digits",
        ),
        ("at --attack-batchnorm train", AT(attack=PGDSettings(eps=0.2, batchnorm="train")), "digits"),
        ("at --no-attack-random-start", AT(attack=PGDSettings(eps=0.2, random_start=False)), "digits"),
        ("at --attack-init gaussian", AT(attack=PGDSettings(eps=0.2, init="gaussian")), "digits"),
        ("at --attack_steps 3 --micro_batches 2", AT(micro_batches=2, attack=PGDSettings(eps=0.2, steps=3)), "digits"),
        ("--optimizer adam", AFD.adam(attack=DIGITS), "digits"),
        ("at --optimizer adam --lr 1e-3", AT(optimizer="adam", lr=1e-3, attack=DIGITS), "digits"),
        ("at --eval-steps 50", AT(attack=DIGITS, validation_attack="pgd-50"), "digits"),
        ("--out at", AFD(attack=DIGITS), "digits"),
        ("at --out natural", AT(attack=DIGITS), "digits"),
        ("--compile at", AT(attack=DIGITS), "digits"),
        ("--no-normalize natural --limit 7", Natural(), "digits"),
        ("--milestones 0.5 0.8 at", AT(attack=DIGITS), "digits"),
    ],
)  # fmt: skip
def test_what_words_mean(words, method, data):
    config = asked(words)
    assert config.method == method
    assert config.data.name == data
    assert config.settled().method == method


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_and_its_attack_has_a_help_line_and_its_own_name(name, capsys):
    for attack in ("pgd", "apgd", "fgsm", "mim") if METHODS[name]().attack is not None else (None,):
        with pytest.raises(SystemExit) as shown:
            main(["train", name, "--help", *([] if attack is None else ["--attack", attack])])
        assert not shown.value.code
        text = capsys.readouterr().out
        rows = [row.strip("│ ") for row in text.splitlines()]
        places = [i for i, row in enumerate(rows) if row.startswith("--") and row[2].isalpha()]
        names = [rows[i].split()[0] for i in places]
        assert len(names) == len(set(names))
        for first, end in zip(places, [*places[1:], len(rows)], strict=True):
            assert len(" ".join(rows[first:end]).split()) > 4, rows[first]
        assert "--eps" in names
        assert "--norm" in names
        assert ("--attack-steps" in names) == (attack not in (None, "fgsm"))
        assert ("--alpha" in names) == (attack in ("pgd", "mim") or hasattr(METHODS[name](), "alpha"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trades2",
            f"method is 'trades2'; allowed are {', '.join(METHODS)} and somebody's own as package.module:Class",
        ),
        ("at+awp2", "wrapper is 'awp2'; allowed are"),
        ("--method trades2", "method is 'trades2'"),
        ("at natural", "two methods are named, at and natural"),
        ("no_such_module:Method", "method is 'no_such_module:Method', which cannot be imported"),
        ("toy_methods:Nothing", "has no attribute 'Nothing'"),
        (":Nothing", "somebody's own class is written package.module:Class"),
        ("./mine.py:Method", "somebody's own class is written package.module:Class"),
        ("afd.methods:Supervised", "it must be a class of afd.methods.Method"),
        ("afd.methods:Method", "it must be a class of afd.methods.Method"),
        ("afd+toy_methods:Perturbed", "Perturbed goes around a supervised method, which AFD is not"),
        ("toy_methods:spread", "must be a class of afd.methods.Method"),
        ("toy_methods:Perturbed", "toy_methods:Perturbed is a wrapper around a method"),
        ("at --loss dcgan", "--loss"),
        ("natural --beta 3", "--beta"),
        ("at --attack cw", "invalid choice 'cw' for argument '--attack'"),
        ("at --attack apgd --alpha 0.1", "--alpha"),
        ("at --norm L7", "--norm"),
        ("at --eps -1", "eps is -1"),
        ("at --eps 2", "did you mean 2/255?"),
        ("at --alpha -1", "alpha is -1"),
        ("at --attack-steps -1", "attack-steps is -1"),
        ("at --attack-start-scale -1", "attack-start-scale is -1"),
        ("at+toy_methods:Perturbed+toy_methods:Perturbed", "of which two have a setting 'gamma'"),
        ("at --lr 0", "lr is 0"),
        ("at --config nowhere.toml", "config is nowhere.toml; there is no such file, and recipes are imagenet-"),
        ("--config mnist-nothing", "config is mnist-nothing; there is no such file, and recipes are imagenet-"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert main(["train", *words.split()]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.splitlines()[-1].startswith("afd: error: ")


# --- A method costs its class and a line ------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    """The toys, as if each had its line in the registry; nothing else knows of them."""
    for name, kind in (("replays", toy_methods.Replays), ("steady", toy_methods.Steady)):
        monkeypatch.setitem(METHODS, name, kind)
    monkeypatch.setitem(WRAPPERS, "perturbed", toy_methods.Perturbed)


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("replays --replays 2", toy_methods.Replays(eps=0.2, replays=2)),
        ("at+perturbed --gamma 0.1 --lr 0.2", toy_methods.Perturbed(AT(lr=0.2, attack=DIGITS), gamma=0.1)),
        ("replays+perturbed", toy_methods.Perturbed(toy_methods.Replays(eps=0.2))),
        ("replays --eps 0.3 --data mnist", toy_methods.Replays(eps=0.3)),
        ("toy_methods:Replays --replays 2", toy_methods.Replays(eps=0.2, replays=2)),
        ("--method toy_methods:Replays --replays 2", toy_methods.Replays(eps=0.2, replays=2)),
        ("at+toy_methods:Perturbed", toy_methods.Perturbed(AT(attack=DIGITS))),
    ],
)
def test_a_new_method_is_on_the_command_line(words, method, registered, recwarn):
    config = asked(words)
    assert config.method == method
    assert TrainConfig.from_json(config.as_json()).method == method
    assert not [one for one in recwarn if issubclass(one.category, DeprecationWarning)]


def test_a_new_method_is_trained_and_measured_by_its_name(registered, tmp_path, capsys):
    out = tmp_path / "run"
    few = {"epochs": 1, "limit": 40, "width": 2, "batch-size": 20, "replays": 2, "out": out}
    assert main(["train", "replays+perturbed", *(f"--{name}={value}" for name, value in few.items())]) == 0
    assert "replays+perturbed" in capsys.readouterr().out
    text = (out / "run.toml").read_text()
    assert 'name = "replays+perturbed"' in text
    assert (out / "curves.png").stat().st_size > 10_000
    assert main(["evaluate", str(out), "--protocol", "quick", "--images", "10", "--out", str(tmp_path / "e")]) == 0


def test_names_of_methods_are_read_and_written(registered):
    for name in ("natural", "at", "afd", "replays", "at+perturbed", "toy_methods:Own"):
        if ":" not in name:
            assert spelled(made({"name": name})) == name
    assert spelled(toy_methods.Perturbed(AT())) == "at+perturbed"


def test_somebodys_own_class_is_named_by_its_place():
    assert spelled(toy_methods.Replays()) == "toy_methods:Replays"
    assert spelled(toy_methods.Perturbed(Natural())) == "natural+toy_methods:Perturbed"
    assert described(toy_methods.Replays(replays=5))["replays"] == 5


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": "at", "beta": 3}, "the method at has no setting 'beta'"),
        ({"name": "at", "attack": {"name": "pgd", "rho": 1}}, "PGDSettings has no setting 'rho'"),
        ({"name": "at", "attack": {"name": "cw"}}, "attack is 'cw'"),
        ({"lr": 0.1}, "the method's name is None"),
    ],
)
def test_a_description_of_nothing_is_named(description, message):
    with pytest.raises(InputError, match=message):
        made(description)


# --- Runs as files ----------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["natural", "at", "afd", "at+toy_methods:Perturbed"]),
    st.sampled_from(NAMES),
    st.sampled_from(["pgd", "apgd", "fgsm", "mim"]),
    st.floats(1e-4, 0.49),
    st.floats(1e-9, 10.0),
    st.integers(0, 2**61),
)
def test_a_run_is_the_same_when_it_is_read_again(name, data, attack, eps, lr, seed):
    method = made(described(method_for(data, name, attack=attack, eps=eps)) | {"lr": lr})
    config = TrainConfig(data=dataclasses.replace(TrainConfig().data, name=data), method=method, seed=seed)
    for one in (config, config.settled()):
        read = TrainConfig.from_json(tomllib.loads(one.as_toml()))
        assert read.settled() == config.settled()


def test_a_file_may_say_fractions_and_little(tmp_path):
    file = tmp_path / "mine.toml"
    attack = 'attack = {eps = "76.5/255", steps = 4}'
    file.write_text(f'epochs = 3\n[data]\nname = "mnist"\n[method]\nname = "at"\nlr = "1/20"\n{attack}\n')
    config = TrainConfig.read(file)
    assert config.method == AT(lr=0.05, attack=PGDSettings(eps=0.3, steps=4))
    assert (config.epochs, config.data.name) == (3, "mnist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = [", "cannot be read"),
        ("epocs = 3", "has no setting 'epocs'"),
        ("[data]\nnome = 1", "data has no setting 'nome'"),
        ('[method]\nname = "at"\nbeta = 1', "has no setting 'beta'"),
        ('[method]\nname = "nonsense"', "method is 'nonsense'"),
        ('method = "at"', "method is 'at'; it must be a table"),
        ('[method]\nname = "at"\nlr = "fast"', "lr is 'fast', a str; the method at has a float there"),
        ("[method]\nname = 3", "the method's name is 3"),
        ('[data]\nname = "nope"', "data is 'nope'"),
        ('epochs = "two"', "epochs is 'two', a str"),
        ("epochs = 1.5", "epochs is 1.5, a float"),
        ('compile = "x"', "compile is 'x', a str"),
        ('milestones = "x"', "milestones is 'x', a str"),
        ("[model]\nwidth = true", "width is True, a bool"),
        ('[method]\nname = "at"\nattack = {name = "pgd", rho = 1}', "has no setting 'rho'"),
    ],
)
def test_a_file_of_nothing_is_one_line(text, message, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert told[-1].startswith(f"afd: error: config is {tmp_path / 'run.toml'}")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_run_of_that_name_and_says_more_of_it(name, tmp_path, monkeypatch):
    text = (RECIPES / f"{name}.toml").read_text()
    assert re.match(rf"# afd train --config {name}( --data folder:PATH)?( --weights FILE)?\n# ", text)
    config = asked(f"--config {name} --epochs 7")
    assert config.settled() == dataclasses.replace(TrainConfig.read(RECIPES / f"{name}.toml"), epochs=7).settled()
    assert TrainConfig.from_json(config.settled().as_json()).settled() == config.settled()
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("epochs = 2")  # a file of one's own goes before
    assert TrainConfig.read(Path(name)).epochs == 2


def test_the_recipe_of_a_joint_game_on_mnist():
    method = asked("--config mnist-afd-joint").method
    attack = PGDSettings(eps=0.3, steps=5)
    rates = {"lr": 0.003, "lr_features": 0.0006, "lr_discriminator": 0.003, "weight_decay": 0.0}
    game = {"schedule": "joint", "loss": "dcgan", "divergence_weight": 1.0}
    assert method == AFD(optimizer="adam", attack=attack, validation_attack="pgd-10", **rates, **game)


def test_options_change_what_a_file_says(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(asked("at --data mnist --eps 0.1 --attack-steps 3 --epochs 4 --lr 0.02").settled().as_toml())
    changed = asked(f"--config {file} --epochs 5 --attack-steps 6")
    assert (changed.epochs, changed.method) == (5, AT(lr=0.02, attack=PGDSettings(eps=0.1, steps=6)))
    other = asked(f"--config {file} --attack apgd")
    assert other.method == AT(lr=0.02, attack=APGDSettings(eps=0.1, steps=3))
    assert asked(f"natural --config {file}").method == Natural()
    assert asked(f"--config {file} --eps 0.2").settled().test == TestConfig("Linf", 0.2)


def test_a_method_that_is_named_beside_a_file_keeps_what_the_file_says(tmp_path):
    file = tmp_path / "run.toml"
    run = asked("at --norm L2 --eps 1 --attack-batchnorm batch --alpha 1/10 --lr 0.02")
    file.write_text(run.settled().as_toml())
    assert asked(f"at --config {file}").method == run.method
    assert asked(f"at --config {file} --attack mim").method.attack == MIMSettings(
        norm="L2", eps=1.0, alpha=0.1, batchnorm="batch"
    )
    for other in ("afd", "natural", "at+toy_methods:Perturbed"):
        assert asked(f"{other} --config {file}").settled().test == TestConfig("L2", 1.0)


def test_a_union_that_a_file_says_stays_but_for_what_is_named(tmp_path):
    file = tmp_path / "run.toml"
    run = asked("at --attack union --attack-choice random --eps-l1 none --eps-l2 0.5 --attack-steps 3 --lr 0.02")
    file.write_text(run.settled().as_toml())
    assert asked(f"at --config {file}").method == asked(f"--config {file}").method == run.method
    assert run.settled().test == TestConfig(union="Linf=0.2,L2=0.5")
    other = asked(f"trades --config {file}").method
    own = TRADES(attack=UnionSettings(eps=0.2, eps_l2=0.5, loss="kl", init="gaussian")).attack
    assert dataclasses.replace(other.attack, alpha=None) == own
    assert asked(f"natural --config {file}").settled().test == TestConfig(union="Linf=0.2,L2=0.5")
    assert asked(f"at --config {file} --eps-l1 3 --eps none").method.attack == UnionSettings(
        eps_l2=0.5, eps_l1=3.0, steps=3, choice="random"
    )
    assert asked(f"at --config {file} --attack pgd").method.attack == PGDSettings(eps=0.2, steps=3)
    assert asked(f"mart --config {file} --attack pgd --data mnist").method.attack.eps == 0.3
    file.write_text(asked("at --norm L2 --eps 0.6 --attack-steps 3").settled().as_toml())
    assert asked(f"at --config {file} --attack union --eps-l1 1").method.attack == UnionSettings(
        eps=0.2, eps_l2=0.6, eps_l1=1.0, steps=3
    )
    with pytest.raises(InputError, match="norm is L2, but the attack is a union"):
        asked(f"at --config {file} --attack union --norm L2")


def test_settings_by_the_names_of_other_options_and_functions_have_their_place(tmp_path, capsys):
    config = asked("toy_methods:Clashing --method-alpha 0.25 --alpha 0.1 --method-epochs 7 --epochs 1")
    assert (config.epochs, config.method.alpha, config.method.epochs) == (1, 0.25, 7)
    assert (config.method.attack.alpha, config.method.second) == (0.1, toy_methods.Clashing().second)
    steady = asked("toy_methods:Steady --attack-steps 2")
    assert steady.method.attack.loss is toy_methods.spread
    assert TrainConfig.from_json(steady.as_json()).method == steady.method
    out = tmp_path / "run"
    few = {"epochs": 1, "limit": 40, "width": 2, "batch-size": 20, "attack-steps": 1, "out": out}
    assert main(["train", "toy_methods:Steady", *(f"--{name}={value}" for name, value in few.items())]) == 0
    capsys.readouterr()


# --- Older spellings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--method natural", "natural"),
        ("--method=natural --epochs 3", "natural --epochs 3"),
        ("--method afd --loss dcgan --eps 0.3", "afd --loss dcgan --eps 0.3"),
        ("--epochs 3 --method natural", "natural --epochs 3"),
        ("--method natural --loss dcgan --attack-steps 3 --alpha 0.1 --eval-steps 2 --lr 0.05", "natural --lr 0.05"),
        ("--method natural --lr-discriminator=0.2 --discriminator-rounds 2 --penalty 1 --attack pgd", "natural"),
    ],
)
def test_the_option_that_named_a_method_goes_on_working(old, new):
    with pytest.warns(OldSpellingWarning):
        config = asked(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config == asked(new)


def test_an_older_spelling_is_told_in_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
        assert main(["train", "--method", "natural", "--lr", "0"]) == 2
    assert "afd: warning: --method natural is now natural: afd train natural ...\n" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["compile", "normalize"])
@pytest.mark.parametrize("on", [False, True])
def test_a_flag_of_a_file_is_turned_either_way(flag, on, tmp_path):
    table = "[model]\n" if flag == "normalize" else ""
    (tmp_path / "run.toml").write_text(f"{table}{flag} = {str(not on).lower()}\n")
    config = asked(f"--config {tmp_path / 'run.toml'} --{'' if on else 'no-'}{flag} at")
    assert (config.model.normalize if flag == "normalize" else config.compile) is on


def test_the_words_of_a_method_are_taken_out_wherever_they_stand():
    assert method_in(["--compile", "at", "--epochs", "3"]) == (["--compile", "--epochs", "3"], "at")
    assert method_in(["--out", "at"]) == (["--out", "at"], None)
    assert method_in(["--no-attack-random-start", "at"]) == (["--no-attack-random-start"], "at")
    assert method_in(["--attack-early-stop", "at"]) == (["--attack-early-stop"], "at")
    assert method_in(["--augment", "True", "at"]) == (["--augment", "True"], "at")
    assert method_in(["--out=at", "afd"]) == (["--out=at"], "afd")


def test_defaults_that_data_ask_for():
    assert method_for("mnist", "at").attack.resolved().alpha == 2.5 * 0.3 / 10
    assert method_for("cifar10", "at") == AT()
    assert methods.AT().attack.resolved().alpha == 2 / 255


def test_weight_decay_of_methods_that_attack_is_what_the_data_ask_for():
    """Of the command line; the classes have their authors'. What has more keeps it; natural training has its own."""
    assert method_for("cifar10", "afd").weight_decay == 5e-4
    assert method_for("cifar100", "toy_methods:Replays").weight_decay == 5e-4  # it has a radius of its own
    assert method_for("cifar10", "toy_methods:Clashing+toy_methods:Perturbed").core.weight_decay == 5e-4
    assert method_for("cifar10", "natural").weight_decay == methods.Natural().weight_decay
    assert method_for("mnist", "afd").weight_decay == AFD().weight_decay
    assert method_for("cifar10", "toy_methods:Strong").weight_decay == 3.5e-3
    assert method_for("cifar10", "afd", optimizer="adam") == AFD.adam()
    assert asked("--data cifar10 --weight-decay 1e-4").method.weight_decay == 1e-4
    assert asked("--data cifar10 --optimizer sgd").method.weight_decay == 5e-4


def test_the_step_size_of_a_method_s_own_attack_follows_the_radius():
    strong = "toy_methods:Strong"
    assert method_for("mnist", strong).attack.alpha == pytest.approx(0.3 * 0.25)
    assert method_for("cifar10", strong, eps=0.05).attack.alpha == pytest.approx(0.0125)
    assert method_for("cifar10", strong, norm="L2").attack.alpha is None
    assert method_for("mnist", "at").attack.alpha is None


def test_so_does_the_scale_of_its_start():
    for name in ("gat", "nuat"):
        own, mnist = method_for("cifar10", name).attack, method_for("mnist", name).attack
        assert (own.alpha, own.start_scale) == (8 / 255, 4 / 255)
        assert (mnist.alpha, mnist.start_scale) == (pytest.approx(0.3), pytest.approx(0.15))
        assert method_for("cifar10", name, norm="L2").attack.start_scale == pytest.approx(0.25)
    assert method_for("mnist", "trades").attack.start_scale is None
    assert method_for("mnist", "llr").eps == 0.3
    assert asked("llr --data mnist --norm L2 --eps 1").method.ball.eps == 1


def test_epochs_are_divided_by_the_repeats_of_a_batch():
    assert asked("toy_methods:Remembers --data mnist").settled().epochs == 4  # of 10, by 3
    assert asked("toy_methods:Remembers --data mnist --epochs 7").settled().epochs == 7
    assert asked("toy_methods:Remembers --data mnist --replays 1").settled().epochs == 10


def test_what_else_data_ask_for():
    assert math.isclose(asked("natural --data mnist").settled().test.eps, 0.3)
    assert asked("natural --norm L2 --data mnist").settled().test == TestConfig("L2", 2.0)
    with pytest.raises(InputError, match="eps is missing; no radius is usual for digits in L7"):
        radius("digits", "L7")
