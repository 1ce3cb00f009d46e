"""Spellings of earlier days: each says what it is now, and trains the same weights, bit for bit."""

import dataclasses
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from toy_methods import Perturbed, Replays

from afd import deprecated, training
from afd.attacks import APGD, PGD, APGDSettings, PGDSettings
from afd.cli import main
from afd.deprecated import OldSpellingWarning
from afd.errors import AfdError, InputError, InputTypeError
from afd.methods import AFD, AT, Natural
from afd.methods.attacking import GivenAttack
from afd.methods.registry import made
from afd.options import train_config
from afd.training import (
    CheckpointError,
    EpochReport,
    IntervalReport,
    Trainer,
    json_lines,
    load_checkpoint,
    save_checkpoint,
)
from afd.training.callbacks import logged
from afd.training.state import Position

X = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(X[:8], torch.arange(8) % 3), (X[8:], torch.arange(4) % 3)]
PGD_2, JUDGE = {"eps": 0.1, "alpha": 0.05, "steps": 2}, {"eps": 0.05, "alpha": 0.02, "steps": 3, "seed": 5}
L2_2 = {"norm": "L2", "eps": 1.0, "alpha": 0.4, "steps": 2}


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(*body, nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def against(method, **settings):
    """A method, or one inside of wrappers, with other settings."""
    if hasattr(method, "method"):
        return dataclasses.replace(method, method=against(method.method, **settings))
    return dataclasses.replace(method, **settings)


def trained(method, **settings):
    """State and history of a run, without what a clock says; alarms do not know the ball of an attack that is given."""
    torch.manual_seed(3)
    trainer = Trainer(network(), method, **{"epochs": 3, "seed": 7, "on_alarm": "off", **settings})
    history = trainer.fit(BATCHES, BATCHES)
    players = [player.state_dict() for player in trainer.step.players.values()]
    return [trainer.network.state_dict(), *players], [{**vars(one), "images_per_second": 0} for one in history]


def assert_same(old, new):
    for one, other in zip(old[0], new[0], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert old[1] == new[1]


def shifted(_model):
    return lambda x, _y, seed, **_settings: (x + 0.01 * (seed % 5)).clamp(0, 1)


ATTACKS = {
    "pgd": (PGD.partial(**PGD_2), PGDSettings(**PGD_2)),
    "apgd": (APGD.partial(eps=0.1, steps=3), APGDSettings(eps=0.1, steps=3)),
    "pgd l2": (PGD.partial(**L2_2), PGDSettings(**L2_2)),
    "somebody's": (shifted, GivenAttack(shifted)),
}
METHODS = {
    "afd": AFD(lr=0.05, hidden=4),
    "alternating": AFD(lr=0.05, schedule="alternating", micro_batches=2),
    "adam": AFD.adam(loss="dcgan"),
    "at": AT(lr=0.05),
    "wrapper": Perturbed(AT(lr=0.05)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_of_the_trainers_overrides_the_methods_own(attack, method):
    """And nothing is validated by, as before: the method's own judge was not asked for either."""
    old, new = ATTACKS[attack]
    with pytest.warns(OldSpellingWarning, match=r"^Trainer\(attack=\) is deprecated; a method owns its attacks, "):
        found = trained(METHODS[method], attack=old)
    expected = trained(against(METHODS[method], attack=new, validation_attack=None))
    assert_same(found, expected)
    assert found[1][-1]["robust"] is None


@pytest.mark.parametrize("method", ["afd", "at"])
def test_the_cases_tell_runs_apart(method):
    """Were weights not to depend on the attack, the test above could not fail."""
    runs = [trained(against(METHODS[method], attack=new, validation_attack=None))[0][0] for _, new in ATTACKS.values()]
    runs.append(trained(against(METHODS[method], validation_attack=None))[0][0])
    for number, one in enumerate(runs):
        assert all(any(not torch.equal(one[name], other[name]) for name in one) for other in runs[:number])


@pytest.mark.parametrize("settings", [{"eps_warmup": 2.0}, {"ema": 0.5, "eps_warmup": 1.0, "schedule": "cosine"}])
@pytest.mark.parametrize("attack", ["pgd", "apgd", "pgd l2"])
def test_it_grows_alike(attack, settings):
    old, new = ATTACKS[attack]
    with pytest.warns(OldSpellingWarning):
        found = trained(METHODS["afd"], attack=old, **settings)
    assert_same(found, trained(against(METHODS["afd"], attack=new, validation_attack=None), **settings))


def test_both_override_both():
    told = r"^Trainer\(attack=, validation_attack=\) is deprecated"
    with pytest.warns(OldSpellingWarning, match=told):
        found = trained(METHODS["afd"], attack=PGD.partial(**PGD_2), validation_attack=PGD.partial(**JUDGE))
    method = against(METHODS["afd"], attack=PGDSettings(**PGD_2), validation_attack=PGDSettings(**JUDGE))
    assert_same(found, trained(method))
    assert found[1][-1]["robust"] is not None


def test_they_may_stand_where_they_stood():
    with pytest.warns(OldSpellingWarning):
        trainer = Trainer(network(), AFD(), PGD.partial(**PGD_2), PGD.partial(**JUDGE), 2)
    assert (trainer.epochs, trainer.judge.eps) == (2, 0.05)
    assert trainer.step.attacks.of(trainer.method.attack).eps == 0.1


def test_a_validation_attack_alone_leaves_the_attack_as_it_is():
    method = against(METHODS["at"], attack=PGDSettings(**PGD_2))
    with pytest.warns(OldSpellingWarning, match=r"^Trainer\(validation_attack=\) is deprecated"):
        found = trained(method, validation_attack=PGD.partial(**JUDGE))
    assert_same(found, trained(against(method, validation_attack=PGDSettings(**JUDGE))))
    with pytest.warns(OldSpellingWarning):
        found = trained(Natural(lr=0.05), validation_attack=PGD.partial(**JUDGE))
    assert_same(found, trained(Natural(lr=0.05, validation_attack=PGDSettings(**JUDGE))))


def test_a_method_without_an_attack_builds_none():
    def forbidden(_model):
        raise AssertionError("an attack was built")

    for method in (Natural(lr=0.05), Replays(lr=0.05)):
        with pytest.warns(OldSpellingWarning):
            found = trained(method, attack=forbidden)
        assert_same(found, trained(method))


def test_the_warning_is_a_deprecation_at_the_users_line():
    assert issubclass(OldSpellingWarning, DeprecationWarning)
    with pytest.warns(OldSpellingWarning) as told:
        Trainer(network(), AFD(), attack=shifted)
    assert [one.filename for one in told] == [__file__]


def test_the_new_spellings_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(network(), AFD(attack=PGDSettings(**PGD_2)))
        Trainer(network(), AFD(attack=GivenAttack(shifted), validation_attack=None))
        Trainer(network(), Natural())


def test_outside_of_these_tests_it_is_an_error():
    """As pyproject.toml says, so that no other test takes it for granted."""
    with pytest.raises(OldSpellingWarning):
        Trainer(network(), AFD(), attack=shifted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": PGD(network())}, "attack is a PGD that has its model already; give its settings alone"),
        ({"attack": "pgd"}, "attack is 'pgd'; it must be an attack without its model"),
        ({"validation_attack": "pgd"}, "validation_attack is 'pgd'; it must be an attack without its model"),
        ({"validation_attack": lambda _: None}, "validation_attack made a NoneType of the model"),
    ],
)
@pytest.mark.filterwarnings("ignore::afd.deprecated.OldSpellingWarning")
def test_what_is_no_attack_is_named_as_ever(settings, message):
    with pytest.raises((InputTypeError, InputError), match=message):
        Trainer(network(), AFD(), **settings)
    with pytest.raises(InputTypeError, match="attack made a NoneType of the model"):
        Trainer(network(), AFD(), attack=lambda _: None).fit(BATCHES, BATCHES)


@pytest.mark.filterwarnings("ignore::afd.deprecated.OldSpellingWarning")
def test_a_run_in_the_old_spelling_goes_on_in_it(tmp_path):
    def run(folder, attack=None, **settings):
        torch.manual_seed(3)
        given = {"attack": attack or PGD.partial(**PGD_2), "validation_attack": PGD.partial(**JUDGE)}
        return Trainer(network(), METHODS["afd"], epochs=3, folder=tmp_path / folder, **given, **settings)

    run("whole").fit(BATCHES, BATCHES)
    first = run("parts", log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == 3 else None]
    first.fit(BATCHES, BATCHES)
    with pytest.raises(CheckpointError, match=r"of another run: method\.attack\.eps is 0\.1 there and 0\.2 here$"):
        run("parts", PGD.partial(**PGD_2 | {"eps": 0.2}), resume="auto").fit(BATCHES, BATCHES)
    assert len(run("parts", resume="auto").fit(BATCHES, BATCHES)) == 3
    one, other = (load_checkpoint(tmp_path / name / "last.pt")[0] for name in ("whole", "parts"))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@pytest.mark.filterwarnings("ignore::afd.deprecated.OldSpellingWarning")
def test_an_attack_that_is_exchanged_meanwhile_is_refused():
    trainer = Trainer(network(), AFD(), attack=shifted)
    trainer.fit(BATCHES, BATCHES)
    trainer.attack = PGD.partial(**PGD_2)
    with pytest.raises(AfdError, match="changed since the trainer was made: attack"):
        trainer.fit(BATCHES, BATCHES)


def test_the_command_trains_the_same_by_its_earlier_words(tmp_path):
    few = ["--width", "2", "--epochs", "1", "--limit", "40", "--batch-size", "20"]
    assert main(["train", "natural", *few, "--out", str(tmp_path / "new")]) == 0
    old = ["--method", "natural", "--attack-steps", "2", "--loss", "dcgan"]
    with pytest.warns(OldSpellingWarning) as told:
        assert main(["train", *old, *few, "--out", str(tmp_path / "old")]) == 0
    assert [str(one.message) for one in told if one.category is OldSpellingWarning] == [
        "--method natural is now natural: afd train natural ...",
        "--attack-steps has no effect on natural training; leave it out",
        "--loss has no effect on natural training; leave it out",
    ]
    one, other = (torch.load(tmp_path / name / "model.pt") for name in ("new", "old"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "report",
    [IntervalReport(1, 5, 5, 9, {}, {}), EpochReport(1, 5, {}, 0.5, None, 10.0, {}), Position(1, 5, 5)],
    ids=["interval", "epoch", "position"],
)
def test_a_reports_round_is_its_global_step(report):
    with pytest.warns(OldSpellingWarning, match=f"^{type(report).__name__}.round is now global_step$") as told:
        assert report.round == 5
    assert [one.filename for one in told] == [__file__]
    with pytest.raises(AttributeError, match="'rounds'"):
        _ = report.rounds


def test_discriminator_rounds_are_steps():
    new = AFD(discriminator_steps=3)
    said = "discriminator_rounds= is now discriminator_steps=$"
    with pytest.warns(OldSpellingWarning, match=said):
        assert AFD(discriminator_rounds=3) == new
    with pytest.warns(OldSpellingWarning, match=said):
        assert made({"name": "afd", "discriminator_rounds": 3}) == new
    with pytest.warns(OldSpellingWarning, match="AFD.discriminator_rounds is now discriminator_steps$"):
        assert new.discriminator_rounds == 3
    with pytest.warns(OldSpellingWarning, match="--discriminator-rounds is now --discriminator-steps$"):
        assert (
            train_config(["afd", "--data", "digits", "--discriminator-rounds", "3"], None).method.discriminator_steps
            == 3
        )


def with_old_keys(path):
    """A checkpoint as earlier versions have written it."""
    old = {"global_step": "round", "steps": "rounds"}

    def renamed(entry):
        return {old.get(name, name): value for name, value in entry.items()}

    state, metadata = load_checkpoint(path)
    state["average"] = renamed(state["average"])
    metadata |= {name: renamed(metadata[name]) for name in ("position", "losses", "report")}
    metadata["meter"] = metadata.pop("losses")
    metadata["history"] = [renamed(report) for report in metadata["history"]]
    save_checkpoint(path, state, metadata)
    assert load_checkpoint(path)[1]["position"] == {"epoch": 2, "batch": 1, "round": 3}
    assert state["average"].keys() == {"weights", "rounds", "wide"}


def test_checkpoints_and_logs_of_rounds_are_gone_on_with(tmp_path):
    def run(folder, **settings):
        torch.manual_seed(3)
        log = tmp_path / f"{folder}.jsonl"
        settings = {"log_every": 1, "epochs": 3, "ema": 0.5, **settings}
        trainer = Trainer(network(), METHODS["afd"], folder=tmp_path / folder, **settings)
        return trainer, [json_lines(log)], log

    whole, whole.callbacks, whole_log = run("whole")
    whole.fit(BATCHES, BATCHES)
    first, callbacks, log = run("parts")
    first.callbacks = [*callbacks, lambda report: first.stop() if report.global_step == 3 else None]
    first.fit(BATCHES, BATCHES)
    with_old_keys(tmp_path / "parts" / "last.pt")
    log.write_text(log.read_text().replace('"global_step"', '"round"'))
    second, second.callbacks, _ = run("parts", resume="auto")
    second.fit(BATCHES, BATCHES)
    for one, other in zip(modules_of(whole), modules_of(second), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    steps = [[entry["global_step"] for entry in logged(path)] for path in (whole_log, log)]
    assert steps[0] == steps[1] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def modules_of(trainer):
    players = trainer.step.players.values()
    return [module.state_dict() for module in (trainer.network, trainer.average, *players)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training:train", "experiments.train:train"),
        ("training:Result", "experiments.train:Result"),
        ("training.experiment:train", "experiments.train:train"),
        ("training.distributed:join", "runtime:join"),
        ("training.checkpoint:load_checkpoint", "checkpoint:load_checkpoint"),
        ("training.schedule:cosine", "training.schedules:cosine"),
        ("nn.resnet:ResNet18", "nn.encoders:ResNet18"),
        ("data.augment:CropAndFlip", "data.images:CropAndFlip"),
        ("evaluation.evaluate:evaluate", "evaluation.folder:evaluate_to_folder"),
        ("evaluation.evaluate:ProgressBar", "evaluation.folder:ProgressBar"),
    ],
)
@pytest.mark.parametrize("spelling", ["from {} import {} as found", "import {0}; found = {0}.{1}"])
def test_modules_that_were_moved_are_found(spelling, old, new, monkeypatch):
    for module in deprecated.MODULES:  # as if nobody had asked for one before
        monkeypatch.delitem(sys.modules, f"afd.{module}", raising=False)
        package, _, last = f"afd.{module}".rpartition(".")
        monkeypatch.delitem(vars(importlib.import_module(package)), last, raising=False)
    (module, name), (new_module, new_name) = (f"afd.{words}".split(":") for words in (old, new))
    here: dict = {}
    with pytest.warns(OldSpellingWarning, match=f"is now (in )?{new_module}$"):
        exec(spelling.format(module, name), here)
    assert here["found"] is getattr(importlib.import_module(new_module), new_name)


def test_a_module_of_somebody_elses_is_not_taken_for_one_of_ours():
    finder = next(one for one in sys.meta_path if type(one).__module__ == deprecated.__name__)
    assert finder.find_spec("training.schedule") is None
    assert finder.find_spec("afd.training.schedule") is not None


def test_settings_of_somebody_elses_keep_names_that_ours_had():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gan(Natural):
        discriminator_rounds: int = 5
        eps: float = 0.1
        fold: int = 2

    given = {"name": "Gan", "discriminator_rounds": 3, "eps": 0.1, "fold": 2}
    assert deprecated.settings_of_today({"method": given}) == {"method": given}
    own = [field.name for field in dataclasses.fields(Gan)]
    assert deprecated.today(given, deprecated.METHOD_SETTINGS, own) == given
    assert deprecated.train_words(["--discriminator-rounds", "3"], "mine:Gan") == ["--discriminator-rounds", "3"]


def test_what_there_has_never_been_is_not_found():
    with pytest.raises(AttributeError, match=r"module 'afd\.training' has no attribute 'nothing'"):
        _ = training.nothing
    with pytest.raises(ModuleNotFoundError, match=r"afd\.training\.nothing"):
        importlib.import_module("afd.training.nothing")
